"""Trainings on a real Slurm of two nodes: preempted, out of time, on a node that dies.

Whatever happens to a job, it ends with the weights, the optimizer's state and the logged values of
one that was left alone, bit for bit.
"""

import json
import os
import re
import shutil
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from small_slurm import SmallSlurm, call, why_not
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act_lightning.main import main
from act_lightning.study import slurm

ROOT = Path(__file__).parents[2]
STEPS = 30
# `debug` from object poses, so that nothing has to be drawn; its dropout draws random numbers.
CHANGES = {
    "env": {"cameras": []},
    "rollout": {"episodes": 0, "final_episodes": 0, "final_media": False, "num_workers": 1},
    "trainer": {
        "accelerator": "cpu",
        "precision": "32-true",
        "deterministic": True,
        "max_steps": STEPS,
        "val_check_interval": 10,
        "log_every_n_steps": 1,
        "callbacks": [{"class_path": "pace.Pace"}],
    },
}
TWO_NODES = ("--nodes=2", "--slurm", "timeout_min=10", "setup=['export MASTER_ADDR=127.0.0.1']")

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


@pytest.fixture(scope="module", autouse=True)
def project():
    """A checkout's experiments in a folder of their own, where the jobs run."""
    folder = Path(tempfile.mkdtemp(prefix="act_jobs_", dir="/tmp"))
    (folder / "experiments/studies").mkdir(parents=True)
    shutil.copy(ROOT / "experiments/base.yaml", folder / "experiments")
    settings = yaml.safe_load((ROOT / "experiments/debug.yaml").read_text())
    for name, changes in CHANGES.items():
        settings[name] = settings.get(name, {}) | changes
    (folder / "experiments/tiny.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TMPDIR", str(folder / "tmp"))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster():
    folder = tempfile.mkdtemp(prefix="act_slurm_", dir="/tmp")
    cluster = SmallSlurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def straight(cluster):
    """A job on two nodes that is left alone, and what it left."""
    job = submit("straight", *TWO_NODES)
    return job, let_finish(cluster, "straight", job)


@pytest.fixture(autouse=True)
def _show_logs(project):
    """What the jobs have printed, for a test that fails."""
    yield
    for log in sorted(project.glob("runs/*/slurm/*.log")):
        print(f"== {log.relative_to(project)}\n{log.read_text()}")


def submit(experiment, *options, pause=0.0):
    """Submits a training by the verb; returns its job."""
    Path("runs", experiment).mkdir(parents=True)
    Path("runs", experiment, "pause").write_text(str(pause))
    configs = ["--config=experiments/base.yaml", "--config=experiments/tiny.yaml"]
    with redirect_stdout(StringIO()) as printed:
        assert main(["slurm", *configs, f"--experiment={experiment}", *options]) == 0
    return re.search(r"as Slurm job (\d+)", printed.getvalue())[1]


def log_of(experiment, job):
    return Path("runs", experiment, "slurm", f"{job}.log")


def run_of(experiment, job):
    return Path("runs", experiment, f"job_{job}")


def let_finish(cluster, experiment, job):
    """Waits for a job's end, no longer slowed down; returns what it left."""
    Path("runs", experiment, "pause").write_text("0")
    assert end_of(cluster, job) == "COMPLETED"
    return left(run_of(experiment, job))


def end_of(cluster, job):
    """Waits for it; Slurm's word for how a job has ended."""
    states = ("PENDING", "RUNNING", "COMPLETING")
    cluster.until(lambda: cluster.job(job)["JobState"] not in states, 200)
    return cluster.job(job)["JobState"]


def wait_for_step(cluster, experiment, job, step):
    path = run_of(experiment, job) / "step"
    cluster.until(lambda: path.exists() and int(path.read_text() or 0) >= step, 200)


def left(run):
    """State of the end, and every loss by step."""
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == STEPS
    scalars = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    logged = {
        tag: [(event.step, event.value) for event in scalars.Scalars(tag)]
        for tag in scalars.Tags()["scalars"]
        if tag.startswith(("train/l", "val/"))
    }
    assert len(logged["train/loss"]) == STEPS
    return {
        "weights": state["state_dict"],
        "optimizer": state["optimizer_states"],
        "schedule": state["lr_schedulers"],
        "logged": logged,
    }


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_training_on_two_nodes(straight):
    job, _ = straight
    record = json.loads((run_of("straight", job) / "run.json").read_text())
    assert record["finished"]
    log = log_of("straight", job).read_text()
    assert "8 samples = 2 ranks x 4" in log


def test_a_requeued_job_goes_on_exactly(cluster, straight):
    job = submit("requeued", *TWO_NODES, pause=0.2)
    wait_for_step(cluster, "requeued", job, 12)
    call("scontrol", "requeue", job)
    cluster.until(lambda: cluster.job(job)["JobState"] == "PENDING")
    assert_equal(let_finish(cluster, "requeued", job), straight[1])
    assert cluster.job(job)["Restarts"] == "1"


def test_a_job_whose_node_dies_goes_on_exactly(cluster, straight):
    job = submit("orphaned", *TWO_NODES, pause=0.2)
    wait_for_step(cluster, "orphaned", job, 12)
    cluster.kill_node("n2")
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 200)
    cluster.start_node("n2")
    assert_equal(let_finish(cluster, "orphaned", job), straight[1])


def test_a_job_that_fails_is_not_requeued(cluster):
    job = submit("failed", *TWO_NODES, "--data.batch_size=7")
    assert end_of(cluster, job) == "FAILED"
    assert cluster.job(job)["Restarts"] == "0"
    assert "data.batch_size=7 cannot be divided" in log_of("failed", job).read_text()


def test_a_job_out_of_time_goes_on_beside_a_sweep(cluster, monkeypatch):
    """A node each; their runs of the same seed end alike."""
    options = ("timeout_min=10", "signal_delay_s=90", "--seed_everything=1")
    job = submit("late", "--slurm", *options, pause=2.0)
    wait_for_step(cluster, "late", job, 2)
    leave_two_minutes(cluster, job)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 90)
    assert "task 0: Exited with exit code 75" in log_of("late", job).read_text()
    call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    Path("runs/late/pause").write_text("0")
    study = {
        "title": "Tiny",
        "question": "Does it run?",
        "experiment": "tiny",
        "settings": {"rollout.final_episodes": 1},
        "seeds": [0, 1],
    }
    Path("experiments/studies/tiny.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setattr(slurm, "ASK_S", 1.0)
    command = ["sweep", "experiments/studies/tiny.yaml", "--slurm", "timeout_min=10"]
    assert main(command) == 0
    assert len(list(Path("runs/studies/tiny/all").glob("seed_?/results.json"))) == 2
    swept = left(Path("runs/studies/tiny/all/seed_1"))
    assert_equal(let_finish(cluster, "late", job), swept)
    assert cluster.job(job)["Restarts"] == "1"


def leave_two_minutes(cluster, job):
    """Leaves a job 60 to 120 s. Slurm looks every 30 s who has less than 90 at its next look."""
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    end = (3600 * hours + 60 * minutes + seconds + 60) // 60 + 1
    call("scontrol", "update", f"JobId={job}", f"TimeLimit={end}")
