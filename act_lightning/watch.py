"""Verb `watch`: plays a run's policy in a live window, or writes videos of it where there is none.

Worlds and ways of executing are those of the evaluation, so what it reports of a world can be seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rich import get_console
from torch import Tensor

from act_lightning.batch import Observation
from act_lightning.cli import build_world, read_world
from act_lightning.evaluation import find_checkpoint
from act_lightning.execution import ExecutionConfig
from act_lightning.policy import Policy
from act_lightning.sim.config import FIRST_EVALUATION_SEED, EnvConfig
from act_lightning.sim.film import Film, describe_progress
from act_lightning.sim.game import policy_seed
from act_lightning.sim.opengl import find_backend
from act_lightning.sim.results import EpisodeResult
from act_lightning.sim.rollout import RolloutPool
from act_lightning.sim.splits import SPLITS, STANDARD, split_env
from act_lightning.sim.window import AlohaWindow, HumanWindow, has_display, open_window
from act_lightning.sim.worker import Episode
from act_lightning.study.videos import caption, write_video

VIDEO_FPS = 25
"""Frames a second of a video, about; where the control rate is lower, that."""
VIDEO_SIZE = (360, 480)
"""(h, w) of a video in pixels, at most, for environments that choose their size."""

LAST_SECONDS = 2.0
"""How long a window shows an episode's end."""


def watch_verb(args: list[str]) -> None:
    """`watch RUN [--seed N | --world I] [--execution NAME] [--episodes N] [--out FILE.mp4] ...`."""
    options = _parse(args)
    run = options.run
    checkpoint = find_checkpoint(run, options.checkpoint)
    rollout = build_world(read_world(run / "config.yaml")).rollout
    name = options.execution or next(iter(rollout.executions))
    if name not in rollout.executions:
        raise ValueError(
            f"--execution {name}: {run} has {', '.join(rollout.executions)} in rollout.executions"
        )
    first = options.seed if options.seed is not None else FIRST_EVALUATION_SEED + options.world
    device = "cuda" if torch.cuda.is_available() else "cpu"
    show = Show(
        policy=Policy.from_checkpoint(checkpoint, device),
        env=split_env(rollout.env, options.split),
        name=name,
        execution=rollout.executions[name],
    )
    seeds = range(first, first + options.episodes)
    if options.out is None and has_display():
        show.play_live(seeds)
    else:
        kind = "watch" if options.split == STANDARD else f"watch_{options.split}"
        named = {s: run / "media" / f"{kind}_{name}_{s}.mp4" for s in seeds}
        show.film({s: options.out or path for s, path in named.items()})


