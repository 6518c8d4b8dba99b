"""The contract between a reader of a foreign format and the program that fills a store from it.

A reader module has `FORMAT`, `matches(path)` and `open_source(path, options)`. What it gives, a
`Source`, says what every episode holds and reads one episode at a time; its frames are read a block
at a time, so that memory stays bounded whatever the data set's size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from act_lightning import __version__
from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode

MAX_SIDE = 8192
"""Pixels; larger frames are taken for damage."""


class SourceError(ValueError):
    """A data set of another format is damaged, or lacks what was asked of it.

    The message names file, episode, field and, where there is one, step.
    """


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """What to take of a data set, and what the data set does not say itself."""

    task: str | None = None
    """Name of the task; None: what the source says, else the name of its file or folder."""
    fps: float | None = None
    """Control steps a second; None: what the source says. A reader that cannot tell asks for it."""
    cameras: tuple[tuple[str, str], ...] | None = None
    """(name in the store, name in the source) of each camera, in order; None: all; (): none."""
    qpos: tuple[str, ...] | None = None
    """Keys joined to qpos, each perhaps with columns, as `state[:2]`; None: the format's own."""
    action: tuple[str, ...] | None = None
    """Keys joined to the action; None: the format's own."""
    env_state: tuple[str, ...] = ()
    """Keys joined to env_state; (): none."""
    image_size: tuple[int, int] | None = None
    """(H, W) in pixels that every frame is brought to; None: as in the source."""
    swap_red_blue: bool = False
    """Exchanges the first and last colour, for a source that was recorded the other way round."""
    episodes: str | None = None
    """Name of the source's own subset of episodes (robomimic's filter key); None: all."""

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"--fps {self.fps}: give a positive number")
        if self.image_size is not None and not all(0 < n <= MAX_SIDE for n in self.image_size):
            raise ValueError(f"--image-size {self.image_size}: give sizes from 1 to {MAX_SIDE}")
        names = [name for name, _ in self.cameras or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"--cameras: {names} has a name twice")
        if bad := [name for name in names if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)]:
            raise ValueError(
                f"--cameras: {bad[0]!r} cannot be a name in the store (letters, digits, _ . -); "
                f"rename it, as --cameras top={bad[0]}"
            )


class Source(Protocol):
    """A data set of another format, opened: what its episodes hold, and each of them on demand."""

    format: str
    """"aloha", "lerobot", "diffusion_policy" or "robomimic"."""
    spec: DataSpec
    """As the store will have it: names, sizes and rate after the options were applied."""
    units: dict[str, str]
    """Of qpos, action and env_state: what the source says, or "as in the source"."""
    ids: list[int]
    """Numbers of the episodes, increasing."""
    provenance: dict[str, Any]
    """As JSON: format, path, mapping of cameras and keys, the source's own version.

    Equal when the same command is repeated. Where `ids` are positions in a list, the list is here,
    so that a changed one is refused on resume.
    """
    unused: tuple[str, ...]
    """Keys of the source that are not taken, to be shown."""

    def name(self, id: int) -> str:
        """How messages call an episode: "episode_3.hdf5", "demo_7", "episode 12"."""

    def read(self, id: int) -> Episode:
        """Reads an episode; its images are `Frames`, read when asked for.

        Raises:
            SourceError: the episode is damaged or differs from `spec`. `Frames.read` raises it too.
        """


def need_fps(fps: float | None, where: str, hint: str) -> float:
    """The rate, or the error that asks for it."""
    if fps is None:
        raise SourceError(f"{where} does not say its control rate; give --fps F ({hint})")
    return fps


def describe(
    format: str,
    path: Path,
    options: IngestOptions,
    *,
    cameras: Sequence[tuple[str, str]],
    qpos: Sequence[object],
    action: Sequence[object],
    **more: Any,
) -> dict[str, Any]:
    """`Source.provenance`: what decides the content of the store, and the programs' versions.

    Args:
        format: of the source.
        path: of the source.
        options: of the command.
        cameras: (name in the store, name in the source).
        qpos: keys taken.
        action: keys taken.
        more: what else this format has to say, as JSON types.
    """
    source = {
        "format": format,
        "path": str(path.resolve()),
        "cameras": dict(cameras),
        "qpos": [str(key) for key in qpos],
        "action": [str(key) for key in action],
        "env_state": list(options.env_state),
        "image_size": options.image_size,
        "swap_red_blue": options.swap_red_blue,
        "episodes": options.episodes,
        **more,
    }
    versions = {"act_lightning": __version__} | {
        name: version(name) for name in ("numpy", "pillow", "h5py", "zarr")
    }
    return {"source": source, "versions": versions}
