"""The verb `slurm`: its batch script, what the script does about steps that fail, and submitting.

The script is run by bash, with programs in the place of Slurm's; tests/cluster has the real ones.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from act_lightning.main import main
from act_lightning.slurm_config import SlurmConfig
from act_lightning.slurm_job import MAX_REQUEUES, SlurmJob, submit

# Each call is a line of its arguments; ends as `codes` says for what it starts.
SRUN = """\
#!/bin/sh
printf '%s\\n' "$*" >> calls
case "$*" in
    *" record "*) exit $(cat record 2>/dev/null || echo 0) ;;
    *" fit "*) exit $(cat fit 2>/dev/null || echo 0) ;;
    *" true") exit $(cat nodes 2>/dev/null || echo 0) ;;
esac
"""
EXPERIMENT = ("--config", "experiments/base.yaml", "--config", "experiments/debug.yaml")


def make_job(**changes):
    given = {
        "experiment": "paper/tiny",
        "demonstrations": "data/a b.zarr",
        "settings": ("--config=experiments/base.yaml",),
        "config": SlurmConfig(),
    }
    return SlurmJob(**given | changes)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with programs in the place of Slurm's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    add_program("srun", SRUN)
    add_program("squeue", "#!/bin/sh\n")
    add_program("scontrol", "#!/bin/sh\necho scontrol $* >> calls\n")
    return tmp_path


def add_program(name, text):
    path = Path("bin", name)
    path.write_text(text)
    path.chmod(0o755)


def run_script(job, **variables):
    """Exit code of the script, and the calls of Slurm's programs."""
    done = ended_script(job, **variables)
    return done.returncode, Path("calls").read_text().splitlines()


def ended_script(job, **variables):
    Path("calls").write_text("")
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "16"} | variables
    script = job.script()
    return subprocess.run(
        ["bash"], input=script, text=True, env=environment, stderr=subprocess.PIPE, check=False
    )


def options_of(script):
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [shlex.split(line)[1] for line in lines]


def test_the_script_asks_for_what_is_configured(project):
    config = SlurmConfig(
        partition="gpu",
        gpus_per_node=8,
        cpus_per_task=4,
        mem_gb=1.5,
        timeout_min=60,
        setup=["module load cuda"],
        additional_parameters={"reservation": "mine", "exclusive": True, "mail_type": "END"},
    )
    job = make_job(config=config, nodes=4, seeds="0-4")
    script = job.script()
    assert options_of(script) == [
        "--job-name=paper-tiny",
        f"--chdir={project}",
        "--output=runs/paper/tiny/slurm/%A_%a.log",
        "--open-mode=append",
        "--requeue",
        "--signal=USR1@120",
        "--time=60",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=4",
        "--mem=1536M",
        "--array=0-4",
        "--partition=gpu",
        "--reservation=mine",
        "--exclusive",
        "--mail-type=END",
    ]
    assert "\nmodule load cuda\n" in script
    assert "OMP_NUM_THREADS=4" in script


def test_without_gpus_nothing_is_asked_of_them(project):
    options = options_of(make_job().script())
    assert not [option for option in options if option.startswith(("--gpu", "--array"))]
    assert "--ntasks-per-node=1" in options
    assert "--ntasks-per-node=3" in options_of(make_job(tasks_per_node=3).script())
    assert "--output=runs/paper/tiny/slurm/%j.log" in options


def test_a_job_records_then_trains(project):
    job = make_job(settings=("--config=a b.yaml", "--model.x=$HOME"), cache="/disk/$SLURM_JOB_ID")
    code, calls = run_script(job)
    assert code == 0
    common = f"{sys.executable} -m act_lightning {{}} --config=a b.yaml --model.x=$HOME"
    assert calls == [
        "--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=16 flock data/a b.zarr.recording "
        + common.format("record"),
        "--kill-on-bad-exit=0 --wait=20 "
        + common.format("fit")
        + " --run=job_7 --data.mirror.directory=/disk/7 --ckpt_path=last",
    ]
    assert Path("data").is_dir()


def test_jobs_at_once_record_one_after_the_other(project, monkeypatch):
    add_program("python", "#!/bin/sh\nmkdir recording && sleep 0.3 && rmdir recording && exit 75\n")
    monkeypatch.setattr(sys, "executable", str(project / "bin/python"))
    add_program("srun", '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\n"$@"\n')
    script, environment = make_job().script(), os.environ | {"SLURM_CPUS_ON_NODE": "1"}
    jobs = [
        subprocess.Popen(["bash", "-c", script], env=environment | {"SLURM_JOB_ID": number})
        for number in ("1", "2", "3")
    ]
    assert [job.wait(10) for job in jobs] == [75, 75, 75]
    assert len(Path("calls").read_text().splitlines()) == 3


def test_each_seed_is_a_run(project):
    variables = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    _, calls = run_script(make_job(seeds="0,3", cache=None), **variables)
    assert calls[1].endswith("base.yaml --run=job_5_seed_3 --seed_everything=3 --ckpt_path=last")


