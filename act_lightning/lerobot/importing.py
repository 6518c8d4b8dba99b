"""`import_lerobot`: a run of ours from a policy folder of LeRobot's ACT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from act_lightning.batch import DataSpec
from act_lightning.checkpoint import AtomicCheckpointIO
from act_lightning.execution import ExecutionConfig
from act_lightning.lerobot.folder import CONFIG, MODEL, read_json, read_tensors
from act_lightning.lerobot.names import POSITIONS, from_lerobot
from act_lightning.lerobot.new_folder import new_folder
from act_lightning.lerobot.normalization import BUFFERS, read_normalization, read_stats
from act_lightning.lerobot.settings import read_config, read_spec
from act_lightning.nets.act import ACT
from act_lightning.nets.transformer import sinusoid_table
from act_lightning.policy import bare_checkpoint
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.env import data_spec


def import_lerobot(
    folder: Path,
    run: Path,
    *,
    task: str | None = None,
    fps: float | None = None,
    env: EnvConfig | None = None,
    executions: Mapping[str, ExecutionConfig] | None = None,
) -> Path:
    """Makes a run of ours from a LeRobot policy.

    `Policy.from_checkpoint` opens the result. Where the world is given, `act_lightning evaluate`
    plays it, in the given ways of executing and in the policy's own, called `lerobot`.

    Args:
        folder: what `ACTPolicy.save_pretrained` and its processors' `save_pretrained` wrote.
        run: folder to make; it must not exist.
        task: name of the task, which LeRobot's files do not say; default the environment's.
        fps: control steps a second, likewise.
        env: the world to play in.
        executions: ways of executing a chunk, by name.

    Returns:
        Path of the checkpoint.

    Raises:
        FileExistsError: there is something in `run`.
        FileNotFoundError: a file is missing in `folder`.
        ValueError: it is no ACT, or one that ours cannot be; a statistic is missing; a shape does
            not fit; the environment does not fit the policy.
    """
    world = data_spec(env) if env else None
    if world:
        task, fps = task or world.task, fps or world.fps
    if not task or not fps:
        raise ValueError(
            f"task={task}, fps={fps}: {folder / CONFIG} says neither; give both "
            "(--task, --fps), or the configuration of an environment (--config)"
        )
    net = read_policy(folder, task, fps)
    if world:
        check_world(net.spec, world)
    with new_folder(run) as part:
        checkpoint = part / "checkpoints" / "best.ckpt"
        checkpoint.parent.mkdir()
        AtomicCheckpointIO().save_checkpoint(bare_checkpoint(net), checkpoint)
        if env:
            own = read_execution(read_json(folder / CONFIG))
            settings = world_settings(env, {**(executions or {}), "lerobot": own})
            (part / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return run / "checkpoints" / "best.ckpt"


def read_policy(folder: Path, task: str, fps: float) -> ACT:
    """Builds our network from a LeRobot policy's folder; arguments and errors as above."""
    path = folder / CONFIG
    settings = read_json(path)
    config = read_config(settings, path)
    spec = read_spec(settings, path, task, fps)
    tensors = read_tensors(folder / MODEL)
    inputs, outputs = read_normalization(folder, settings, tensors)
    sizes = (spec.dim_qpos, spec.dim_action, spec.dim_env_state)
    stats, images = read_stats(inputs, outputs, settings, path, sizes)
    net = ACT(config, spec, stats, pretrained=False)
    if images:
        net.normalizer.image_mean.copy_(images.mean)
        net.normalizer.image_std.copy_(images.std)
    weights = {name: value for name, value in tensors.items() if not name.startswith(BUFFERS)}
    positions = weights.pop(POSITIONS, None)
    try:
        _check_positions(positions, net)
        loaded = from_lerobot(net, weights)
    except ValueError as error:
        raise ValueError(
            f"{folder / MODEL} does not fit {path}: {error}; give the two files of one policy"
        ) from error
    net.load_state_dict(net.normalizer.state_dict(prefix="normalizer.") | loaded)
    return net.eval()


def _check_positions(positions: Tensor | None, net: ACT) -> None:
    if positions is None:
        return
    expected = sinusoid_table(2 + net.config.chunk_size, net.config.dim_model)
    if positions.shape[1:] != expected.shape:
        raise ValueError(
            f"{POSITIONS} has shape {tuple(positions.shape)}, config.json says "
            f"{(1, *expected.shape)}"
        )
    if not torch.allclose(positions[0].float(), expected, atol=1e-4):
        raise ValueError(f"{POSITIONS} is not the sinusoid table that ACT has")


def check_world(policy: DataSpec, world: DataSpec) -> None:
    """Refuses an environment whose observations or actions are not the policy's.

    Raises:
        ValueError: names what differs.
    """
    hints = {
        "cameras": "env.cameras",
        "image_size": "env.image_size",
        "dim_env_state": "env.env_state",
        "fps": "--fps",
    }
    fields = ("dim_qpos", "dim_action", "dim_env_state", "cameras", "image_size", "fps")
    differing = [
        f"{name} is {getattr(policy, name)} in the policy and {getattr(world, name)} in the "
        f"environment (see {hints.get(name, 'env.task')})"
        for name in fields
        if getattr(policy, name) != getattr(world, name)
    ]
    if differing:
        raise ValueError(f"the environment does not fit the policy: {'; '.join(differing)}")


def read_execution(config: Mapping[str, Any]) -> ExecutionConfig:
    """How LeRobot executes the policy's chunks."""
    decay = config.get("temporal_ensemble_coeff")
    if decay is not None:
        return ExecutionConfig(ensemble_decay=decay)
    return ExecutionConfig(n_action_steps=config.get("n_action_steps"))


def world_settings(env: EnvConfig, executions: Mapping[str, ExecutionConfig]) -> dict[str, Any]:
    """The sections `env` and `rollout` of a run's `config.yaml`."""
    return {
        "env": json.loads(json.dumps(asdict(env))),  # tuples become lists, as YAML wants them
        "rollout": {"executions": {name: asdict(how) for name, how in executions.items()}},
    }
