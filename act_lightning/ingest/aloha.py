"""ALOHA's episode files: one HDF5 file an episode, as tonyzhaozh/act and mobile ALOHA write them.

    attributes   sim (bool; older files lack it), compress (bool; absent: false)
    action                     (T, A) float32
    base_action                (T, 2) float32, mobile ALOHA only
    observations/qpos          (T, D) float32; qvel, effort the same
    observations/images/<cam>  (T, H, W, 3) uint8; with `compress` (T, L) uint8: JPEG, zero-padded
    compress_len               (cameras, T) float32, lengths before padding

Choices made here:
- Colours. The recorders hand RGB frames to cv2.imencode, which takes them for BGR, and their
  readers keep what cv2.imdecode returns, RGB again. So in the JPEG file red and blue are exchanged,
  and are exchanged back here. Recorders that had converted to BGR before (readers then convert
  after cv2.imdecode, as openpi's does) give blue faces that way: use `--swap-red-blue`. Raw frames
  are RGB.
- Row t pairs the observation with the action taken from it, as recorded. The original's loader
  shifts the actions of real robots by one step while sampling ("hack, to make timesteps more
  aligned"); nothing is shifted here.
- The rate is in no file. Both programs run at DT = 0.02, so 50 is the default.
- `compress_len` is not used (its rows' order differs between the two programs); instead each JPEG
  must end where its padding begins.

Source: tonyzhaozh/act record_sim_episodes.py; MarkFzp/mobile-aloha record_episodes.py;
MarkFzp/act-plus-plus compress_data.py and utils.py.
"""

from __future__ import annotations

import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.ingest import hdf5
from act_lightning.ingest.columns import Columns, join_columns
from act_lightning.ingest.frames import (
    check_same_cameras,
    choose_cameras,
    common_size,
    exact_uint8,
    make_episode,
)
from act_lightning.ingest.source import IngestOptions, SourceError, describe

FORMAT = "aloha"
FPS = 50.0
"""Of the original's robots and simulator: DT = 0.02."""
_IMAGES = "observations/images"
_SUFFIXES = (".hdf5", ".h5")


def matches(path: Path) -> bool:
    """Whether a file, or the first HDF5 file of a folder, has ALOHA's groups."""
    files = _list_files(path)
    try:
        with hdf5.open_hdf5(files[0]) as file:
            return "observations" in file and "action" in file
    except (SourceError, IndexError):
        return any(re.fullmatch(r"episode_\d+\.\w+", file.name) for file in files)


def open_source(path: Path, options: IngestOptions) -> AlohaSource:
    """Opens a folder of episode files, or one file.

    Raises:
        SourceError: there is none, none can be read, or an option does not fit.
    """
    return AlohaSource(path, options)


class AlohaSource:
    """Episodes of ALOHA; see `Source`."""

    format = FORMAT

    def __init__(self, path: Path, options: IngestOptions) -> None:
        self._options = options
        self._files, numbered = _number(path)
        self.ids = list(self._files)
        self._qpos = [Columns.parse(key) for key in options.qpos or ("observations/qpos",)]
        self._action = [Columns.parse(key) for key in options.action or ("action",)]
        self._env_state = [Columns.parse(key) for key in options.env_state]
        faults = []
        for id in self.ids:
            try:
                self._read_layout(path, id)
                break
            except SourceError as error:
                faults.append(str(error))
        else:
            raise SourceError(f"{path}: no episode can be read. The first: {faults[0]}")
        self.units = {"qpos": "rad; grippers from 0 (closed) to 1 (open)"}
        if options.qpos is not None:
            self.units["qpos"] = "as in the source"
        self.units |= {"action": "commanded qpos", "env_state": "as in the source"}
        self.provenance = describe(
            FORMAT,
            path,
            options,
            cameras=self._cameras,
            qpos=self._qpos,
            action=self._action,
            sim=self._sim,
            files=None if numbered else [file.name for file in self._files.values()],
        )

    def name(self, id: int) -> str:
        """The file's name."""
        return self._files[id].name

    def read(self, id: int) -> Episode:
        """Reads an episode.

        Raises:
            SourceError: it is damaged, or other than the first.
        """
        path = self._files[id]
        with hdf5.open_hdf5(path) as file:
            tables = self._read_tables(file, path)
            num_steps = len(tables["action"])
            self._check_cameras(file, path)
            readers = []
            for (name, key), size in zip(self._cameras, self._sizes, strict=True):
                shape = _frames_shape(file, key, str(path))
                if shape != (num_steps, *size):
                    raise SourceError(
                        f"{path}: camera {name} has {shape[0]} frames of {shape[1]}x{shape[2]}; "
                        f"the episode has {num_steps} steps, other episodes {size[0]}x{size[1]}"
                    )
                readers.append(partial(_read_frames, path, key, size))
        return make_episode(id, tables, readers, self.spec, self._options)

    def _read_layout(self, path: Path, id: int) -> None:
        """Learns from one episode what all of them hold."""
        episode = self._files[id]
        with hdf5.open_hdf5(episode) as file:
            tables = self._read_tables(file, episode)
            found, others = _find_cameras(file, str(episode))
            self._found = set(found)
            self._cameras = choose_cameras(list(found), self._options, str(episode))
            self._sizes = [found[key] for _, key in self._cameras]
            self._sim = None if file.attrs.get("sim") is None else bool(file.attrs["sim"])
            held = [key for key in file if key != "observations"]
            held += [f"observations/{key}" for key in file["observations"] if key != "images"]
        size = common_size(
            {name: size for (name, _), size in zip(self._cameras, self._sizes, strict=True)},
            self._options,
            str(episode),
        )
        taken = {part.key for part in (*self._qpos, *self._action, *self._env_state)}
        cameras = [f"{_IMAGES}/{key}" for key in found if key not in dict(self._cameras).values()]
        self.unused = tuple(
            key for key in (*held, *others, *cameras) if key not in taken | {"compress_len"}
        )
        folder = path.resolve() if path.is_dir() else path.resolve().parent
        self.spec = DataSpec(
            task=self._options.task or folder.name,
            fps=self._options.fps or FPS,
            dim_qpos=tables["qpos"].shape[1],
            dim_action=tables["action"].shape[1],
            dim_env_state=tables["env_state"].shape[1] if "env_state" in tables else 0,
            cameras=tuple(name for name, _ in self._cameras),
            image_size=size,
        )

    def _check_cameras(self, file: h5py.File, path: Path) -> None:
        """Sees that no camera is left out without a word, where all were asked for."""
        found = set(_find_cameras(file, str(path))[0])
        check_same_cameras(found, set(self._found), self._options, str(path))

    def _read_tables(self, file: h5py.File, path: Path) -> dict[str, NDArray[np.float64]]:
        parts = {"qpos": self._qpos, "action": self._action, "env_state": self._env_state}
        return {
            name: join_columns(
                columns, lambda key: hdf5.read_table(file, key, str(path)), str(path)
            )
            for name, columns in parts.items()
            if columns
        }


