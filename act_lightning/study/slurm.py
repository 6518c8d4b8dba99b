"""Runs of a study as one Slurm job array, submitted through submitit.

A task of the array is one run (see slurm_task.py), and does what `sweep` does on one machine. So
the states of runs come from the same files; Slurm is only asked which tasks it still has, with
`squeue`, as few clusters of a lab keep accounts.

What is assumed: all nodes see this folder and the Python that runs it under the same paths. Locks
are `flock`. NFS, GPFS, and Lustre mounted with `flock` hold them across nodes; where they hold on
one node only, do not run the same study with and without Slurm at once.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import submitit
from rich import get_console
from rich.live import Live

from act_lightning.new_file import write_file
from act_lightning.slurm_config import SlurmConfig
from act_lightning.study.run_state import RunFiles, State
from act_lightning.study.slurm_task import Training
from act_lightning.study.study import Study
from act_lightning.study.sweep_table import Watcher, print_change

ASK_S = 10.0
"""How often Slurm is asked."""
LOOK_S = 1.0
"""How often the runs' files are looked at."""
MAX_TIMEOUTS = 100
"""How often a task is requeued because its time was up."""


class SlurmQueue:
    """The tasks of a study that Slurm has.

    Args:
        study: the study.
        watcher: of its runs; told which are queued and running.
        config: what each run asks for.

    Raises:
        RuntimeError: Slurm does not answer.
    """

    def __init__(self, study: Study, watcher: Watcher, config: SlurmConfig) -> None:
        self.study = study
        self.watcher = watcher
        self.config = config
        self.folder = study.folder / "sweep" / "slurm"
        self._path = self.folder.with_suffix(".json")
        # Job of each run that was submitted, by the run's name.
        self._jobs: dict[str, str] = _read_jobs(self._path)
        self._states: dict[str, State] = {}
        self.ask()
        self._tell()

    def ask(self) -> None:
        """Asks Slurm which jobs it has.

        Raises:
            RuntimeError: it does not answer.
        """
        command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
        command.append(f"--name={self.study.name}")
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(f"squeue: {answer.stderr.strip()}")
        self._states = _parse_states(answer.stdout)

    def run(self, files: Sequence[RunFiles], jobs: int | None) -> bool:
        """Submits runs as one array, and shows how far all are until Slurm has none any more.

        Ctrl-C ends only the watching; returns whether it was waited to the end.

        Args:
            files: of the runs to submit; those that a process on this machine has are left to it.
            jobs: how many may run at once; None leaves it to Slurm.

        Raises:
            RuntimeError: Slurm refuses.
        """
        files = [file for file in files if self.watcher.state(file) != State.RUNNING]
        if files:
            self._submit(files, jobs or len(files))
        return self._watch()

    def _submit(self, files: Sequence[RunFiles], at_once: int) -> None:
        executor = submitit.AutoExecutor(
            self.folder, cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS
        )
        executor.update_parameters(**_parameters(self.config, self.study.name, at_once))
        tasks = [Training(file.run, self.config.signal_delay_s / 2) for file in files]
        try:
            submitted = executor.submit_array(tasks)
        except RuntimeError as error:
            raise RuntimeError(f"sbatch refused the runs: {error}") from error
        ids = [job.job_id for job in submitted]
        here = {name: job for name, job in self._jobs.items() if job in self._states}
        self._jobs = here | {file.name: job for file, job in zip(files, ids, strict=True)}
        write_file(self._path, json.dumps(self._jobs, indent=1).encode())
        self._states |= dict.fromkeys(ids, State.QUEUED)
        self._tell()
        get_console().print(f"submitted {len(ids)} runs as Slurm job {ids[0].split('_')[0]}")

    def _watch(self) -> bool:
        console = get_console()
        asked = time.monotonic()
        try:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while self._open_jobs():
                    if time.monotonic() - asked > ASK_S:
                        self._ask_again()
                        asked = time.monotonic()
                    self._tell()
                    if console.is_terminal:
                        live.update(self.watcher.table(self.study.title), refresh=True)
                    time.sleep(LOOK_S)
        except KeyboardInterrupt:
            arrays = sorted({job.split("_")[0] for job in self._open_jobs()})
            console.print(
                f"the jobs go on, without being watched; the same command watches them again, "
                f"scancel {' '.join(arrays)} cancels them",
                soft_wrap=True,
            )
            return False
        self._tell()
        self._explain_gone()
        return True

    def _ask_again(self) -> None:
        """Asks, and keeps the last answer when Slurm is busy."""
        try:
            self.ask()
        except RuntimeError as error:
            get_console().print(f"{error}; asking again", markup=False, soft_wrap=True)

    def _open_jobs(self) -> list[str]:
        """Jobs of runs that are not finished."""
        return [
            self._jobs[file.name]
            for file in self.watcher.files
            if self._jobs.get(file.name) in self._states
            and self.watcher.state(file) != State.FINISHED
        ]

    def _tell(self) -> None:
        """Tells the watcher what has become of the runs."""
        for file in self.watcher.files:
            state = file.state()
            if state != State.FINISHED:
                state = self._states.get(self._jobs.get(file.name, ""), state)
            if state != self.watcher.state(file):
                self.watcher.set(file, state)
                print_change(self.watcher, file, state)

    def _explain_gone(self) -> None:
        """Says where the output is of jobs that ended before their runs did."""
        for file in self.watcher.files:
            unfinished = self.watcher.state(file) in (State.WAITING, State.INTERRUPTED)
            if unfinished and (job := self._jobs.get(file.name)):
                log = submitit.SlurmJob(self.folder, job).paths.stderr
                get_console().print(
                    f"{file.name}: Slurm has ended its job {job} (see {log})",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )


def _parameters(config: SlurmConfig, name: str, at_once: int) -> dict[str, Any]:
    """Of submitit, which prefixes those that other schedulers do not have."""
    shared = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
    chosen = {
        key if key in shared else f"slurm_{key}": value
        for key, value in asdict(config).items()
        if value not in (None, [])
    }
    if config.cpus_per_task is not None:
        # srun does not take it over from sbatch, since Slurm 22.05.
        chosen["slurm_srun_args"] = [f"--cpus-per-task={config.cpus_per_task}"]
    return chosen | {
        "name": name,
        "slurm_array_parallelism": at_once,
        "slurm_additional_parameters": {"requeue": True, **config.additional_parameters},
    }


def _parse_states(listing: str) -> dict[str, State]:
    """States of jobs in squeue's list: a job's id and Slurm's word for its state on each line."""
    running = ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT")
    pairs = [line.split() for line in listing.splitlines() if line.strip()]
    return {job: State.RUNNING if state in running else State.QUEUED for job, state in pairs}


def _read_jobs(path: Path) -> dict[str, str]:
    try:
        jobs: Mapping[str, str] = json.loads(path.read_text())
        return dict(jobs)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); cancel the study's jobs and delete it"
        ) from error
