"""The number of ranks and nodes changes nothing: losses, validation, rollouts, whatever they meet.

Real processes train with the verb `fit`: one; two on this machine, the second started by Lightning;
and two agents of torchrun, a node each, that meet over the loopback.

Ranks add up in another order, so the last digits differ; where the loss has a kink, as at an error
of 0, that grows: `insertion_state` as shipped is 5e-4 apart after 50 steps (LOG.md).
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act_lightning.main import main

ROOT = Path(__file__).parents[1]
STEPS = 50
ARGUMENTS = [
    f"--config={ROOT / 'experiments/base.yaml'}",
    f"--config={ROOT / 'experiments/multimodal/act.yaml'}",
    "--experiment=ranks",
    *("--demonstrations.episodes=9", "--data.val_fraction=0.34", "--data.max_val_frames=31"),
    # Chunks near the end of an episode are padded, so ranks have different numbers of actions.
    *("--data.batch_size=24", "--model.augment.qpos_noise=0.02", "--model.net.free_bits=0.01"),
    "--model.optimizer.warmup_steps=200",
    *(f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=25"),
    *("--trainer.log_every_n_steps=1", "--trainer.precision=32-true", "--trainer.accelerator=cpu"),
    *("--rollout.episodes=5", "--rollout.final_episodes=5", "--rollout.num_workers=1"),
    "--rollout.final_media=false",
]
TIMES = ("train/data_wait", "rollout/seconds", "rollout/share")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with demonstrations, which this process is in."""
    folder = tmp_path_factory.mktemp("project")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["record", *ARGUMENTS]) == 0
        yield folder
    finally:
        os.chdir(before)


def start(launcher, run, *more):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "act_lightning", "fit", *ARGUMENTS, f"--run={run}", *more]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def left(run, processes):
    """Curves and episodes of a run, when its processes have ended."""
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    folder = Path("runs/ranks", run)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag not in TIMES
    }
    worlds = [
        {name: episode[name] for name in ("success", "steps", "max_reward")}
        | {"path_length": episode["smoothness"]["path_length"]}
        for world in json.loads((folder / "results.json").read_text())["worlds"]
        for episode in [world["chunked"]]
    ]
    return curves, worlds, "".join(outputs)


@pytest.fixture(scope="module")
def alone(project):
    return left("alone", [start([sys.executable, "-m"], "alone")])


def assert_same(ours, theirs):
    curves, worlds, output = ours
    assert re.search(r"a step: 24 samples = 2 ranks x 12; learning rate", output)
    assert curves.keys() == theirs[0].keys()
    assert [step for step, _ in curves["train/loss"]] == list(range(1, STEPS + 1))
    for tag, curve in curves.items():
        expected = theirs[0][tag]
        assert [step for step, _ in curve] == [step for step, _ in expected]
        values = [value for _, value in expected]
        assert [value for _, value in curve] == pytest.approx(values, rel=1e-5, abs=1e-7), tag
    for episode, expected in zip(worlds, theirs[1], strict=True):
        assert episode == expected | {
            "path_length": pytest.approx(expected["path_length"], rel=1e-4)
        }


def test_two_ranks(alone):
    assert_same(left("two", [start([sys.executable, "-m"], "two", "--trainer.devices=2")]), alone)


def test_two_nodes(alone):
    """Of which neither is told how many ranks there are: torchrun says it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=nodes"]
    launcher += ["-m", "--"]
    assert_same(left("nodes", [start(launcher, "nodes") for _ in range(2)]), alone)
