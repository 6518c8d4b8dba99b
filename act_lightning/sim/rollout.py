"""Plays a policy in many simulated worlds at once, and says how each episode went.

Worker processes simulate and render; this process runs the policy, on many episodes at once:

    pool of workers              this process
    slot 0  observation   ──▶  ┐
    slot 1  observation   ──▶  ┼─ predict_chunk (B, K, A) ──▶ executors ──▶ actions of each slot
    ...                   ──▶  ┘

A slot plays one episode after another. A chunked slot gets all actions of its chunk at once and
steps the physics without rendering; an ensembled slot gets one action at a time. The policy runs as
soon as half of the playing slots wait for it, so that the other half keeps the workers busy.

An episode is a function of (policy, world seed, way of executing): the number of workers and slots
changes nothing but the policy's batches, whose size may move its outputs by a rounding error.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from act_lightning.batch import Observation
from act_lightning.execution import ExecutionConfig, Executor
from act_lightning.sim import num_cpus
from act_lightning.sim.env import EnvConfig, make_env
from act_lightning.sim.results import EpisodeResult, film_strip, summarize
from act_lightning.sim.worker import Outcome, Play, Reset
from act_lightning.sim.worker_process import RolloutError, WorkerProcess

__all__ = [
    "ChunkPolicy",
    "EpisodeResult",
    "RolloutError",
    "RolloutPool",
    "film_strip",
    "rollout",
    "summarize",
]


class ChunkPolicy(Protocol):
    """What rollouts need of a policy."""

    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Predicts the coming actions, (B, K, A) in physical units, for a batch of observations.

        All that is random in row i is a function of seeds[i]; seeds is (B,) int64.
        """
        ...


def rollout(
    policy: ChunkPolicy,
    env: EnvConfig | Callable[[], gymnasium.Env[Any, Any]],
    seeds: Sequence[int],
    executions: Mapping[str, ExecutionConfig],
    *,
    num_workers: int | None = None,
    slots_per_worker: int = 8,
    device: torch.device | str = "cpu",
    record: Collection[int] = (),
) -> list[EpisodeResult]:
    """Plays every world in every way of executing, with workers that live as long as this call.

    Args:
        policy: predicts chunks; in evaluation mode, on `device`.
        env: the environment, or an importable function that makes it.
        seeds: worlds to play.
        executions: ways of executing, by name.
        num_workers: worker processes; None: one a CPU.
        slots_per_worker: episodes each worker holds at a time.
        device: where the policy wants its observations.
        record: seeds whose pictures to keep.

    Returns:
        One result for each way of executing (in the given order) and seed (ascending).

    Raises:
        RolloutError: if a worker fails, dies or hangs.
        ValueError: if an argument is out of range, or chunks do not fit the environment's actions.
    """
    if num_workers is None:
        num_workers = min(num_cpus(), max(1, len(seeds) * len(executions)))
    with RolloutPool(env, num_workers=num_workers, slots_per_worker=slots_per_worker) as pool:
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
        timeout_s: float = 120.0,
    ) -> None:
        """Starts the workers, and returns without waiting for them.

        Args:
            env: the environment, or an importable function that makes it.
            num_workers: worker processes; None: one a CPU.
            slots_per_worker: episodes each worker holds at a time.
            timeout_s: longest time without any answer from busy workers, in s.
        """
        num_workers = num_cpus() if num_workers is None else num_workers
        if num_workers < 1 or slots_per_worker < 1:
            raise ValueError(
                f"num_workers={num_workers} and slots_per_worker={slots_per_worker}: "
                "both must be 1 or more"
            )
        factory = partial(make_env, env) if isinstance(env, EnvConfig) else env
        self._timeout_s = timeout_s
        self._workers: list[WorkerProcess] = []
        try:
            for number in range(num_workers):
                self._workers.append(WorkerProcess(number, factory, slots_per_worker))
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
        record: Collection[int] = (),
    ) -> list[EpisodeResult]:
        """Plays every world in every way of executing; see `rollout`."""
        if len(set(seeds)) < len(seeds):
            raise ValueError("seeds: some world is listed twice; a world has one result")
        if not self._workers:
            raise RolloutError("the rollout pool is closed; make a new one")
        try:
            for worker in self._workers:
                worker.wait_until_ready(self._timeout_s)
            game = _Game(self._workers, policy, executions, torch.device(device), self._timeout_s)
            with _torch_threads(max(1, num_cpus() - len(self._workers))):
                return game.play(sorted(seeds), frozenset(record))
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


@dataclass(eq=False)
class _Slot:
    """A place of a worker where one episode after another is played."""

    worker: WorkerProcess
    index: int
    """Number of the slot in its worker."""
    row: int
    """Number of the slot among all, and row of the executors."""
    execution: str = ""
    seed: int = 0
    queries: int = 0
    """How often the policy was asked in this episode."""

    def start(self, execution: str, seed: int, record: bool) -> None:
        self.execution, self.seed, self.queries = execution, seed, 0
        self._queue(Reset(self.index, seed, record))

    def next_seed(self) -> int:
        """Seed of what the policy draws at random now: a function of the world and of how often."""
        key = np.random.SeedSequence([self.seed, self.queries])
        self.queries += 1
        return int(key.generate_state(1, np.uint64)[0] >> 1)  # int64 has one bit less

    def play(self, actions: Tensor) -> None:
        self._queue(Play(self.index, actions.numpy()))

    def observation(self, name: str) -> NDArray[Any]:
        assert self.worker.observations is not None
        return self.worker.observations[name][self.index]  # type: ignore[no-any-return]

    def _queue(self, command: Reset | Play) -> None:
        self.worker.queue(command, f"playing world {self.seed} ({self.execution})")


