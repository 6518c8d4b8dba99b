"""Runs stopped at random moments end as one that was left alone, bit for bit.

What is compared: weights, their average, optimizer, schedule, the loops' counters, the position in
the data, the best score, the best checkpoint and all that was logged. Random numbers need no state:
they are functions of seed and step.

More kills than by default, and other moments: KILLS=100 SEED=7 python -m pytest -m slow FILE
"""

import json
import os
import resource
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import kill_run
import numpy as np
import pytest
import torch

from act_lightning.main import main

PREEMPTED = 75
KILLS = int(os.environ.get("KILLS", "0"))
SEED = int(os.environ.get("SEED", "0"))
STEPS = 40
EVERY = {"train/loss": 3, "val/l1_prior": 10}
"""Steps between two values of what a run logs."""
BASE = [f"--config={kill_run.ROOT / 'experiments/base.yaml'}", "--experiment=kills", "--run=run"]
WORLD = [
    *("--env.task=act_lightning/Detour-v0", "--env.observation_keys={qpos: time}"),
    *(
        "--env.env_state=false",
        "--env.max_episode_steps=20",
        "--env.make_kwargs={num_obstacles: 1}",
    ),
    *("--demonstrations.episodes=8", "--demonstrations.expert.style=style"),
]
TRAINING = [
    *("--data.batch_size=8", "--data.val_fraction=0.25"),
    *("--model.net.chunk_size=4", "--model.net.dim_model=16", "--model.net.num_heads=2"),
    *("--model.net.dim_feedforward=32", "--model.net.num_obs_layers=1"),
    *("--model.net.dropout=0.1", "--model.augment.qpos_noise=0.05"),
    *("--model.optimizer.warmup_steps=5", "--model.optimizer.schedule=cosine"),
    *("--rollout.executions={chunked: {n_action_steps: null}}", "--rollout.num_workers=1"),
    "--rollout.final_media=false",
    *("--trainer.accelerator=cpu", "--trainer.precision=32-true"),
    f"--trainer.log_every_n_steps={EVERY['train/loss']}",
    *(f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={EVERY['val/l1_prior']}"),
]
ROLLOUTS = ["--rollout.episodes=2", "--rollout.final_episodes=2"]
NO_ROLLOUTS = ["--rollout.episodes=0", "--rollout.final_episodes=0"]
AVERAGE = [
    "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.EMAWeightAveraging, "
    "init_args: {decay: 0.9}}"
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training, and by how many ranks."""

    ranks: int
    arguments: tuple[str, ...]
    by_lightning: bool = False

    def start(self, starter, folder):
        world = [f"--demonstrations.path={folder.parent / 'data.zarr'}"]
        devices = [f"--trainer.devices={self.ranks}"]
        arguments = ["fit", *BASE, *WORLD, *TRAINING, *self.arguments, *world, *devices]
        arguments.append("--ckpt_path=last")
        folder.mkdir(exist_ok=True)
        if self.by_lightning:
            return kill_run.Launched(folder, arguments, folder / "output.txt")
        return starter.start(folder, arguments, self.ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    arguments = [*BASE, *WORLD, f"--demonstrations.path={folder / 'data.zarr'}"]
    assert main(["record", *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def starter():
    with kill_run.Starter() as starter:
        yield starter


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that a run takes."""

    start: float
    """From its start to the first step."""
    steps: float
    """From there to its end."""

    def draw(self, rng, folder):
        """Seconds of start-up after which to end a run, or None, and of training: a random moment.

        One in four is in the start-up; training takes as long as the steps that are left, and the
        last part of the time is grading.
        """
        if rng.random() < 0.25:
            return rng.uniform(0, self.start), 0.0
        last = folder / "runs/kills/run/checkpoints/last.ckpt"
        done = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        return None, rng.uniform(0, 0.7 * self.steps * (1 - done / STEPS) + 0.3)


def finish(case, starter, folder):
    """Goes on until the run has ended by itself; returns what it left, and its pace."""
    moments = [time.monotonic()]
    run = case.start(starter, folder)
    wait_for_steps(run)
    moments.append(time.monotonic())
    codes = kill_run.end(run, 120)
    moments.append(time.monotonic())
    assert codes == [0] * len(codes), run.output()
    left = kill_run.read_run(folder / "runs/kills/run")
    return left, Pace(start=moments[1] - moments[0], steps=moments[2] - moments[1])


def wait_for_steps(run):
    """Until training begins, or the run has ended."""
    while "a step: " not in run.output() and None in run.poll():
        time.sleep(0.01)


# ---- ways to end a run; each says which exit code is right, and for which ranks ----------------


def sigterm_to_one(run, rng):
    rank = int(rng.integers(len(run.pids)))
    run.send(signal.SIGTERM, [run.pids[rank]])
    return PREEMPTED, [rank]


def sigterm_to_all(run, rng):
    run.send(signal.SIGTERM)
    return PREEMPTED, range(len(run.pids))


def sigusr1_to_all(run, rng):
    run.send(signal.SIGUSR1)
    return PREEMPTED, range(len(run.pids))


def ctrl_c(run, rng):
    run.send_to_group(signal.SIGINT)
    return 1, range(len(run.pids))


def kill_one(run, rng):
    rank = int(rng.integers(len(run.pids)))
    run.send(signal.SIGKILL, [run.pids[rank]])
    time.sleep(1.0)
    run.send(signal.SIGTERM)  # as torchrun does to the others
    return -signal.SIGKILL, [rank]


def kill_all(run, rng):
    run.send(signal.SIGKILL)
    return -signal.SIGKILL, range(len(run.pids))


def no_room(run, rng):
    """A limit on the size of files ends writing as a full disk does, and takes no root."""
    limit = int(rng.integers(10_000, 200_000))
    for pid in run.pids:
        with suppress(ProcessLookupError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
    return 1, [0]  # the rank that saves


WAYS = (
    sigterm_to_one,
    sigterm_to_all,
    sigusr1_to_all,
    ctrl_c,
    kill_one,
    kill_all,
    no_room,
)


def interrupt(case, starter, folder, way, pace, rng):
    """Starts a run and ends it in a way at a random moment.

    Returns:
        Whether it was still running then.
    """
    start_up, training = pace.draw(rng, folder)
    run = case.start(starter, folder)
    if start_up is None:
        wait_for_steps(run)
    time.sleep(training if start_up is None else start_up)
    run.find_ranks()
    if None not in run.poll():
        return False
    code, ranks = way(run, rng)
    codes = kill_run.end(run, 90)
    after = f"{training:.2f} s of training" if start_up is None else f"{start_up:.2f} s"
    print(f"{way.__name__} of {list(ranks)} after {after}: {codes}")  # shown on failure
    assert_checkpoints_are_whole(folder)
    if has_finished(folder):
        return False
    assert {codes[rank] for rank in ranks} <= {code, kill_run.ENDED}, run.output()
    assert None not in codes, f"a rank hangs\n{run.output()}"
    assert 0 not in codes, run.output()
    return True


def has_finished(folder):
    """Whether there was nothing left to do, but to end the process."""
    record = folder / "runs/kills/run/run.json"
    return record.exists() and json.loads(record.read_text()).get("finished", False)


def assert_checkpoints_are_whole(folder):
    """Also in the midst of saving a file has its name only when it is complete."""
    for path in folder.rglob("*.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] > 0, path


def kill_often(case, starter, folder, ways, seed):
    """Ends runs in all these ways, and compares each that is complete with one left alone."""
    rng = np.random.default_rng([SEED, seed])
    straight, pace = finish(case, starter, folder / f"straight_{seed}")
    logged = {tag: [step for step, _ in straight["events"]["scalars", tag]] for tag in EVERY}
    assert logged == {tag: list(range(n, STEPS + 1, n)) for tag, n in EVERY.items()}
    waiting, number = list(ways), 0
    while waiting:
        number += 1
        place = folder / f"killed_{seed}_{number}"
        while waiting and interrupt(case, starter, place, waiting[0], pace, rng):
            waiting.pop(0)
        left, _ = finish(case, starter, place)
        assert kill_run.differences(left, straight) == []


def draw_ways(ways, count, seed):
    """Each way about equally often, in a random order."""
    count = KILLS or count
    return np.random.default_rng([SEED, seed]).permutation((ways * count)[:count]).tolist()


def test_one_rank_with_rollouts_and_averaged_weights(folder, starter):
    case = Case(ranks=1, arguments=(*ROLLOUTS, *AVERAGE))
    kill_often(case, starter, folder, draw_ways(WAYS, 12, seed=1), seed=1)


def test_two_ranks_as_torchrun_starts_them(folder, starter):
    case = Case(ranks=2, arguments=tuple(ROLLOUTS))
    kill_often(case, starter, folder, draw_ways(WAYS, 6, seed=2), seed=2)


def test_two_ranks_as_lightning_starts_them(folder, starter):
    case = Case(ranks=2, arguments=(*NO_ROLLOUTS, *AVERAGE), by_lightning=True)
    ways = (sigterm_to_all, kill_one, ctrl_c, sigterm_to_one, sigusr1_to_all, kill_all)
    kill_often(case, starter, folder, draw_ways(ways, 2, seed=3), seed=3)


def test_a_damaged_checkpoint_is_left_for_the_one_before(folder, starter):
    case = Case(ranks=1, arguments=(*NO_ROLLOUTS, *AVERAGE))
    rng = np.random.default_rng([SEED, 4])
    straight, pace = finish(case, starter, folder / "whole")
    place = folder / "damaged"
    checkpoints = place / "runs/kills/run/checkpoints"
    for _ in range(KILLS or 2):
        run = case.start(starter, place)
        while not (checkpoints / "previous.ckpt").exists():
            assert None in run.poll(), run.output()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, pace.steps / 4))
        kill_all(run, rng)
        kill_run.end(run, 10)
        last = checkpoints / "last.ckpt"
        os.truncate(last, int(rng.integers(0, last.stat().st_size)))
    left, _ = finish(case, starter, place)
    said = (place / "output.txt").read_text()
    assert "last.ckpt" in said, said
    assert "oing on from runs/kills/run/checkpoints/previous.ckpt" in said, said
    assert kill_run.differences(left, straight) == []


@contextmanager
def small_disk(path, size):
    """Mounts a disk of `size`, as `8m`."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path):
    """Writes a file until the disk is full."""
    with path.open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            return


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which takes root")
@pytest.mark.parametrize("for_good", [True, False])
def test_a_full_disk(folder, starter, for_good):
    """Until the run fails, or for a moment only, in which what is logged may be lost."""
    case = Case(ranks=1, arguments=(*NO_ROLLOUTS, *AVERAGE))
    rng = np.random.default_rng([SEED, 5, for_good])
    straight, pace = finish(case, starter, folder / f"roomy_{for_good}")
    place = folder / f"small_{for_good}"
    with small_disk(place, "10m"):
        for _ in range(KILLS or 2):
            run = case.start(starter, place)
            wait_for_steps(run)
            time.sleep(rng.uniform(0, 0.7) * pace.steps)
            fill(place / "ballast")
            if not for_good:
                time.sleep(rng.uniform(0, 0.3))
                (place / "ballast").unlink()
            codes = kill_run.end(run, 90)
            (place / "ballast").unlink(missing_ok=True)
            said = f"exit codes {codes}\n{run.output()}"
            print(said)
            assert codes in ([0], [1]), said
            assert not for_good or "No space left on device" in said or codes == [0], said
            assert_checkpoints_are_whole(place)
            if codes == [0]:
                break
        left, _ = finish(case, starter, place)
        assert kill_run.differences(left, straight) == []