def _parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="act_lightning watch",
        description="Play a run's policy in a window; without a display, or with --out, write "
        "videos, by default to RUN/media/.",
    )
    parser.add_argument("run", type=Path, help="a run's folder, as runs/insertion/version_0")
    world = parser.add_mutually_exclusive_group()
    world.add_argument("--world", type=int, default=0, help="evaluation world (default 0)")
    world.add_argument("--seed", type=int, help="any world, by its seed")
    parser.add_argument("--episodes", type=int, default=1, help="worlds, one after the other")
    parser.add_argument("--execution", help="way of executing (default the run's first)")
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or the path of a checkpoint"
    )
    parser.add_argument(
        "--split",
        choices=(STANDARD, *SPLITS),
        default=STANDARD,
        metavar="NAME",
        help=f"which worlds: {STANDARD} (default), or held-out ones: {', '.join(SPLITS)}",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.mp4", help="write the video here")
    options = parser.parse_args(args)
    if options.episodes < 1:
        raise ValueError(f"--episodes {options.episodes}; give 1 or more")
    for name in ("world", "seed"):
        if (number := getattr(options, name)) is not None and number < 0:
            raise ValueError(f"--{name} {number}; give 0 or more")
    if options.out is not None and options.episodes > 1:
        raise ValueError("--out names one video; leave it out to write one for each episode")
    return options


class LivePolicy(Policy):
    """Shows what it plans, and draws in a world what it draws there in rollouts."""

    plan: Tensor
    """(n, A) what is left of the newest chunk, from the coming action on, in physical units."""

    def start_in(self, seed: int, execution: ExecutionConfig) -> None:
        """Begins the episode of a world."""
        self.start(execution)
        self._seed, self._num_queries = seed, 0
        self.plan = torch.empty(0, self.spec.dim_action)

    def act(self, observation: Observation) -> Tensor:
        """As `Policy.act`."""
        self.plan = self.plan[1:]
        return super().act(observation)

    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """As `Policy.predict_chunk`, with seeds of its own."""
        assert seeds is None
        seeds = torch.tensor([policy_seed(self._seed, self._num_queries)])
        self._num_queries += 1
        chunks = super().predict_chunk(observation, seeds)
        self.plan = chunks[0].float().cpu()
        return chunks


@dataclass(frozen=True, kw_only=True)
class Show:
    """What is watched."""

    policy: Policy
    """Plays."""
    env: EnvConfig
    """The world."""
    name: str
    """Name of the way of executing."""
    execution: ExecutionConfig
    """Way of executing."""

    def film(self, paths: dict[int, Path]) -> None:
        """Plays worlds and writes a video of each, to its path by seed.

        Raises:
            OpenGLNotFoundError: nothing can be drawn here.
            RuntimeError: an episode could not be played or filmed.
        """
        if self.env.is_aloha:
            find_backend()
        fps = self.policy.spec.fps
        film = Film(interval=max(1, round(fps / VIDEO_FPS)), size=VIDEO_SIZE, overlay=True)
        with RolloutPool(self.env, num_workers=1, slots_per_worker=1) as pool:
            for seed, path in paths.items():
                with get_console().status(f"playing world {seed}"):
                    (result,) = pool.rollout(
                        self.policy,
                        [seed],
                        {self.name: self.execution},
                        device=self.policy.device,
                        record={seed: film},
                    )
                self._print(result)
                if result.frames is None:
                    reason = result.error or "nothing can be drawn here"
                    raise RuntimeError(f"no video of world {seed}: {reason}")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(result.frames, path, fps / film.interval)
                get_console().print(f"written to {path}", highlight=False, soft_wrap=True)

    def play_live(self, seeds: Sequence[int]) -> None:
        """Plays worlds in a window, at the control rate, until they are over or it is closed."""
        policy = LivePolicy(self.policy.net)
        with open_window(self.env) as window:
            for seed in seeds:
                result = self._play(policy, window, seed)
                if result is None:
                    get_console().print("the window was closed", highlight=False)
                    return
                self._print(result)

    def _play(
        self, policy: LivePolicy, window: AlohaWindow | HumanWindow, seed: int
    ) -> EpisodeResult | None:
        """Plays one world; None if the window was closed."""
        policy.start_in(seed, self.execution)
        episode = Episode(window.env)
        with window.lock():
            observation = episode.reset(seed, None)
        due = time.monotonic()
        while True:
            action = policy.act(_batch_of_one(observation)).numpy()
            window.show(policy.plan.numpy(), _progress(episode))
            due = _wait_until(due) + 1 / policy.spec.fps
            if not window.is_open:
                return None
            with window.lock():
                outcome = episode.play(action[None], None)
            if outcome is not None:
                break
            observation = episode.observe()
        window.show(policy.plan[:0].numpy(), _progress(episode))
        _wait_until(time.monotonic() + LAST_SECONDS)
        return EpisodeResult(
            execution=self.name,
            seed=seed,
            stage_names=window.env.stages,
            **outcome._asdict(),
        )

    def _print(self, result: EpisodeResult) -> None:
        line = f"{caption(result)} ({result.execution})"
        get_console().print(line, highlight=False, soft_wrap=True)


def _batch_of_one(observation: dict[str, NDArray[Any]]) -> Observation:
    return Observation(
        **{name: torch.from_numpy(array)[None] for name, array in observation.items()}
    )


def _progress(episode: Episode) -> str:
    last, highest = (rewards[-1], max(rewards)) if (rewards := episode.rewards) else (0.0, 0.0)
    return describe_progress(episode.env.unwrapped, len(rewards), last, highest)


def _wait_until(due: float) -> float:
    """Waits until `due` (of time.monotonic); returns it, or the present if that is later."""
    now = time.monotonic()
    time.sleep(max(0.0, due - now))
    return max(due, now)
