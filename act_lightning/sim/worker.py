"""A worker of the rollout pool: hosts environments, plays actions sent, shows what it sees.

Commands and replies are small and go over one pipe, in lists; every command gets one reply, in
order:

    parent                                worker
                                      <-  Ready, then the handle of the shared memory, once
    Reset(slot, seed, film)           ->
    Play(slot, actions, chunk)        ->
                                      <-  Reply(slot, outcome or None); None: observation in place;
                                          if the last of a list has frames_shape, the handle of
                                          their memory follows
                                      <-  Failure, instead of any of these; the worker exits

Observations lie in anonymous shared memory, one place a slot, and so does the number of the slot
being played, for the parent to know should the worker not answer any more. The memory has no name,
so nothing is left behind however the processes end. A worker ends when its pipe does, and so does
not outlive its parent. This module is free of torch, so that a worker starts fast and stays small.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.film import Film, Filmer

EnvFactory = Callable[[], "gymnasium.Env[Any, Any]"]
Fields = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of arrays, by name."""


CURRENT_SLOT: Fields = {"current_slot": ((1,), "<i8")}
"""Beside the observations: the slot being played, or -1."""

REPLY_INTERVAL_S = 0.005
"""Replies wait no longer for others to be sent with; each message costs the parent a wake-up."""


class Reset(NamedTuple):
    """Command: start the episode of a world."""

    slot: int
    seed: int
    film: Film | None
    """How to film the episode; None: not at all."""


class Play(NamedTuple):
    """Command: take these actions (S, A), or as many of them as the episode has steps left."""

    slot: int
    actions: NDArray[np.float32]
    chunk: NDArray[np.float32] | None
    """(K, A) newest prediction, which begins with the coming step, if the film shows it."""


class Outcome(NamedTuple):
    """How an episode ended."""

    success: bool
    max_reward: float
    total_reward: float
    steps: int
    error: str | None


class Ready(NamedTuple):
    """First message of a worker: what its environments look like."""

    fields: Fields
    dim_action: int
    stages: tuple[str, ...]
    """Names of the stages before success."""


class Reply(NamedTuple):
    """A command was carried out; `outcome` is None while the episode goes on."""

    slot: int
    outcome: Outcome | None
    frames_shape: tuple[int, ...] | None = None
    """Shape of the pictures of a recorded episode that is over; they are too big for the pipe."""


class Failure(NamedTuple):
    """Last message of a worker: an exception it cannot go on after."""

    message: str
    details: str


def run_worker(connection_fd: int) -> None:
    """Serves the parent at the other end of the socket `connection_fd` until that end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(connection_fd)
    host: _Host | None = None
    try:
        factory, num_slots = _receive(connection)
        host = _Host(pickle.loads(factory), num_slots)
        _send(connection, host.ready, host.memory)
        while True:
            _serve(connection, host, _receive(connection))
    except Exception as error:
        _send(connection, Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        if host is not None:
            host.close()


def _serve(connection: Connection, host: _Host, commands: list[Reset | Play]) -> None:
    """Carries out commands, and replies to several at a time where they are quick."""
    replies: list[Reply] = []
    sent_at = time.monotonic()
    for number, command in enumerate(commands, start=1):
        reply, frames = host.obey(command)
        replies.append(reply)
        late = time.monotonic() - sent_at > REPLY_INTERVAL_S
        if late or frames is not None or number == len(commands):
            _send(connection, replies, None if frames is None else _share(frames))
            replies = []
            sent_at = time.monotonic()


def _receive(connection: Connection) -> Any:
    """The parent's next message; ends the process if the parent is gone."""
    try:
        return read_message(connection)
    except (EOFError, OSError):
        raise SystemExit(0) from None


def _send(
    connection: Connection, message: Ready | list[Reply] | Failure, memory: int | None = None
) -> None:
    """Sends a message and, if given, the handle `memory`, which is closed."""
    try:
        write_message(connection, message)
        if memory is not None:
            reduction.send_handle(connection, memory, None)
            os.close(memory)
    except OSError:
        raise SystemExit(0) from None


class _Host:
    """The environments of one worker, each made when first used, and their observations."""

    def __init__(self, factory: EnvFactory, num_slots: int) -> None:
        first = factory()
        self._factory = factory
        self._episodes: list[Episode | None] = [Episode(first), *[None] * (num_slots - 1)]
        spaces: dict[str, Any] = first.observation_space.spaces  # type: ignore[attr-defined]
        fields: Fields = {
            name: ((num_slots, *space.shape), np.dtype(space.dtype).str)
            for name, space in spaces.items()
        }
        assert first.action_space.shape is not None
        stages = tuple(getattr(first.unwrapped, "stages", ()))
        self.ready = Ready(fields, first.action_space.shape[0], stages)
        self.memory = os.memfd_create("act_lightning_observations")
        self._observations = map_arrays(os.dup(self.memory), fields | CURRENT_SLOT)
        self._current_slot = self._observations.pop("current_slot")
        self._current_slot[0] = -1

    def obey(self, command: Reset | Play) -> tuple[Reply, NDArray[np.uint8] | None]:
        """Carries out a command; returns the reply, and the frames of an episode that is over."""
        slot = command.slot
        self._current_slot[0] = slot
        episode = self._episodes[slot]
        if episode is None:
            episode = self._episodes[slot] = Episode(self._factory())
        outcome = self._carry_out(command, episode)
        frames = None if outcome is None else episode.frames
        self._current_slot[0] = -1
        return Reply(slot, outcome, None if frames is None else frames.shape), frames

    def _carry_out(self, command: Reset | Play, episode: Episode) -> Outcome | None:
        if isinstance(command, Reset):
            observation = episode.reset(command.seed, command.film)
        else:
            outcome = episode.play(command.actions, command.chunk)
            if outcome is not None:
                return outcome
            observation = episode.observe()
        for name, array in self._observations.items():
            array[command.slot] = observation[name]
        return None

    def close(self) -> None:
        for episode in self._episodes:
            if episode is not None:
                episode.env.close()