class _Game:
    """One rollout being played."""

    def __init__(
        self,
        workers: list[WorkerProcess],
        policy: ChunkPolicy,
        executions: Mapping[str, ExecutionConfig],
        device: torch.device,
        timeout_s: float,
    ) -> None:
        # Neighbours belong to different workers, so that few episodes keep all workers busy.
        self._slots = [
            _Slot(worker, index, row=index * len(workers) + number)
            for index in range(workers[0].num_slots)
            for number, worker in enumerate(workers)
        ]
        self._workers = workers
        self._numbers = {w.connection.fileno(): number for number, w in enumerate(workers)}
        self._inbox = select.poll()
        for descriptor in self._numbers:
            self._inbox.register(descriptor, select.POLLIN)
        self._policy = policy
        self._executions = executions
        self._executors: dict[str, Executor] = {}
        self._device = device
        self._timeout_s = timeout_s

    def play(self, seeds: list[int], record: Collection[int]) -> list[EpisodeResult]:
        """Plays all episodes, each slot taking the next when it is done with one."""
        order = [(name, seed) for name in self._executions for seed in seeds]
        coming = iter(order)
        results: dict[tuple[str, int], EpisodeResult] = {}
        playing = 0
        for slot, (name, seed) in zip(self._slots, coming, strict=False):
            slot.start(name, seed, seed in record)
            playing += 1
        waiting: list[_Slot] = []
        while playing:
            for worker in self._workers:
                worker.flush()
            for slot, outcome, frames in self._replies():
                if outcome is None:
                    waiting.append(slot)
                    continue
                results[slot.execution, slot.seed] = self._finish(slot, outcome, frames)
                playing -= 1
                if (episode := next(coming, None)) is not None:
                    slot.start(*episode, record=episode[1] in record)
                    playing += 1
            # Half of the slots: the workers simulate the others while the policy runs.
            if waiting and 2 * len(waiting) >= playing:
                self._act(waiting)
                waiting = []
        return [results[episode] for episode in order]

    def _replies(self) -> Iterator[tuple[_Slot, Outcome | None, NDArray[np.uint8] | None]]:
        """Waits for the workers, then yields all that they have answered."""
        ready = self._inbox.poll(1000 * self._timeout_s)
        if not ready:
            doing = "; ".join(f"{worker.name}, {worker.doing}" for worker in self._workers)
            raise RolloutError(f"no answer from the simulators for {self._timeout_s:g} s ({doing})")
        for descriptor, _ in ready:
            number = self._numbers[descriptor]
            for reply, frames in self._workers[number].replies():
                slot = self._slots[reply.slot * len(self._workers) + number]
                yield slot, reply.outcome, frames

    def _finish(
        self, slot: _Slot, outcome: Outcome, frames: NDArray[np.uint8] | None
    ) -> EpisodeResult:
        if slot.execution in self._executors:
            self._executors[slot.execution].reset(torch.tensor([slot.row]))
        return EpisodeResult(
            execution=slot.execution, seed=slot.seed, **outcome._asdict(), frames=frames
        )

    def _act(self, slots: list[_Slot]) -> None:
        """Asks the policy about all of `slots`, and sends each its next actions."""
        chunks = self._predict(slots)
        by_execution: dict[str, list[int]] = {}
        for i, slot in enumerate(slots):
            by_execution.setdefault(slot.execution, []).append(i)
        for name, group in by_execution.items():
            if name not in self._executors:
                _, chunk_size, dim_action = chunks.shape
                self._executors[name] = self._executions[name].build(
                    len(self._slots), chunk_size, dim_action
                )
            rows = torch.tensor([slots[i].row for i in group])
            self._executors[name].push(rows, chunks[group])
            for i, actions in zip(group, self._executors[name].pop_block(rows), strict=True):
                slots[i].play(actions)

    def _predict(self, slots: list[_Slot]) -> Tensor:
        """Chunks (n, K, A) for what `slots` see now, on the CPU."""
        names = slots[0].worker.observations or {}
        observation = Observation(
            **{n: torch.from_numpy(np.stack([s.observation(n) for s in slots])) for n in names}
        )
        seeds = torch.tensor([slot.next_seed() for slot in slots])
        with torch.inference_mode():
            chunks = self._policy.predict_chunk(observation.to(self._device), seeds).float().cpu()
        dim_action = slots[0].worker.dim_action
        if chunks.ndim != 3 or len(chunks) != len(slots) or chunks.shape[2] != dim_action:
            raise ValueError(
                f"the policy's chunks are {tuple(chunks.shape)}; expected ({len(slots)}, K, "
                f"{dim_action}) for {len(slots)} observations and the environment's {dim_action} "
                "action values"
            )
        return chunks


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    """Leaves the other cores to the workers.

    A policy that shares its cores with them waits at every barrier for a thread that is not
    running: on two busy cores, two threads took ten times as long as one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(number, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
