"""Runs killed with kill -9 at random moments see the batches of a run that was left alone.

Real processes run Lightning's fit (tests/resumable_run.py) and log a hash of every sample. At step
s all ranks together must have seen the samples at positions 8 s to 8 s + 8, each equal to the
uninterrupted run's, bit for bit, however many ranks and loader processes there were.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import resumable_run
import torch
from small_store import write_store
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.order import frames_of
from act_lightning.main import main

LENGTHS = (7, 9, 12, 1, 8, 11, 6, 10, 9, 13)
STEPS = 25
BATCH = 8

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(write_store(tmp_path_factory.mktemp("store") / "a.zarr", LENGTHS))


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """Folders of uninterrupted runs in this process, by sampling."""
    folders = {}
    for sampling in ("frame", "episode"):
        folders[sampling] = tmp_path_factory.mktemp(sampling)
        settings = {"max_steps": STEPS, "data": {"sampling": sampling, "prefetch": 0}}
        resumable_run.main(store, folders[sampling], settings)
    return folders


def read_log(folder):
    """(step, position, frames, hashes) of every batch of every rank; a killed run's too."""
    return [
        json.loads(line)
        for log in Path(folder).glob("rank*.log")
        for line in log.read_text().splitlines()
    ]


def samples_seen(folder):
    """Hash by position, and positions by step; fails if a position was seen with two hashes."""
    by_position, by_step = {}, {}
    for step, position, _, hashes in read_log(folder):
        for place, sample in enumerate(hashes, start=position):
            assert by_position.setdefault(place, sample) == sample
            by_step.setdefault(step, set()).add(place)
    return by_position, by_step


def assert_saw_the_same(folder, straight):
    by_position, by_step = samples_seen(folder)
    assert by_position == samples_seen(straight)[0]
    expected = {s: set(range(s * BATCH, (s + 1) * BATCH)) for s in range(STEPS)}
    assert by_step == expected


def run(store, folder, settings, kill_after=None):
    """Runs the program; kills all its processes when it has logged so many batches."""
    log = Path(folder, "rank0.log")
    before = len(log.read_text().splitlines()) if log.exists() else 0
    script = Path(__file__).with_name("resumable_run.py")
    process = subprocess.Popen(
        [sys.executable, script, store, folder, json.dumps({"max_steps": STEPS, **settings})],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(script.parents[1]), *sys.path]),
            "OMP_NUM_THREADS": "1",
        },
    )
    if kill_after is None:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    else:
        while not log.exists() or len(log.read_text().splitlines()) < before + kill_after:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        for child in family:
            # The other rank dies too; loader processes shall end by themselves.
            with suppress(psutil.NoSuchProcess):  # or a zombie
                if str(script) in child.cmdline() and child.name() != "pt_data_worker":
                    child.kill()
        process.communicate(timeout=20)
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive


@pytest.mark.parametrize("sampling", ["frame", "episode"])
def test_no_sample_is_repeated_or_dropped_in_a_pass(store, straight, sampling):
    data = ACTDataModule(path=store, batch_size=BATCH, chunk_size=3)
    seen = [frame for _, _, frames, _ in sorted(read_log(straight[sampling])) for frame in frames]
    assert len(seen) == STEPS * BATCH
    frames, samples = frames_of(data.store, data.train_episodes), seen
    if sampling == "episode":
        ends = data.store.episode_ends
        frames, samples = data.train_episodes, np.searchsorted(ends, seen, side="right").tolist()
    passes = len(samples) // len(frames)
    assert passes >= 2
    for start in range(0, passes * len(frames), len(frames)):
        assert sorted(samples[start : start + len(frames)]) == frames.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "workers", "start_method"),
    [
        ("frame", 0, "fork"),
        ("frame", 1, "forkserver"),
        ("frame", 2, "fork"),
        ("episode", 2, "fork"),
    ],
)
def test_a_killed_run_goes_on_exactly(store, straight, tmp_path, sampling, workers, start_method):
    rng = np.random.default_rng()
    data = {"sampling": sampling, "num_workers": workers, "start_method": start_method}
    settings = {"data": data, "pause": 0.05}
    kills = sorted(rng.integers(1, 12, 2).tolist())
    print("killed after batches", kills)  # shown if the test fails
    for kill in kills:
        run(store, tmp_path, settings, kill_after=kill)
        time.sleep(rng.uniform(0, 0.05))
    run(store, tmp_path, settings)
    assert_saw_the_same(tmp_path, straight[sampling])
    assert torch.equal(
        torch.load(tmp_path / "weight.pt"), torch.load(straight[sampling] / "weight.pt")
    )


DIES = """\
import os, sys
from act_lightning.callbacks import RolloutCallback
from act_lightning.main import main

plays = RolloutCallback.on_validation_epoch_start

def play(self, trainer, pl_module):
    if trainer.global_step == int(sys.argv[1]):
        os._exit(9)
    plays(self, trainer, pl_module)

RolloutCallback.on_validation_epoch_start = play
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_in_its_rollouts_makes_up_for_that_validation(tmp_path, monkeypatch):
    """Also in those after its last step, where Lightning would not start again."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    arguments = [
        f"--config={root / 'experiments/base.yaml'}",
        f"--config={root / 'experiments/multimodal/bc.yaml'}",
        *("--demonstrations.episodes=4", "--data.val_fraction=0.25", "--data.batch_size=8"),
        *(
            "--trainer.max_steps=4",
            "--trainer.val_check_interval=2",
            "--trainer.deterministic=true",
        ),
        *("--rollout.episodes=2", "--rollout.final_episodes=2", "--rollout.num_workers=1"),
        "--rollout.final_media=false",
    ]
    assert main(["record", *arguments]) == 0

    def fit(run, dies_at=0, *more):
        command = [sys.executable, "-c", DIES, str(dies_at), "fit", *arguments, f"--run={run}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        return subprocess.run([*command, *more], env=environment, timeout=300).returncode

    def left(run):
        folder = Path("runs/multimodal/bc", run)
        checkpoints = [
            torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
            for name in ("best", "last")
        ]
        scalars = EventAccumulator(str(folder)).Reload()
        return (
            [checkpoint["global_step"] for checkpoint in checkpoints],
            [checkpoint["state_dict"] for checkpoint in checkpoints],
            [checkpoint["optimizer_states"] for checkpoint in checkpoints],
            [
                [(event.step, event.value) for event in scalars.Scalars(tag)]
                for tag in ("val/l1_prior", "rollout/score", "val/modes/distance")
            ],
            json.loads((folder / "results.json").read_text())["worlds"],
        )

    assert fit("straight") == 0
    for step in (2, 4):
        run = f"killed_at_{step}"
        assert fit(run, step) == 9
        last = Path("runs/multimodal/bc", run, "checkpoints/last.ckpt")
        assert fit(run, 0, f"--ckpt_path={last}") == 0
        for ours, theirs in zip(left(run), left("straight"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
