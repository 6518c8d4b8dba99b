"""The verb `slurm`: trains on several nodes as a Slurm job, by a batch script that can be read.

The script records the demonstrations if need be, then starts `fit` as one task for each GPU. A job
that is preempted or out of time saves, is requeued, and goes on from there.

What is assumed: all nodes see this folder and the Python that runs it under the same paths.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from act_lightning.cli import ConfigReader
from act_lightning.data.files import is_remote
from act_lightning.main import EXIT_PREEMPTED
from act_lightning.new_file import write_file
from act_lightning.slurm_config import SlurmConfig, check_commands, read_config

CACHE = "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/act_lightning_$(id -un)"
"""Where each node keeps its copies of demonstrations, in the words of the script."""
SEEDS = r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?"
"""Numbers, and ranges of them, as sbatch takes them."""
MAX_REQUEUES = 100
"""How often a job requeues itself."""

SCRIPT = Template("""\
#!/usr/bin/env bash
# $title. Written by `python -m act_lightning slurm`.
$options

set -eo pipefail
${setup}set -u

# A step that was told to stop ends with $preempted: it has saved, and its job shall go on. So shall
# that of one that USR1 (128 + 10: its time is up) or TERM (128 + 15: it is preempted) ended before
# it listened. Any other error is the job's, unless a node has died: then a step on all nodes waits
# until Slurm knows, which requeues the job by itself.
go_on_or_fail() {
    case $$? in
        0) ;;
        $preempted | 138 | 143) requeue ;;
        *) srun --ntasks-per-node=1 true || requeue ;;
    esac
}
requeue() {
    if [ "$${SLURM_RESTART_COUNT:-0}" -lt $max_requeues ]; then
        scontrol requeue "$$SLURM_JOB_ID"
    else
        echo "error: not requeued, as it was $max_requeues times; make resume goes on" >&2
    fi
}
trap go_on_or_fail EXIT

export PYTHONUNBUFFERED=1$threads
act_lightning=($python -m act_lightning)
settings=(
$settings
)
$record
# Tasks: $tasks. When one fails, the others have 20 s to end by themselves, then srun ends them: its
# exit code is the highest, and one that is ended while it starts ends with $preempted.
srun --kill-on-bad-exit=0 --wait=20$cpus \\
    "$${act_lightning[@]}" fit "$${settings[@]}" \\
    $run --ckpt_path=last
""")

RECORD = Template("""
# Demonstrations, if they are not there: one job records, the others wait for it.
mkdir -p $folder
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$$SLURM_CPUS_ON_NODE" \\
    flock $lock "$${act_lightning[@]}" record "$${settings[@]}"
""")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A training, or several that differ in their seeds, as a batch script."""

    experiment: str
    """Names the job, and the folder below runs/."""
    demonstrations: str
    """The store that it trains on."""
    settings: tuple[str, ...]
    """Arguments of `fit`."""
    config: SlurmConfig
    """What it asks of Slurm."""
    nodes: int = 1
    """Nodes of each training."""
    tasks_per_node: int | None = None
    """Processes on each; None: one a GPU, or one."""
    seeds: str | None = None
    """Training seeds, as 0-4 or 0,2,5; None: one training, with the seed of the settings."""
    cache: str | None = CACHE
    """Folder of each node's own disk for copies of demonstrations; the script expands variables."""

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}={value}; give 1 or more")
        if self.seeds is not None and not re.fullmatch(SEEDS, self.seeds):
            raise ValueError(
                f"--seeds={self.seeds}; give seeds as 0-4 or 0,2,5, with %2 at the end two at once"
            )
        own = {
            "run": "",
            "ckpt_path": "",
            "trainer.devices": "; give --slurm gpus_per_node=N, or --tasks-per-node",
            "trainer.num_nodes": "; give --nodes",
        }
        if self.seeds is not None:
            own["seed_everything"] = ""
        if self.cache:
            own["data.mirror.directory"] = "; give --cache"
        names = {argument.split("=")[0] for argument in self.settings}
        for name, hint in own.items():
            if f"--{name}" in names:
                raise ValueError(f"--{name} is for the script to set; leave it out{hint}")

    @property
    def folder(self) -> Path:
        """Of the script and of what the job prints."""
        return Path("runs", self.experiment, "slurm")

    @property
    def log(self) -> str:
        """What the job prints goes there; sbatch fills in its number."""
        return str(self.folder / ("%j.log" if self.seeds is None else "%A_%a.log"))

    def script(self) -> str:
        """The batch script."""
        tasks = self.tasks_per_node or self.config.gpus_per_node or 1
        cpus = self.config.cpus_per_task
        kind = ", a GPU each" if tasks == self.config.gpus_per_node else ""
        number = f"seeds {self.seeds}" if self.seeds else "one training"
        return SCRIPT.substitute(
            title=f"{self.experiment}: {number}; nodes: {self.nodes}, tasks on each: {tasks}",
            options="\n".join(f"#SBATCH {option}" for option in self._options(tasks)),
            setup="".join(f"{line}\n" for line in self.config.setup),
            preempted=EXIT_PREEMPTED,
            max_requeues=MAX_REQUEUES,
            threads="" if cpus is None else f" OMP_NUM_THREADS={cpus}",
            python=shlex.quote(sys.executable),
            settings="\n".join(f"    {shlex.quote(setting)}" for setting in self.settings),
            record=self._record(),
            tasks=f"{self.nodes * tasks}{kind}",
            # srun does not take it over from sbatch, since Slurm 22.05.
            cpus="" if cpus is None else f" --cpus-per-task={cpus}",
            run=self._run(),
        )

    def _options(self, tasks: int) -> list[str]:
        """Those of sbatch."""
        config = self.config
        asked: dict[str, object] = {
            "job-name": self.experiment.replace("/", "-"),
            "chdir": Path.cwd(),
            "output": self.log,
            "open-mode": "append",
            "requeue": True,
            "signal": f"USR1@{config.signal_delay_s}",
            "time": config.timeout_min,
            "nodes": self.nodes,
            "ntasks-per-node": tasks,
            "gpus-per-node": config.gpus_per_node,
            "cpus-per-task": config.cpus_per_task,
            "mem": None if config.mem_gb is None else f"{round(config.mem_gb * 1024)}M",
            "array": self.seeds,
            **{
                name: getattr(config, name)
                for name in ("partition", "account", "qos", "constraint")
                + ("nodelist", "exclude", "gres")
            },
            **{key.replace("_", "-"): value for key, value in config.additional_parameters.items()},
        }
        return [
            f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"
            for name, value in asked.items()
            if value is not None
        ]

    def _record(self) -> str:
        """Lines that record; none for an object store, which is never recorded into."""
        if is_remote(self.demonstrations):
            return ""
        path = Path(self.demonstrations)
        return RECORD.substitute(
            folder=shlex.quote(str(path.parent)), lock=shlex.quote(f"{path}.recording")
        )

    def _run(self) -> str:
        cache = f' \\\n    --data.mirror.directory="{self.cache}"' if self.cache else ""
        if self.seeds is None:
            return f'--run="job_$SLURM_JOB_ID"{cache}'
        seed = "${SLURM_ARRAY_TASK_ID}"
        run = f"job_${{SLURM_ARRAY_JOB_ID}}_seed_{seed}"
        return f'--run="{run}" --seed_everything="{seed}"{cache}'


