"""Records demonstrations: an expert plays seeded worlds on all cores, its successes fill a store.

Unlike the recorders of tonyzhaozh/act and gym-aloha, only episodes that succeeded are kept;
failures are counted, shown, and remembered in the store, so that an interrupted recording goes on
at the next seed and ends in the same store as an uninterrupted one.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from act_lightning import __version__
from act_lightning.data.episode import Episode
from act_lightning.data.files import is_remote, open_files
from act_lightning.data.layout import StoreMismatchError
from act_lightning.data.store import Store, read_attributes
from act_lightning.data.writer import StoreWriter, check_settings
from act_lightning.sim import num_cpus
from act_lightning.sim.config import FIRST_EVALUATION_SEED, EnvConfig
from act_lightning.sim.demonstrator import DemonstratorConfig
from act_lightning.sim.env import data_spec, make_env
from act_lightning.sim.expert import ExpertConfig
from act_lightning.sim.opengl import find_backend

ALOHA_UNITS = {
    "qpos": "rad; grippers from 0 (closed) to 1 (open)",
    "action": "commanded qpos",
    "env_state": "object poses: m, unit quaternion wxyz",
}
"""Of the arrays that simulated ALOHA worlds give."""


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Which demonstrations to record, and where to."""

    path: str = "data/insertion.zarr"
    """The store: a folder made by the recorder."""
    episodes: int = 50
    """Successful demonstrations to record."""
    expert: DemonstratorConfig = field(default_factory=ExpertConfig)
    """The demonstrator: an `ExpertConfig` knows our own tasks; `class_path` names another."""
    hold_steps: int = 10
    """Control steps recorded after success, so that the policy learns to stay."""
    first_seed: int = 0
    """World of the first demonstration; the following ones count up."""
    max_failure_rate: float = 0.5
    """Recording stops when more than this share of 20 or more episodes failed."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"demonstrations.episodes={self.episodes}; give 1 or more")
        if self.hold_steps < 0:
            raise ValueError(f"demonstrations.hold_steps={self.hold_steps}; give 0 or more")
        if not 0 <= self.first_seed < FIRST_EVALUATION_SEED:
            raise ValueError(
                f"demonstrations.first_seed={self.first_seed}; give a seed from 0 to "
                f"{FIRST_EVALUATION_SEED - 1}: later seeds are evaluation worlds"
            )


def record(config: RecordConfig, env: EnvConfig, num_workers: int | None = None) -> None:
    """Fills the store at `config.path` up to `config.episodes` successful demonstrations.

    Args:
        config: what to record; a complete store of the same settings is left alone, as is one of
            other origin: ingested, or written by a program of its own. One in an object store is
            checked likewise, and never added to.
        env: the world, and what is observed of it.
        num_workers: processes; default one a core.

    Raises:
        ValueError: there is no such world, camera or demonstrator.
        OpenGLNotFoundError: there are cameras, and nothing can be drawn here.
        StoreMismatchError: a store of other settings is at that path.
        RuntimeError: too many episodes failed, or a process died.
    """
    if _is_taken_as_it_is(config, env):
        return
    config.expert.build(env.task)  # Here, because a process that fails to start says less.
    if env.cameras and env.is_aloha:
        find_backend()
    writer = _open_writer(config, env)
    with writer:
        if writer.num_episodes > config.episodes:
            raise StoreMismatchError(
                f"{config.path} holds {writer.num_episodes} episodes and "
                f"demonstrations.episodes={config.episodes}; set it to {writer.num_episodes}, "
                "train on fewer with data.num_episodes, or record into another path"
            )
        if writer.complete:
            return
        seeds = range(max(config.first_seed, writer.next_id), FIRST_EVALUATION_SEED)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            bar = progress.add_task(
                f"recording {config.path}",
                total=config.episodes,
                completed=writer.num_episodes,
                failed=writer.num_skipped,
            )
            for seed, episode in _play(config, env, seeds, num_workers or num_cpus()):
                if episode is None:
                    writer.skip(seed)
                else:
                    writer.append(episode)
                progress.update(bar, completed=writer.num_episodes, failed=writer.num_skipped)
                _check_failures(config, writer)
                if writer.num_episodes >= config.episodes:
                    break


def settings(config: RecordConfig, env: EnvConfig) -> dict[str, Any]:
    """What decides the content of a demonstration, as plain JSON types."""
    kind = type(config.expert)
    # Stores older than the choice of a demonstrator name none.
    named = {} if kind is ExpertConfig else {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    return {
        "env": env.recorded(),
        "expert": named | asdict(config.expert),
        "hold_steps": config.hold_steps,
        "first_seed": config.first_seed,
    }


def _is_taken_as_it_is(config: RecordConfig, env: EnvConfig) -> bool:
    """Whether demonstrations are there that this recorder did not make, or cannot add to.

    Raises:
        StoreMismatchError: the recorder made them, with other settings, and cannot add to them.
        StoreError: they are not complete, or not a store.
    """
    path = config.path
    if not is_remote(path) and not Path(path).exists():
        return False
    recorded = "settings" in read_attributes(open_files(path))["provenance"]
    if recorded and not is_remote(path):
        return False
    store = Store.open(path)
    if recorded:
        check_settings(path, data_spec(env), _provenance(config, env))
        if store.num_episodes != config.episodes:
            raise StoreMismatchError(
                f"{path} holds {store.num_episodes} episodes and "
                f"demonstrations.episodes={config.episodes}; set it to {store.num_episodes} (an "
                "object store is read only), or train on fewer with data.num_episodes"
            )
    print(f"{path}: {store.num_episodes} demonstrations, taken as they are")
    return True


def _provenance(config: RecordConfig, env: EnvConfig) -> dict[str, Any]:
    return {
        "settings": settings(config, env),
        "versions": {
            "act_lightning": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", *_world_packages(env))},
        },
    }


def _world_packages(env: EnvConfig) -> list[str]:
    """Packages that simulate the world."""
    module, colon, _ = env.task.partition(":")
    foreign = packages_distributions().get(module.partition(".")[0], []) if colon else []
    return ["mujoco", "gym-aloha", *foreign]


def _open_writer(config: RecordConfig, env: EnvConfig) -> StoreWriter:
    spec, provenance = data_spec(env), _provenance(config, env)
    if Path(config.path).exists():
        return StoreWriter.resume(config.path, spec, provenance, config.episodes)
    units = ALOHA_UNITS if env.is_aloha else None
    return StoreWriter.create(config.path, spec, provenance, config.episodes, units)


def _check_failures(config: RecordConfig, writer: StoreWriter) -> None:
    tried = writer.num_episodes + writer.num_skipped
    if tried >= 20 and writer.num_skipped > config.max_failure_rate * tried:
        raise RuntimeError(
            f"{writer.num_skipped} of {tried} demonstrations failed, more than "
            f"demonstrations.max_failure_rate={config.max_failure_rate}; "
            "check env and demonstrations.expert, or raise the limit"
        )


def _play(
    config: RecordConfig, env: EnvConfig, seeds: Iterable[int], num_workers: int
) -> Iterator[tuple[int, Episode | None]]:
    """Yields (seed, demonstration or None) in the order of the seeds, played in parallel."""
    # spawn: a forked child would inherit the parent's threads and OpenGL state.
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[int, Future[Episode | None]]] = deque()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (config, env)) as pool:
        try:
            for seed in seeds:
                with _ctrl_c_held_back():
                    pending.append((seed, pool.submit(_demonstrate, seed)))
                if len(pending) >= 2 * num_workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            for last, future in pending:
                yield last, future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a recording process died: killed, out of memory, or by a fault of OpenGL. What "
                "was recorded is kept; record again to continue"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which reaches a whole process group.

    They inherit the mask. The parent, which alone decides what is kept, sees it afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: dict[str, Any] = {}


def _start_worker(config: RecordConfig, env: EnvConfig) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(config=config, env=make_env(env), expert=config.expert.build(env.task))


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed: the pool's would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _demonstrate(seed: int) -> Episode | None:
    """Plays one world; returns the demonstration, or None if it failed."""
    config, env, expert = _worker["config"], _worker["env"], _worker["expert"]
    observation, _ = env.reset(seed=seed)
    expert.reset(env, seed)
    observations, actions = [], []
    steps_left = env.unwrapped.config.max_episode_steps
    succeeded = False
    while steps_left > 0:
        action = expert.act()
        observations.append(observation)
        actions.append(action)
        try:
            _, terminated, truncated = env.unwrapped.advance(expert.perturb(action))
        except FloatingPointError:  # the simulation diverged
            return None
        if env.unwrapped.is_success and not succeeded:
            succeeded, steps_left = True, min(steps_left, config.hold_steps + 1)
        if (terminated or truncated) and not succeeded:
            return None
        observation = env.unwrapped.observe()
        steps_left -= 1
    if not succeeded:
        return None
    stacked = {name: np.stack([step[name] for step in observations]) for name in observations[0]}
    return Episode(
        qpos=stacked["qpos"],
        actions=np.stack(actions),
        env_state=stacked.get("env_state"),
        images=stacked.get("images"),
        id=seed,
        success=True,
    )