def test_the_cache_is_on_the_nodes_own_disk(project):
    variables = {"TMPDIR": "/tmp/mine"}
    _, calls = run_script(make_job(), **variables)
    assert "--data.mirror.directory=/tmp/mine/act_lightning_" in calls[1]
    _, calls = run_script(make_job(), SLURM_TMPDIR="/scratch/7", **variables)
    assert "--data.mirror.directory=/scratch/7/act_lightning_" in calls[1]


def test_an_object_store_is_not_recorded(project):
    _, calls = run_script(make_job(demonstrations="s3://demos/a.zarr"))
    assert len(calls) == 1
    assert " fit " in calls[0]


@pytest.mark.parametrize("step", ["record", "fit"])
@pytest.mark.parametrize("code", [75, 138, 143])
def test_a_step_that_was_told_to_stop_is_requeued_once(project, step, code):
    Path(step).write_text(str(code))
    assert run_script(make_job())[0] == code
    calls = Path("calls").read_text().splitlines()
    assert len(calls) == {"record": 2, "fit": 3}[step]
    assert calls[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_job_that_fails_is_not_requeued(project, code):
    Path("fit").write_text(str(code))
    returned, calls = run_script(make_job())
    assert returned == code
    assert calls[2:] == ["--ntasks-per-node=1 true"]


def test_a_failure_is_forgiven_where_a_node_does_not_answer(project):
    Path("fit").write_text("1")
    Path("nodes").write_text("1")
    assert run_script(make_job())[1][2:] == ["--ntasks-per-node=1 true", "scontrol requeue 7"]


@pytest.mark.parametrize(("fit", "nodes"), [("75", "0"), ("1", "1")])
def test_a_job_is_not_requeued_for_ever(project, fit, nodes):
    Path("fit").write_text(fit)
    Path("nodes").write_text(nodes)
    for count, requeued in ((MAX_REQUEUES - 1, True), (MAX_REQUEUES, False)):
        done = ended_script(make_job(), SLURM_RESTART_COUNT=str(count))
        assert done.returncode == int(fit)
        assert ("scontrol requeue 7" in Path("calls").read_text()) == requeued
        assert ("error: not requeued" in done.stderr) != requeued


def test_a_setup_that_fails_is_an_error(project):
    add_program("module", "#!/bin/sh\nexit 3\n")
    config = SlurmConfig(setup=["module load cuda", ': "$UNSET"'])
    code, calls = run_script(make_job(config=config))
    assert (code, calls) == (3, [])
    add_program("module", "#!/bin/sh\n")
    assert run_script(make_job(config=config))[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes=0; give 1 or more"),
        ({"tasks_per_node": 0}, "--tasks-per-node=0; give 1 or more"),
        ({"seeds": "0:4"}, "--seeds=0:4; give seeds as 0-4"),
        ({"seeds": "0-4\n#SBATCH --x"}, "give seeds as 0-4"),
        ({"settings": ("--run=a",)}, "--run is for the script to set"),
        ({"settings": ("--ckpt_path=last",)}, "--ckpt_path is for the script"),
        ({"settings": ("--trainer.devices=2",)}, "leave it out; give --slurm gpus_per_node"),
        ({"settings": ("--trainer.num_nodes=2",)}, "leave it out; give --nodes"),
        ({"seeds": "0", "settings": ("--seed_everything=1",)}, "--seed_everything is for"),
        ({"settings": ("--data.mirror.directory=/a",)}, "leave it out; give --cache"),
    ],
)
def test_what_a_job_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        make_job(**changes)


def test_a_dry_run_needs_no_slurm(project, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("PATH", str(project))
    options = ["--nodes", "2", "--slurm", "gpus_per_node=8", "--slurm", "partition=a"]
    arguments = [*EXPERIMENT, *options, "--trainer.max_steps", "10", "--env.cameras=[]"]
    assert main(["slurm", *arguments, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert script.startswith(
        "#!/usr/bin/env bash\n# debug: one training; nodes: 2, tasks on each: 8."
    )
    assert "#SBATCH --partition=a\n" in script
    assert "    --trainer.max_steps=10\n    '--env.cameras=[]'\n" in script
    assert main(["slurm", *arguments]) == 1
    assert "error: sbatch is not found here; call slurm where jobs are" in capsys.readouterr().err


def test_a_wrong_setting_is_told_before_the_job_waits(project, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit, match="2"):
        main(["slurm", *EXPERIMENT, "--trainer.max_stepz=10", "--dry-run"])
    assert "max_stepz" in capsys.readouterr().err
    assert main(["slurm", *EXPERIMENT, "--dry-run", "--slurm", "partitoin=a"]) == 1
    assert "give key=value, with a key of partition" in capsys.readouterr().err


def test_a_job_is_written_and_submitted(project, capsys):
    add_program("sbatch", '#!/bin/sh\necho "$*" > submitted\necho "12;cluster"\n')
    job = make_job(seeds="0-1")
    assert submit(job) == "12"
    path = Path(Path("submitted").read_text().split()[-1])
    assert path.parent == Path("runs/paper/tiny/slurm")
    assert path.read_text() == job.script()
    assert "as Slurm job 12; it prints to runs/paper/tiny/slurm/12_*.log" in capsys.readouterr().out
    add_program("sbatch", "#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match=r"sbatch refused runs/.*\.sbatch: invalid partition"):
        submit(job)