def _list_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    return [path] if path.suffix in _SUFFIXES else []


def _number(path: Path) -> tuple[dict[int, Path], bool]:
    """Files by episode number, and whether the numbers are those in their names."""
    files = _list_files(path)
    if not files:
        raise SourceError(f"{path} holds no .hdf5 file; give a folder of ALOHA's episode_N.hdf5")
    numbers = [re.search(r"(\d{1,9})$", file.stem) for file in files]
    found = {int(match[1]): file for match, file in zip(numbers, files, strict=True) if match}
    if len(found) == len(files):
        return dict(sorted(found.items())), True
    return dict(enumerate(files)), False


def _find_cameras(file: h5py.File, where: str) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(H, W) of every camera by key, and what lies there beside them: depth, as a rule."""
    found: dict[str, tuple[int, int]] = {}
    others = []
    for key in file.get(_IMAGES, ()):
        try:
            found[key] = _frames_shape(file, key, where)[1:]
        except SourceError:
            others.append(f"{_IMAGES}/{key}")
    return found, others


def _frames_shape(file: h5py.File, key: str, where: str) -> tuple[int, int, int]:
    """(T, H, W) of a camera; the size of JPEG frames is that of the first."""
    name = f"{_IMAGES}/{key}"
    dataset = hdf5.find_dataset(file, name, where)
    if dataset.dtype.kind in "fiu" and dataset.ndim == 4 and dataset.shape[3] == 3:
        return dataset.shape[:3]  # type: ignore[no-any-return]
    if dataset.dtype == np.uint8 and dataset.ndim == 2 and dataset.shape[0] > 0:
        image = _open_jpeg(dataset[0], f"{where}: {name}", 0)
        return dataset.shape[0], image.height, image.width
    raise SourceError(
        f"{where}: {name} is {dataset.dtype} {dataset.shape}, neither (T, H, W, 3) frames nor JPEG "
        "as (T, length) uint8"
    )


def _read_frames(
    path: Path, key: str, size: tuple[int, int], start: int, stop: int
) -> NDArray[np.uint8]:
    """Frames of a camera, RGB; what `compress` says is plain from their shape."""
    name = f"{_IMAGES}/{key}"
    rows = hdf5.read_rows(path, name, str(path), start, stop)
    if rows.ndim == 4:
        return exact_uint8(rows, f"{path}: {name}", start)
    frames = np.empty((len(rows), *size, 3), np.uint8)
    for step, (row, frame) in enumerate(zip(rows, frames, strict=True), start):
        frame[...] = _decode_jpeg(row, size, f"{path}: {name}", step)
    return frames


def _decode_jpeg(
    row: NDArray[np.uint8], size: tuple[int, int], where: str, step: int
) -> NDArray[Any]:
    """A zero-padded JPEG file whose red and blue were exchanged by cv2.imencode, as RGB."""
    image = _open_jpeg(row, where, step)
    if (image.height, image.width) != size:
        raise SourceError(
            f"{where}: the frame at step {step} has {image.height}x{image.width} pixels, "
            f"not {size[0]}x{size[1]}"
        )
    try:
        return np.asarray(image.convert("RGB"))[..., ::-1]
    except Exception as error:  # Pillow raises what it likes
        raise SourceError(f"{where}: the JPEG at step {step} is damaged ({error})") from error


def _open_jpeg(row: NDArray[np.uint8], where: str, step: int) -> Image.Image:
    content = row.tobytes().rstrip(b"\0")
    if not content.endswith(b"\xff\xd9"):  # Pillow would paint grey what is cut off
        raise SourceError(f"{where}: the JPEG at step {step} is cut off or damaged")
    try:
        return Image.open(io.BytesIO(content), formats=["JPEG"])
    except Exception as error:
        raise SourceError(f"{where}: the JPEG at step {step} is damaged ({error})") from error