def slurm_verb(args: list[str]) -> None:
    """`slurm --config FILE ... [--nodes N] [--seeds 0-4] [--slurm key=value ...] [settings]`."""
    parser = argparse.ArgumentParser(
        prog="act_lightning slurm",
        description="Train as a Slurm job. Other arguments are those of fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default 1)")
    parser.add_argument(
        "--tasks-per-node", type=int, help="processes on each (default: one a GPU, or one)"
    )
    parser.add_argument("--seeds", help="a training for each seed, as 0-4 or 0,2,5")
    parser.add_argument(
        "--cache",
        default=CACHE,
        help="folder of each node's own disk for copies of demonstrations; none reads them where "
        "they are (default: in $SLURM_TMPDIR, $TMPDIR or /tmp)",
    )
    parser.add_argument(
        "--slurm",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="what the job asks for, as partition=gpu gpus_per_node=8 cpus_per_task=8",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the script, submit nothing")
    options, rest = parser.parse_known_args(args)
    settings = _with_values(rest)
    experiment, demonstrations = _read_settings(settings)
    job = SlurmJob(
        experiment=experiment,
        demonstrations=demonstrations,
        settings=settings,
        config=read_config(options.slurm),
        nodes=options.nodes,
        tasks_per_node=options.tasks_per_node,
        seeds=options.seeds,
        cache=None if options.cache == "none" else options.cache,
    )
    if options.dry_run:
        print(job.script(), end="")
        return
    check_commands("call slurm where jobs are submitted; --dry-run (make: DRY=1) shows the script")
    submit(job)


def submit(job: SlurmJob) -> str:
    """Writes the script beside the runs, submits it, and says so.

    Returns:
        Slurm's number for the job.

    Raises:
        RuntimeError: Slurm refuses.
    """
    path = job.folder / time.strftime("%Y-%m-%d_%H%M%S.sbatch")
    write_file(path, job.script().encode())
    command = ["sbatch", "--parsable", str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"sbatch refused {path}: {answer.stderr.strip()}")
    number = answer.stdout.strip().split(";")[0]
    log = job.log.replace("%A", number).replace("%j", number).replace("%a", "*")
    print(f"submitted {path} as Slurm job {number}; it prints to {log}")
    return number


def _with_values(arguments: Sequence[str]) -> tuple[str, ...]:
    """Arguments with their values in the same word, as --config=experiments/base.yaml."""
    joined: list[str] = []
    for argument in arguments:
        if argument.startswith("--") or not joined or "=" in joined[-1]:
            joined.append(argument)
        else:
            joined[-1] += f"={argument}"
    return tuple(joined)


def _read_settings(settings: Sequence[str]) -> tuple[str, str]:
    """Name of the experiment, and its store; a wrong setting ends the program, as in `fit`."""
    reader = ConfigReader(list(settings))
    return reader.config.experiment, reader.config_init.demonstrations.path