class Episode:
    """One environment and the account of the episode it is playing."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env = env
        # Our environments step without observing: nothing is rendered that no policy looks at.
        self._world: Any = env.unwrapped
        config = getattr(self._world, "config", None)
        self._margin: float | None = getattr(config, "action_margin", None)
        space = self._world.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        self._space = space
        self._low, self._high = _action_limits(space, self._margin)
        self.rewards: list[float] = []
        """Rewards so far."""
        self._filmer: Filmer | None = None

    @property
    def frames(self) -> NDArray[np.uint8] | None:
        """(F, 3, h, w) pictures of the episode, if it is filmed."""
        return None if self._filmer is None else self._filmer.frames

    def reset(self, seed: int, film: Film | None) -> dict[str, NDArray[Any]]:
        """Starts the episode of the world `seed`; returns its first observation."""
        observation, _ = self.env.reset(seed=seed)
        self.rewards = []
        self._filmer = None if film is None else _start_film(self.env, film)
        return observation  # type: ignore[no-any-return]

    def observe(self) -> dict[str, NDArray[Any]]:
        """The current observation."""
        return self._world.observe()  # type: ignore[no-any-return]

    def play(
        self, actions: NDArray[np.float32], chunk: NDArray[np.float32] | None
    ) -> Outcome | None:
        """Takes actions until the episode ends.

        Args:
            actions: (S, A), physical units; one that is not finite, or too far beyond its bounds,
                ends the episode.
            chunk: (K, A) newest prediction, for the film.

        Returns:
            How the episode ended; None if it did not.
        """
        if self._filmer is not None and chunk is not None:
            self._filmer.plan(chunk)
        fits = (actions >= self._low) & (actions <= self._high)  # NaN fits nowhere.
        num_fit = len(actions) if fits.all() else int(fits.all(axis=1).argmin())
        for action in actions[:num_fit]:
            try:
                reward, terminated, truncated = self._world.advance(action)
            except FloatingPointError as error:
                return self._end(error=str(error))
            self.rewards.append(reward)
            if terminated or truncated:
                return self._end()
            if self._filmer is not None:
                self._filmer.step(len(self.rewards), reward)
        if num_fit == len(actions):
            return None
        return self._end(error=self._refusal(actions[num_fit], int(fits[num_fit].argmin())))

    def _refusal(self, action: NDArray[np.float32], value: int) -> str:
        """Why `action` ends the episode, of which the number `value` does not fit."""
        named = f"action {action[value]:g} from the policy at step {len(self.rewards)}"
        if not np.isfinite(action[value]):
            return f"{named} (value {value})"
        low, high = self._space.low[value], self._space.high[value]
        return (
            f"{named} (value {value}) is beyond its bounds {low:g} to {high:g} by more than "
            f"{self._margin:g} of their range"
        )

    def _end(self, error: str | None = None) -> Outcome:
        if self._filmer is not None:
            self._filmer.end(len(self.rewards), self.rewards[-1] if self.rewards else 0.0)
        return Outcome(
            success=error is None and bool(self._world.is_success),
            max_reward=float(max(self.rewards, default=0.0)),
            total_reward=float(sum(self.rewards)),
            steps=len(self.rewards),
            error=error,
        )


def _start_film(env: gymnasium.Env[Any, Any], film: Film) -> Filmer | None:
    """Begins to film an episode; None where nothing can be drawn, which must not fail it."""
    try:
        return Filmer(env, film)
    except Exception as error:  # of any driver, any package
        warnings.warn(f"not filmed: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        return None


def _action_limits(
    space: gymnasium.spaces.Box, margin: float | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lowest and highest (A,) action taken: finite, and within the bounds and a margin of them.

    Args:
        space: the bounds; a value without a lower or without an upper one is not bounded.
        margin: share of its range by which a value may be beyond its bounds; None: any.
    """
    limit = np.finfo(np.float32).max
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = np.isfinite(low) & np.isfinite(high) & (margin is not None)
    beyond = (margin or 0.0) * np.where(bounded, high - low, 0.0)
    lowest, highest = (
        np.where(bounded, low - beyond, -limit),
        np.where(bounded, high + beyond, limit),
    )
    return (
        lowest.clip(-limit, limit).astype(np.float32),
        highest.clip(-limit, limit).astype(np.float32),
    )


def write_message(connection: Connection, message: object) -> None:
    """Sends a message to the other side."""
    # Connection.send would use multiprocessing's pickler, which is three times as slow.
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def read_message(connection: Connection) -> Any:
    """Waits for the other side's next message."""
    return pickle.loads(connection.recv_bytes())


def _share(array: NDArray[Any]) -> int:
    """Copies an array into shared memory of its own; returns the memory's handle."""
    handle = os.memfd_create("act_lightning_array")
    map_arrays(os.dup(handle), {"array": (array.shape, array.dtype.str)})["array"][:] = array
    return handle


def map_arrays(handle: int, fields: Fields) -> dict[str, NDArray[Any]]:
    """Maps shared memory as arrays; closes `handle`, for the arrays keep the memory."""
    # Each array starts at a multiple of 64 bytes.
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in fields.values()]
    offsets = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]
    with open(handle, "rb+") as file:
        os.ftruncate(handle, offsets[-1])
        memory = mmap.mmap(file.fileno(), offsets[-1])
    return {
        name: np.ndarray(shape, dtype, memory, offset)
        for (name, (shape, dtype)), offset in zip(fields.items(), offsets, strict=False)
    }
