"""A worker of the rollout pool: hosts environments, plays actions sent, shows what it sees.

Commands and replies are small and go over one pipe; commands come in lists, and every command gets
one reply, in order:

    parent                                worker
                                      <-  Ready, then the handle of the shared memory, once
    Reset(slot, seed, record)         ->
    Play(slot, actions)               ->
                                      <-  Reply(slot, outcome or None); None: observation in place;
                                          with frames_shape, the handle of their memory follows
                                      <-  Failure, instead of any of these; the worker exits

Observations lie in anonymous shared memory, one place a slot. It has no name, so nothing is left
behind however the processes end. A worker ends when its pipe does, and so does not outlive its
parent. This module is free of torch, so that a worker starts fast and stays small.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

EnvFactory = Callable[[], "gymnasium.Env[Any, Any]"]
Fields = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of arrays, by name."""

FRAME_INTERVAL = 30
"""Control steps between two recorded frames."""
FRAME_SIZE = (120, 160)
"""(h, w) of recorded frames, in pixels; at most, for environments that choose their size."""


class Reset(NamedTuple):
    """Command: start the episode of a world."""

    slot: int
    seed: int
    record: bool


class Play(NamedTuple):
    """Command: take these actions (S, A), or as many of them as the episode has steps left."""

    slot: int
    actions: NDArray[np.float32]


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
            for command in _receive(connection):
                reply, frames = host.obey(command)
                _send(connection, reply, None if frames is None else _share(frames))
    except Exception as error:
        _send(connection, Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        if host is not None:
            host.close()


def _receive(connection: Connection) -> Any:
    """The parent's next message; ends the process if the parent is gone."""
    try:
        return read_message(connection)
    except (EOFError, OSError):
        raise SystemExit(0) from None


def _send(
    connection: Connection, message: Ready | Reply | Failure, memory: int | None = None
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
        self._episodes: list[_Episode | None] = [_Episode(first), *[None] * (num_slots - 1)]
        spaces: dict[str, Any] = first.observation_space.spaces  # type: ignore[attr-defined]
        fields: Fields = {
            name: ((num_slots, *space.shape), np.dtype(space.dtype).str)
            for name, space in spaces.items()
        }
        assert first.action_space.shape is not None
        self.ready = Ready(fields, first.action_space.shape[0])
        self.memory = os.memfd_create("act_lightning_observations")
        self._observations = map_arrays(os.dup(self.memory), fields)

    def obey(self, command: Reset | Play) -> tuple[Reply, NDArray[np.uint8] | None]:
        """Carries out a command; returns the reply, and the frames of an episode that is over."""
        slot = command.slot
        episode = self._episodes[slot]
        if episode is None:
            episode = self._episodes[slot] = _Episode(self._factory())
        if isinstance(command, Reset):
            observation = episode.reset(command.seed, command.record)
        else:
            outcome = episode.play(command.actions)
            if outcome is not None:
                frames = episode.frames
                return Reply(slot, outcome, None if frames is None else frames.shape), frames
            observation = episode.observe()
        for name, array in self._observations.items():
            array[slot] = observation[name]
        return Reply(slot, None), None

    def close(self) -> None:
        for episode in self._episodes:
            if episode is not None:
                episode.env.close()


class _Episode:
    """One environment and the account of the episode it is playing."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env = env
        # Our environments step without observing: nothing is rendered that no policy looks at.
        self._world: Any = env.unwrapped
        self._rewards: list[float] = []
        self._frames: list[NDArray[np.uint8]] | None = None

    @property
    def frames(self) -> NDArray[np.uint8] | None:
        """(F, 3, h, w), a frame at every FRAME_INTERVAL steps and at the end, if recorded."""
        return None if self._frames is None else np.stack(self._frames)

    def reset(self, seed: int, record: bool) -> dict[str, NDArray[Any]]:
        observation, _ = self.env.reset(seed=seed)
        self._rewards = []
        self._frames = [self._picture()] if record else None
        return observation  # type: ignore[no-any-return]

    def observe(self) -> dict[str, NDArray[Any]]:
        return self._world.observe()  # type: ignore[no-any-return]

    def play(self, actions: NDArray[np.float32]) -> Outcome | None:
        """Takes `actions` until the episode ends; None if it did not end."""
        finite = np.isfinite(actions)
        num_finite = len(actions) if finite.all() else int(finite.all(axis=1).argmin())
        for action in actions[:num_finite]:
            try:
                reward, terminated, truncated = self._world.advance(action)
            except FloatingPointError as error:
                return self._end(error=str(error))
            self._rewards.append(reward)
            if terminated or truncated:
                return self._end()
            if self._frames is not None and len(self._rewards) % FRAME_INTERVAL == 0:
                self._frames.append(self._picture())
        if num_finite == len(actions):
            return None
        action = actions[num_finite]
        value = int(np.isfinite(action).argmin())
        step = len(self._rewards)
        return self._end(
            error=f"action {action[value]} from the policy at step {step} (value {value})"
        )

    def _end(self, error: str | None = None) -> Outcome:
        if self._frames is not None:
            self._frames.append(self._picture())
        return Outcome(
            success=error is None and bool(self._world.is_success),
            max_reward=float(max(self._rewards, default=0.0)),
            total_reward=float(sum(self._rewards)),
            steps=len(self._rewards),
            error=error,
        )

    def _picture(self) -> NDArray[np.uint8]:
        """What a spectator sees, (3, h, w)."""
        if hasattr(self._world, "picture"):  # Ours can draw small.
            image = self._world.picture(size=FRAME_SIZE)
        else:
            image = np.asarray(self.env.render())
        factor = math.ceil(max(np.divide(image.shape[:2], FRAME_SIZE)))
        height, width = image.shape[0] // factor, image.shape[1] // factor
        tiles = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
        shrunk: NDArray[np.uint8] = tiles.mean(axis=(1, 3)).round().astype(np.uint8)
        return shrunk.transpose(2, 0, 1)


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
