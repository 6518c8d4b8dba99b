"""What one process spends on an experiment: operators and bytes of a step, times of its parts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scaling_model import Costs
from scaling_ranks import ROOT, Built, Group, Spent, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from act_lightning.sim.env import AlohaEnv, make_env

SMALL_MB = 1
"""The other `bucket_cap_mb` that is tried, beside DistributedDataParallel's default."""


def measure_costs(experiment: str, store: Path) -> Costs:
    """Measures one experiment on this machine, from a few demonstrations of it."""
    built = build(experiment, store)
    net, data, batch = built.module.net, built.data, built.batch
    optimizer = built.make_optimizer()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = net.losses(batch, 0)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    with _CountOperators() as of_step:
        step()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        net.losses(batch, 0)["loss"].backward()
    optimizer.zero_grad()
    net.eval()
    seeds = torch.arange(len(batch))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with _CountOperators() as of_query:
            net.predict_chunk(batch.observation, seeds)
        with _CountOperators() as of_validation:
            net.evaluate(batch, seeds)
    spent, small = (time_alone(experiment, store, cap) for cap in (None, SMALL_MB))
    with tempfile.TemporaryFile() as checkpoint:
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
        checkpoint_bytes = checkpoint.tell()
    advance_s, observe_s = time_world(built)
    frames = data.store.num_frames
    episodes = built.config.demonstrations.episodes
    all_frames = episodes * frames / data.store.num_episodes
    held_out = built.config.data.val_fraction
    return Costs(
        name=experiment,
        batch_size=built.config.data.batch_size,
        parameters=sum(p.numel() for p in net.parameters() if p.requires_grad),
        flops=flops.get_total_flops() / len(batch),
        step_operators=of_step.count,
        query_operators=of_query.count,
        evaluate_operators=of_validation.count,
        backward_share=(spent.gradients_s - spent.forward_s) / spent.step_s,
        buckets=tuple(spent.buckets),
        small_buckets=tuple(small.buckets),
        stored_bytes=_images_bytes(store) / frames,
        delivered_bytes=sum(_nbytes(t) for t in _tensors(batch)) // len(batch),
        read_s=time_reading(built),
        train_frames=round(all_frames * (1 - held_out)),
        val_frames=min(1024, round(all_frames * held_out)),
        interval_steps=built.config.trainer.val_check_interval,
        episodes=built.config.rollout.episodes,
        episode_steps=built.config.env.max_episode_steps,
        chunk_size=net.config.chunk_size,
        advance_s=advance_s,
        observe_s=observe_s,
        checkpoint_bytes=checkpoint_bytes,
    )


def time_alone(experiment: str, store: Path, bucket_cap_mb: int | None) -> Spent:
    """The quickest of a few steps of one process."""
    with Group(1, experiment, store, bucket_cap_mb=bucket_cap_mb) as alone:
        return min(alone.run(7)[0][3:], key=lambda spent: spent.step_s)


def record(experiment: str, store: Path) -> None:
    """Records three demonstrations, where there are none yet."""
    if store.exists():
        return
    configs = [f"--config=experiments/{name}.yaml" for name in ("base", experiment)]
    settings = [f"--demonstrations.path={store}", "--demonstrations.episodes=3"]
    command = [sys.executable, "-m", "act_lightning", "record", *configs, *settings]
    subprocess.run(command, cwd=ROOT, check=True)


def time_reading(built: Built) -> float:
    """Least seconds a sample of 20 batches, in one thread, the files in memory."""
    reader = built.data._reader()
    rng = np.random.default_rng(0)
    taken = []
    for _ in range(20):
        frames = rng.integers(0, built.data.store.num_frames, len(built.batch))
        start = time.perf_counter()
        reader(frames)
        taken.append((time.perf_counter() - start) / len(frames))
    return min(taken)


def time_world(built: Built) -> tuple[float, float]:
    """Least seconds of simulating a control step, and of drawing what the policy sees."""
    env = make_env(built.config_init.env).unwrapped
    assert isinstance(env, AlohaEnv)
    env.reset(seed=0)
    action = env.observe()["qpos"]
    taken: list[list[float]] = [[], []]
    for _ in range(60):
        start = time.perf_counter()
        env.advance(action)
        middle = time.perf_counter()
        env.observe()
        taken[0].append(middle - start)
        taken[1].append(time.perf_counter() - middle)
    env.close()
    return min(taken[0]), min(taken[1])


def _images_bytes(store: Path) -> int:
    return sum(p.stat().st_size for p in store.glob("data/images_*/**/*") if p.is_file())


def _tensors(batch: Any) -> list[torch.Tensor | None]:
    seen = batch.observation
    return [seen.qpos, seen.images, seen.env_state, batch.actions, batch.is_pad]


def _nbytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


class _CountOperators(TorchDispatchMode):
    """Counts the operators that launch a kernel: all that return something new."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not (func.is_view or func.name().startswith(("aten::detach", "aten::empty")))
        return func(*args, **(kwargs or {}))
