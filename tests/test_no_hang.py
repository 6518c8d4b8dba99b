"""Whatever one of two ranks fails of, both end soon, and what it failed of is told first.

Real processes train over gloo on a CPU (tests/failing_rank.py), started in all the ways in which a
user would.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from act_lightning.main import main

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("failing_rank.py")
LONGEST_S = 60
"""In which a job has to end when one of its ranks has failed."""
DATA = "data/multimodal.zarr"
TELLS = re.compile(r"error|stopped|Traceback|Child process|RuntimeError|Failed|Killed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where there are demonstrations."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["record", *arguments()]) == 0
    return folder


def arguments():
    """Four steps of a small network, with a validation in their midst."""
    return [
        f"--config={ROOT / 'experiments/base.yaml'}",
        f"--config={ROOT / 'experiments/multimodal/bc.yaml'}",
        *("--demonstrations.episodes=4", "--data.val_fraction=0.25", "--data.batch_size=8"),
        *("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"),
        *("--rollout.episodes=2", "--rollout.final_episodes=2", "--rollout.num_workers=1"),
        "--rollout.final_media=false",
    ]


class Job:
    """Two ranks that ended.

    Attributes:
        code: exit code of what was started.
        told: lines of its output that tell of an end.
    """

    def __init__(self, folder, *commands):
        failed = folder / "failed"
        failed.unlink(missing_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        with (folder / "output").open("w+") as output:
            started = [
                psutil.Popen(
                    [sys.executable, *map(str, command)],
                    cwd=folder,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for command in commands
            ]
            family = set()
            try:
                while any(process.poll() is None for process in started):
                    for process in started:
                        family |= _family(process)
                    if failed.exists():
                        assert time.time() - failed.stat().st_mtime < LONGEST_S
                    time.sleep(0.1)
                _, left = psutil.wait_procs(family, timeout=15)
                assert not left
                # A rank that never starts may be given up before it comes that far.
                assert failed.exists() or "start" in commands[0]
            finally:
                for process in {*started, *family}:
                    if process.is_running():
                        process.kill()
                output.seek(0)
                text = output.read()
                print(text)  # shown if the test fails
        self.code = started[0].returncode
        self.codes = [process.returncode for process in started]
        self.told = [line for line in text.splitlines() if TELLS.search(line)]


def _family(process):
    try:
        return set(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def local(folder, place, kind, rank, *more):
    """A job that the first rank starts."""
    command = [SCRIPT, place, kind, rank, "fit", *arguments(), "--trainer.devices=2", *more]
    return Job(folder, command)


@pytest.mark.parametrize(
    ("place", "rank", "kind"),
    [
        ("model", 1, "error"),
        ("simulator", 1, "error"),
        ("step", 1, "fault"),
        ("rollout", 0, "error"),
        ("evaluation", 1, "fault"),
    ],
)
def test_an_error_on_one_rank_ends_all(folder, place, rank, kind):
    job = local(folder, place, kind, rank)
    message = rf"error on rank {rank} of 2 \(\S+\): '?nothing goes in {place}"
    assert job.code != 0
    assert re.match(message, job.told[0])
    assert (job.told[1:2] == ["Traceback (most recent call last):"]) == (kind == "fault")


def test_demonstrations_that_one_rank_does_not_find(folder):
    job = local(folder, "files", "", 1, f"--demonstrations.path={DATA}")
    assert job.code != 0
    assert re.match(rf"error on rank 1 of 2 \(\S+\): .*{DATA}", job.told[0])


def test_a_checkpoint_that_one_rank_does_not_find(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["fit", *arguments(), "--run=done", "--trainer.max_steps=2"]) == 0
    checkpoint = "runs/multimodal/bc/done/checkpoints/best.ckpt"
    data = f"--demonstrations.path={folder / DATA}"
    job = local(folder, "files", "", 1, data, f"--ckpt_path={checkpoint}")
    assert job.code != 0
    assert re.match(rf"error on rank 1 of 2 \(\S+\): .*{checkpoint}", job.told[0])


def test_a_killed_rank_ends_the_others(folder):
    job = local(folder, "step", "kill", 1)
    assert job.code != 0
    assert re.match(
        r"rank 0 of 2 \(\S+\) stopped, because another rank ended|\[rank: 1\] Child", job.told[0]
    )


def test_no_rank_outlives_the_one_that_started_it(folder):
    assert local(folder, "step", "orphan", 0).code == -signal.SIGKILL


def test_a_rank_that_never_starts(folder):
    job = local(folder, "start", "sleep", 1, "--launch.start_timeout_s=5")
    assert job.code == 1
    assert re.match(r"error: not all of 2 ranks met at \S+ within 5 s", job.told[0])


def test_a_rank_that_never_comes_to_the_end_of_a_step(folder):
    job = local(folder, "step", "sleep", 1, "--launch.timeout_min=0.25")
    assert job.code == 1
    assert re.match(r"error on rank 0 of 2 \(\S+\): another rank did not come", job.told[0])


def torchrun(folder, *command):
    """A job of two nodes, whose ranks torchrun starts; without `--` it takes --run for its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = ["--nnodes=2", "--nproc-per-node=1", f"--master-port={port}"]
    options += ["--master-addr=127.0.0.1"]
    return Job(
        folder,
        *(
            ["-m", "torch.distributed.run", f"--node-rank={node}", *options, *command]
            for node in (0, 1)
        ),
    )


def test_ranks_of_torchrun_end_too(folder):
    job = torchrun(folder, SCRIPT, "step", "error", 1, "fit", *arguments())
    assert 0 not in job.codes
    assert re.match(r"error on rank 1 of 2 \(\S+\): nothing goes in step", job.told[0])
