"""The same command twice gives the same numbers, bit for bit, with `trainer.deterministic=true`."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawing import has_opengl

from act_lightning.study.events import RunEvents

ROOT = Path(__file__).parent.parent
TIMES = {"train/data_wait", "rollout/seconds", "rollout/share"}
"""Scalars that are measured times."""
TINY = [
    "--demonstrations.path=data.zarr",
    "--data.val_fraction=0.5",
    "--trainer.accelerator=cpu",
    "--trainer.deterministic=true",
    "--trainer.max_steps=6",
    "--trainer.val_check_interval=3",
    "--trainer.log_every_n_steps=1",
    "--rollout.episodes=1",
    "--rollout.final_episodes=2",
    "--rollout.num_workers=1",
    "--rollout.final_media=false",
    "--seed_everything=3",
]
DEBUG = [
    f"--config={ROOT / 'experiments/base.yaml'}",
    f"--config={ROOT / 'experiments/debug.yaml'}",
    "--demonstrations.episodes=2",
]
AUGMENT = "{crop: 0.9, brightness: 0.2, contrast: 0.2, saturation: 0.2, hue: 0.1}"
PIXELS = ["--env.cameras=[top]", "--env.env_state=false", f"--model.augment={AUGMENT}"]
CASES = {
    "poses": [*DEBUG, "--env.cameras=[]", "--model.augment.qpos_noise=0.1"],
    "camera": [*DEBUG, *PIXELS],
}


def act_lightning(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "act_lightning", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


def tensors(entry, name=""):
    """All tensors of a checkpoint, and whatever else it holds, by place."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield from tensors(value, f"{name}.{key}")
    elif isinstance(entry, list | tuple):
        for i, value in enumerate(entry):
            yield from tensors(value, f"{name}.{i}")
    else:
        yield name, entry


def assert_same_runs(first, second):
    for name in ("best", "last"):
        one, other = (
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
            for run in (first, second)
        )
        compared = 0
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            left, right = dict(tensors(one[part])), dict(tensors(other[part]))
            assert left.keys() == right.keys()
            for key, value in left.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, right[key]), (name, part, key)
                    compared += value.numel()
                else:
                    assert value == right[key], (name, part, key)
        assert compared > 1000
    scalars = [read_scalars(run) for run in (first, second)]
    assert scalars[0].keys() == scalars[1].keys()
    for tag, series in scalars[0].items():
        assert series.steps.tolist() == scalars[1][tag].steps.tolist(), tag
        assert series.values.tolist() == scalars[1][tag].values.tolist(), tag
    results = [json.loads((run / "results.json").read_text()) for run in (first, second)]
    for name in ("worlds", "execution", "prediction", "step"):
        assert results[0][name] == results[1][name]
    assert results[0].get("latent") == results[1].get("latent")


def read_scalars(run):
    events = RunEvents(run)
    events.reload()
    kept = {tag: series for tag, series in events.scalars.items() if tag not in TIMES}
    assert {"train/loss", "val/l1_prior", "rollout/success_rate"} <= kept.keys()
    return kept


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", CASES)
def test_the_same_command_twice_gives_the_same_numbers(tmp_path, case):
    """So do the command and the configuration that a run keeps, in folders of their own."""
    if case == "camera" and not has_opengl():
        pytest.skip("needs OpenGL")
    arguments = [*CASES[case], *TINY]
    folders = [tmp_path / name for name in ("first", "second", "command", "configuration")]
    for folder in folders:
        folder.mkdir()
    act_lightning(folders[0], "record", *arguments)
    for folder in folders[1:]:
        (folder / "data.zarr").symlink_to(folders[0] / "data.zarr")
    act_lightning(folders[0], "fit", *arguments, "--experiment=x")
    first = folders[0] / "runs/x/version_0"
    act_lightning(folders[1], "fit", *arguments, "--experiment=x")
    assert_same_runs(first, folders[1] / "runs/x/version_0")
    if case != "poses":
        return
    command = shlex.split(json.loads((first / "run.json").read_text())["command"])
    assert command[:3] == ["python", "-m", "act_lightning"]
    act_lightning(folders[2], *command[3:])
    assert_same_runs(first, folders[2] / "runs/x/version_0")
    act_lightning(folders[3], "fit", f"--config={first / 'config.yaml'}")
    assert_same_runs(first, folders[3] / "runs/x/version_0")
