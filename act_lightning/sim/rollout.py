"""Plays a policy in many simulated worlds at once, and says how each episode went.

Worker processes simulate and render; this process runs the policy, on many episodes at once:

    pool of workers              this process
    slot 0  observation   ──▶  ┐
    slot 1  observation   ──▶  ┼─ predict_chunk (B, K, A) ──▶ executors ──▶ actions of each slot
    ...                   ──▶  ┘

A slot plays one episode after another. A chunked slot gets all actions of its chunk at once and
steps the physics without rendering; an ensembled slot gets one action at a time. The policy runs as
soon as a batch or half of the playing slots wait for it, so that the others keep the workers busy.

An episode is a function of (policy, world seed, way of executing), bit for bit: the policy's
batches have a fixed size, so that what else is played, and on how many slots, workers or ranks,
changes nothing. A worker that fails, dies or hangs is restarted, and its episodes played again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import gymnasium
import torch

from act_lightning.execution import ExecutionConfig
from act_lightning.sim import num_cpus
from act_lightning.sim.env import EnvConfig, make_env
from act_lightning.sim.film import Film
from act_lightning.sim.game import ChunkPolicy, Game, RolloutError
from act_lightning.sim.results import EpisodeResult, film_strip, summarize
from act_lightning.sim.worker_process import WorkerProcess

__all__ = [
    "ChunkPolicy",
    "EpisodeResult",
    "Film",
    "RolloutError",
    "RolloutPool",
    "film_strip",
    "rollout",
    "summarize",
]

POLICY_BATCH = {"cpu": 4, "cuda": 32}
"""Observations the policy gets at a time, by the kind of device. On a CPU larger batches cost the
same for each observation, but more when the last episodes of a rollout fill them only in part."""


def rollout(
    policy: ChunkPolicy,
    env: EnvConfig | Callable[[], gymnasium.Env[Any, Any]],
    seeds: Sequence[int],
    executions: Mapping[str, ExecutionConfig],
    *,
    num_workers: int | None = None,
    slots_per_worker: int = 8,
    policy_batch: int | None = None,
    device: torch.device | str = "cpu",
    record: Mapping[int, Film] | None = None,
) -> list[EpisodeResult]:
    """Plays every world in every way of executing, with workers that live as long as this call.

    Args:
        policy: predicts chunks; in evaluation mode, on `device`.
        env: the environment, or an importable function that makes it.
        seeds: worlds to play.
        executions: ways of executing, by name.
        num_workers: worker processes; None: one a CPU.
        slots_per_worker: episodes each worker holds at a time.
        policy_batch: see `RolloutPool`.
        device: where the policy wants its observations.
        record: which worlds to film, by seed, and how.

    Returns:
        One result for each way of executing (in the given order) and seed (ascending).

    Raises:
        RolloutError: if no worker can be started at first; later trouble with workers is a
            RuntimeWarning, and what cannot be played in spite of it a failed episode.
        ValueError: if an argument is out of range, or chunks do not fit the environment's actions.
    """
    if num_workers is None:
        num_workers = min(num_cpus(), max(1, len(seeds) * len(executions)))
    with RolloutPool(
        env,
        num_workers=num_workers,
        slots_per_worker=slots_per_worker,
        policy_batch=policy_batch,
    ) as pool:
        return pool.rollout(policy, seeds, executions, device=device, record=record)


class RolloutPool:
    """Worker processes that start once, in the background, and play many rollouts.

    Any exception in a rollout, Ctrl-C included, closes the pool.
    """

    def __init__(
        self,
        env: EnvConfig | Callable[[], gymnasium.Env[Any, Any]],
        *,
        num_workers: int | None = None,
        slots_per_worker: int = 8,
        policy_batch: int | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        """Starts the workers, and returns without waiting for them.

        Args:
            env: the environment, or an importable function that makes it.
            num_workers: worker processes; None: one a CPU.
            slots_per_worker: episodes each worker holds at a time.
            policy_batch: observations the policy gets at a time; fewer are filled up, because the
                size of a batch moves its last bits. None: POLICY_BATCH of the device.
            timeout_s: longest time a worker may take for one command, in s.

        Raises:
            RolloutError: the system has no room for the processes.
            ValueError: a number is out of range.
        """
        num_workers = num_cpus() if num_workers is None else num_workers
        sizes = {"num_workers": num_workers, "slots_per_worker": slots_per_worker}
        for name, size in (sizes | {"policy_batch": policy_batch}).items():
            if size is not None and size < 1:
                raise ValueError(f"RolloutPool: {name}={size} must be 1 or more")
        factory = partial(make_env, env) if isinstance(env, EnvConfig) else env
        self._policy_batch = policy_batch
        self._timeout_s = timeout_s
        self._workers: list[WorkerProcess] = []
        try:
            for number in range(num_workers):
                self._workers.append(WorkerProcess(number, factory, slots_per_worker))
        except OSError as error:
            self.close()
            raise RolloutError(
                f"no worker can be started ({error}); make room for more processes"
            ) from error
        except BaseException:
            self.close()
            raise

    def rollout(
        self,
        policy: ChunkPolicy,
        seeds: Sequence[int],
        executions: Mapping[str, ExecutionConfig],
        *,
        device: torch.device | str = "cpu",
        record: Mapping[int, Film] | None = None,
    ) -> list[EpisodeResult]:
        """Plays every world in every way of executing; see `rollout`."""
        if len(set(seeds)) < len(seeds):
            raise ValueError("seeds: some world is listed twice; a world has one result")
        if not self._workers:
            raise RolloutError("the rollout pool is closed; make a new one")
        device = torch.device(device)
        batch = self._policy_batch or POLICY_BATCH.get(device.type, POLICY_BATCH["cpu"])
        try:
            game = Game(self._workers, policy, executions, device, batch, self._timeout_s)
            with _one_torch_thread():
                return game.play(sorted(seeds), record or {})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers; a busy one is not waited for."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.hang_up()
        deadline = time.monotonic() + 1.0
        for worker in workers:
            worker.end(deadline)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Leaves the other cores to the workers.

    A policy that shares its cores with them waits at every barrier for a thread that is not
    running: on two busy cores, two threads took ten times as long as one. Always one, because how
    many threads share a sum can move its last bit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
