"""One rollout being played: deals episodes out to the workers' slots, and asks the policy for them.

A slot plays one episode after another:

    coming ──▶ idle slot ──▶ worker ──▶ waiting for the policy ──▶ worker ──▶ ... ──▶ result
      ▲                        │ lost
      └────────────────────────┘

The episode that a worker was at when it failed, died or hung is played again once, and counted as
failed if that happens to it again; the others that the worker held are not to blame, and are played
again as often as it takes. A worker that is lost again and again without having played anything is
given up, and its episodes go to the others. Trouble in every episode is not told from bad worlds:
each then costs what it takes to notice it, twice.
"""

from __future__ import annotations

import math
import select
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from act_lightning.batch import Observation
from act_lightning.execution import ExecutionConfig, Executor
from act_lightning.sim.film import Film
from act_lightning.sim.results import EpisodeResult
from act_lightning.sim.worker import Outcome, Play, Reply, Reset
from act_lightning.sim.worker_process import LostWorkerError, WorkerProcess

EpisodeKey = tuple[str, int]
"""Way of executing, and seed of the world."""

MAX_LOSSES = 3
"""A worker lost so many times in a row, with no episode to blame and none finished, is given up."""

_MASK_64 = 2**64 - 1


class RolloutError(RuntimeError):
    """No worker could be started, or the pool is closed."""


class ChunkPolicy(Protocol):
    """What rollouts need of a policy."""

    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Predicts the coming actions, (B, K, A) in physical units, for a batch of observations.

        All that is random in row i is a function of seeds[i]; seeds is (B,) int64.
        """
        ...


def policy_seed(seed: int, num_queries: int) -> int:
    """Seed of what the policy draws at random in world `seed`, asked `num_queries` times before."""
    # splitmix64 (Steele et al. 2014); numpy's SeedSequence takes a tenth of a simulated step.
    mixed = (seed * 0x9E3779B97F4A7C15 + num_queries * 0xD1342543DE82EF95) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return (mixed ^ (mixed >> 31)) >> 1  # int64 has one bit less


@dataclass(eq=False)
class _Slot:
    """A place of a worker where one episode after another is played."""

    worker: WorkerProcess
    index: int
    """Number of the slot in its worker."""
    row: int = 0
    """Number of the slot among all, and row of the executors."""
    episode: EpisodeKey | None = None
    """What it plays; None while it is idle."""
    film: Film | None = None
    sent: list[NDArray[np.float32]] = field(default_factory=list)
    """Actions (S, A) sent so far, a block for each time the policy was asked."""

    @property
    def policy_seed(self) -> int:
        assert self.episode is not None
        return policy_seed(self.episode[1], len(self.sent))

    def start(self, episode: EpisodeKey, film: Film | None) -> None:
        self.episode, self.film, self.sent = episode, film, []
        self.worker.queue(Reset(self.index, episode[1], film))

    def play(self, actions: NDArray[np.float32], chunk: Tensor) -> None:
        self.sent.append(actions)
        shown = chunk.numpy() if self.film is not None and self.film.overlay else None
        self.worker.queue(Play(self.index, actions, shown))

    def observation(self, name: str) -> NDArray[Any]:
        assert self.worker.observations is not None
        return self.worker.observations[name][self.index]  # type: ignore[no-any-return]

    def result(self, outcome: Outcome, frames: NDArray[np.uint8] | None) -> EpisodeResult:
        assert self.episode is not None
        assert self.worker.ready is not None
        steps, dim_action = outcome.steps, self.worker.ready.dim_action
        starts = np.cumsum([0, *map(len, self.sent)])[:-1].tolist()
        commands = np.concatenate([np.empty((0, dim_action), np.float32), *self.sent])
        execution, seed = self.episode
        return EpisodeResult(
            execution=execution,
            seed=seed,
            **outcome._asdict(),
            stage_names=self.worker.ready.stages,
            commands=commands[:steps].copy(),
            queries=tuple(start for start in starts if start < steps),
            frames=frames,
        )


class Game:
    """One rollout being played.

    Args:
        workers: started, and with nothing to do.
        policy: predicts chunks.
        executions: ways of executing, by name.
        device: where the policy wants its observations.
        policy_batch: observations in each of the policy's batches.
        timeout_s: longest time a worker may take for one command, in s.
    """

    def __init__(
        self,
        workers: Sequence[WorkerProcess],
        policy: ChunkPolicy,
        executions: Mapping[str, ExecutionConfig],
        device: torch.device,
        policy_batch: int,
        timeout_s: float,
    ) -> None:
        self._slots = {
            worker: [_Slot(worker, index) for index in range(worker.num_slots)]
            for worker in workers
            # One that an earlier rollout gave up gets another chance.
            if not worker.connection.closed or _start(worker)
        }
        if not self._slots:
            raise RolloutError("no worker can be started; is there memory for more processes?")
        # Neighbours belong to different workers, so that few episodes keep all workers busy.
        self._idle = deque(chain.from_iterable(zip(*self._slots.values(), strict=True)))
        self._num_rows = len(self._idle)
        for row, slot in enumerate(self._idle):
            slot.row = row
        self._waiting: deque[_Slot] = deque()
        self._coming: deque[EpisodeKey] = deque()
        self._results: dict[EpisodeKey, EpisodeResult] = {}
        self._blamed: dict[EpisodeKey, str] = {}
        self._losses = dict.fromkeys(self._slots, 0)
        self._policy = policy
        self._executions = executions
        self._executors: dict[str, Executor] = {}
        self._device = device
        self._policy_batch = policy_batch
        self._timeout_s = timeout_s

    def play(self, seeds: Sequence[int], record: Mapping[int, Film]) -> list[EpisodeResult]:
        """Plays all episodes, each slot taking the next when it is done with one.

        Args:
            seeds: worlds to play.
            record: which of them to film, and how.

        Returns:
            One result for each way of executing and seed, in their order.

        Raises:
            RolloutError: if no environment can be made at first.
            ValueError: if the policy's chunks do not fit.
        """
        order = [(name, seed) for name in self._executions for seed in seeds]
        self._coming.extend(order)
        while len(self._results) < len(order):
            self._listen()
            while self._coming and self._idle:
                episode = self._coming.popleft()
                self._idle.popleft().start(episode, record.get(episode[1]))
            self._flush()
            self._ask()
        return [self._results[episode] for episode in order]

    def _listen(self) -> None:
        """Waits for the workers, takes in what they have answered, and sees to those lost."""
        inbox = select.poll()
        for worker in self._slots:
            inbox.register(worker.connection, select.POLLIN)
        deadline = min(worker.deadline(self._timeout_s) for worker in self._slots)
        # Before anything was asked of them: only looks whether all are still there.
        wait_s = 0.0 if math.isinf(deadline) else deadline - time.monotonic()
        heard = {descriptor for descriptor, _ in inbox.poll(1000 * max(0.0, wait_s))}
        for worker in list(self._slots):
            try:
                if worker.connection.fileno() in heard:
                    for reply, frames in worker.replies():
                        self._take(self._slots[worker][reply.slot], reply, frames)
                else:
                    worker.check_deadline(self._timeout_s)
            except LostWorkerError as error:
                self._lose(worker, error)

    def _flush(self) -> None:
        for worker in self._slots:
            worker.flush()

    def _take(self, slot: _Slot, reply: Reply, frames: NDArray[np.uint8] | None) -> None:
        if reply.outcome is None:
            self._waiting.append(slot)
            return
        assert slot.episode is not None
        self._results[slot.episode] = slot.result(reply.outcome, frames)
        self._losses[slot.worker] = 0
        self._clear(slot)

    def _clear(self, slot: _Slot) -> None:
        """Makes room for another episode."""
        assert slot.episode is not None
        if slot.episode[0] in self._executors:
            self._executors[slot.episode[0]].reset(torch.tensor([slot.row]))
        slot.episode = None
        self._idle.append(slot)

    def _lose(self, worker: WorkerProcess, error: LostWorkerError) -> None:
        """Has the episodes of a lost worker played again, and restarts it or gives it up."""
        current = worker.current_slot
        blamed = None if current is None else self._slots[worker][current].episode
        if blamed is not None:
            doing = f"playing world {blamed[1]} ({blamed[0]})"
        else:
            doing = "waiting" if worker.observations else "starting its environment"
        cause = f"{worker.name}, {doing}: {error}"
        if error.raised and not self._has_been_ready():
            raise RolloutError(cause) from error
        self._take_back(worker, blamed, cause)
        worker.kill()
        self._losses[worker] = 0 if blamed is not None else self._losses[worker] + 1
        if self._losses[worker] < MAX_LOSSES and _start(worker):
            cause = f"{cause}; the worker was restarted"
        else:
            self._give_up(worker)
            cause = f"{cause}; the worker was given up"
        warnings.warn(cause, RuntimeWarning, stacklevel=2)
        if not self._slots:
            self._end(error, cause)

    def _take_back(self, worker: WorkerProcess, blamed: EpisodeKey | None, cause: str) -> None:
        """Puts what a lost worker played back to what is coming; the one to blame only once."""
        for slot in self._slots[worker]:
            episode = slot.episode
            if episode is None:
                continue
            self._clear(slot)
            if episode == blamed and episode in self._blamed:
                first = self._blamed[episode]
                self._results[episode] = self._lost_result(episode, f"{first}; again: {cause}")
                continue
            if episode == blamed:
                self._blamed[episode] = cause
                self._coming.append(episode)  # Last: it may take another worker with it.
            else:
                self._coming.appendleft(episode)
        self._waiting = deque(slot for slot in self._waiting if slot.worker is not worker)

    def _give_up(self, worker: WorkerProcess) -> None:
        del self._slots[worker]
        self._idle = deque(slot for slot in self._idle if slot.worker is not worker)

    def _end(self, error: LostWorkerError, cause: str) -> None:
        """Counts what is left as failed, for there is no worker left."""
        if not self._has_been_ready():
            raise RolloutError(cause) from error
        for episode in self._coming:
            message = f"no simulator is left; the last: {cause}"
            self._results[episode] = self._lost_result(episode, message)
        self._coming.clear()

    def _has_been_ready(self) -> bool:
        return any(worker.ready is not None for worker in self._losses)

    def _lost_result(self, episode: EpisodeKey, error: str) -> EpisodeResult:
        stages = next(worker.ready.stages for worker in self._losses if worker.ready is not None)
        return EpisodeResult.lost(*episode, error, stages)

    def _ask(self) -> None:
        """Asks the policy once a batch or half of the playing slots wait; sends the actions."""
        playing = sum(len(slots) for slots in self._slots.values()) - len(self._idle)
        number = len(self._waiting) - len(self._waiting) % self._policy_batch
        if number == 0 and 2 * len(self._waiting) >= playing:
            number = len(self._waiting)
        if number > 0:
            self._act([self._waiting.popleft() for _ in range(number)])
            self._flush()

    def _act(self, slots: Sequence[_Slot]) -> None:
        """Asks the policy about all of `slots`, and queues each its next actions."""
        size = self._policy_batch
        chunks = torch.cat([self._predict(slots[i : i + size]) for i in range(0, len(slots), size)])
        by_execution: dict[str, list[int]] = {}
        for i, slot in enumerate(slots):
            assert slot.episode is not None
            by_execution.setdefault(slot.episode[0], []).append(i)
        for name, group in by_execution.items():
            if name not in self._executors:
                _, chunk_size, dim_action = chunks.shape
                self._executors[name] = self._executions[name].build(
                    self._num_rows, chunk_size, dim_action
                )
            rows = torch.tensor([slots[i].row for i in group])
            self._executors[name].push(rows, chunks[group])
            for i, actions in zip(group, self._executors[name].pop_block(rows), strict=True):
                slots[i].play(actions.numpy(), chunks[i])

    def _predict(self, slots: Sequence[_Slot]) -> Tensor:
        """Chunks (n, K, A) for what `slots`, a batch or fewer, see now; on the CPU."""
        ready = slots[0].worker.ready
        assert ready is not None
        # Filled up with the first: the last bits of a row depend on how many rows there are.
        batch = [*slots, *[slots[0]] * (self._policy_batch - len(slots))]
        observation = Observation(
            **{
                name: torch.from_numpy(np.stack([slot.observation(name) for slot in batch]))
                for name in ready.fields
            }
        )
        seeds = torch.tensor([slot.policy_seed for slot in batch])
        with torch.inference_mode():
            chunks = self._policy.predict_chunk(observation.to(self._device), seeds).float().cpu()
        if chunks.ndim != 3 or len(chunks) != len(batch) or chunks.shape[2] != ready.dim_action:
            raise ValueError(
                f"the policy's chunks are {tuple(chunks.shape)}; expected ({len(batch)}, K, "
                f"{ready.dim_action}) for {len(batch)} observations and the environment's "
                f"{ready.dim_action} action values"
            )
        return chunks[: len(slots)]


def _start(worker: WorkerProcess) -> bool:
    """Starts a worker again; False if the system has no room for a process."""
    try:
        worker.start()
    except OSError:
        return False
    return True
