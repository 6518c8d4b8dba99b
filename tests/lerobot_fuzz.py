"""Mutated LeRobotDatasets, and what a reader may make of each; runs in a process of its own.

What can be told of damage, by file:

- `meta` (JSON and parquet): everything in it is said twice, or checked against the frames and rows.
  So a data set is refused, or read as if nothing had been touched. Statistics are not read at all.
- Tables that `export-dataset` wrote have a checksum a page, and are held to the same.
- Tables without checksums (LeRobot's own): numbers of the episodes in the file may change, rows
  cannot be lost, doubled or exchanged. An image is one that was in the file, whole (PNG has a
  checksum), though a page that is hit may show it at another step.
- mp4: packets have no checksum, so the pictures of that camera in that file may change; their
  number, size and times cannot. All else is as it was.
"""

import json
import os
import resource
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot_files import Layout, make_demos, write_dataset

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.data.writer import StoreWriter
from act_lightning.ingest.lerobot import open_source
from act_lightning.ingest.source import IngestOptions, SourceError
from act_lightning.lerobot.dataset_exporting import export_dataset

LENGTHS = (4, 3, 5)
SIZE = (32, 48)
MEMORY_LIMIT = 10 * 2**30
"""Of address space; the libraries take 5 GiB of that without using it."""
AV1 = Layout(version="v2.1", codec="libsvtav1", options={"crf": "30", "g": "2", "preset": "8"})
LAYOUTS = {
    "v3-video": Layout(),
    "v3-images": Layout(video=False),
    "v2-video": Layout(version="v2.1"),
    "v2-av1": AV1,
    "v2-images": Layout(version="v2.1", video=False),
}
BASES = (*LAYOUTS, "our-video", "our-images")
BYTE_KINDS = ("flip", "set", "zero", "cut", "delete", "insert", "copy", "swap")
VALUES = (0, -1, 1, 2, 3, 7, 2**31, -(2**63), 1e300, 0.5, True, None, "", "x", [], {}, "{0}", [3])
SWAPPED = ("", "0", "1", "9", "-", "_", '"', "}", ",", "e", "\\", "\x00", "\u00e9")
DATA_KINDS = ("row lost", "row doubled", "rows swapped", "column lost", "null", "value", "type")
RECORDED = ("observation.state", "action", "observation.environment_state", "next.success")
VIDEO_KINDS = ("packet lost", "packet doubled", "times swapped", "rate", "time", "empty")


@dataclass(frozen=True)
class Mutation:
    """What is done to which file of which data set; `where` and `what` are read modulo what is."""

    base: str
    file: int
    structural: bool
    kind: int
    where: int
    what: int


@dataclass
class Base:
    """A good data set."""

    root: Path
    contents: dict[Path, bytes]
    spec: DataSpec
    episodes: dict


class Fuzz:
    """The data sets, and the judge."""

    def __init__(self, folder):
        self.bases = {}
        for name in BASES:
            root = folder / name
            make(root, name)
            contents = {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
            self.bases[name] = Base(root, contents, *read(root))

    def judge(self, mutation):
        """("same", "refused" or "other", file), or ("wrong", what is wrong)."""
        base = self.bases[mutation.base]
        files = list(base.contents)
        path = files[mutation.file % len(files)]
        kind = path.relative_to(base.root).as_posix()
        try:
            apply(mutation, path)
            try:
                spec, episodes = read(base.root)
            except SourceError as error:
                return refused(str(error), base.root) or ("refused", kind)
            return compare(base, path, spec, episodes) or ("same", kind)
        except WrongError as error:
            return ("wrong", f"{kind}: {error}")
        except OtherError:
            return ("other", kind)
        except Exception:
            return ("wrong", f"{kind}: {traceback.format_exc()}")
        finally:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base.contents[path])


class WrongError(Exception):
    """The reader gave what it must not."""


class OtherError(Exception):
    """The reader gave other data, where nothing can tell that it is other."""


def make(root, name):
    demos = make_demos(LENGTHS, size=SIZE, **{"next.success": lambda n: np.arange(n) == n - 1})
    if name in LAYOUTS:
        write_dataset(root, demos, LAYOUTS[name])
        return
    spec = DataSpec(
        task="t",
        fps=30,
        dim_qpos=5,
        dim_action=4,
        dim_env_state=3,
        cameras=("top", "wrist"),
        image_size=SIZE,
    )
    store = root.with_suffix(".zarr")
    with StoreWriter.create(store, spec, {}) as writer:
        for number, demo in enumerate(demos):
            qpos, action, env_state, _ = demo.tables.values()
            images = np.stack(list(demo.frames.values()), axis=1).transpose(0, 1, 4, 2, 3)
            writer.append(
                Episode(
                    qpos=qpos,
                    actions=action,
                    env_state=env_state,
                    images=images,
                    id=number,
                    success=True,
                )
            )
        writer.finalize()
    export_dataset(store, root, images=name == "our-images", video_files_size_in_mb=0.001)
    shutil.rmtree(store)


def read(root):
    """The whole data set: its spec, and arrays by name of every episode."""
    source = open_source(root, IngestOptions())
    episodes = {}
    for id in source.ids:
        episode = source.read(id)
        arrays = dict(episode.checked_tables(source.spec))
        arrays["success"] = np.array(episode.success)
        num_steps = episode.frames.shape[0]
        for camera, name in enumerate(source.spec.cameras):
            half = num_steps // 2
            parts = [
                episode.frames.read(camera, *block) for block in ((0, half), (half, num_steps))
            ]
            arrays[f"images_{name}"] = np.concatenate(parts)
        episodes[id] = arrays
    return source.spec, episodes


def refused(message, root):
    """The refusal of a message that does not help."""
    if str(root) not in message or len(message) > 2000:
        raise WrongError(f"a message that does not name the file, or is endless: {message[:3000]}")


def compare(base, path, spec, episodes):
    """Raises WrongError or OtherError where what was read is not what was written."""
    if spec != base.spec or episodes.keys() != base.episodes.keys():
        raise WrongError(f"{spec} {sorted(episodes)}")
    name = path.relative_to(base.root).as_posix()
    here = episodes_of(base, path)
    images = {"observation.images.top": "images_top", "observation.images.wrist": "images_wrist"}
    different = []
    for id, arrays in episodes.items():
        for key, values in arrays.items():
            expected = base.episodes[id][key]
            if values.shape != expected.shape or values.dtype != expected.dtype:
                raise WrongError(f"episode {id}: {key} is {values.dtype} {values.shape}")
            if not np.array_equal(values, expected):
                different.append((id, key))
    for id, key in different:
        if name.startswith("data/") and not name.startswith("our") and base.root.name[:3] != "our":
            allowed = id in here
            if allowed and key.startswith("images"):
                allowed = all_known(episodes[id][key], base)
        elif name.startswith("videos/"):
            allowed = id in here and any(
                part in images and images[part] == key for part in path.parts
            )
        else:
            allowed = False
        if not allowed:
            raise WrongError(f"episode {id}: {key} changed without a word")
    if different:
        raise OtherError


def all_known(frames, base):
    """Whether every frame is one of the data set's."""
    known = {
        frame.tobytes()
        for arrays in base.episodes.values()
        for key, values in arrays.items()
        if key.startswith("images")
        for frame in values
    }
    return all(frame.tobytes() in known for frame in frames)


def episodes_of(base, path):
    """Ids of the episodes in a file."""
    name = path.stem
    if name.startswith("episode_"):
        return {int(name.removeprefix("episode_"))}
    if not name.startswith("file-") or "meta" in path.parts:
        return set()
    if base.root.name == "our-video" and path.suffix == ".parquet":
        return set(range(len(LENGTHS)))
    # Two a file in v3; our own videos may be split otherwise, so any of them may be hit.
    first = int(name.removeprefix("file-")) * 2
    return set(range(len(LENGTHS))) if base.root.name[:3] == "our" else {first, first + 1}


def apply(mutation, path):
    """Damages a file."""
    if not mutation.structural:
        path.write_bytes(damage(path.read_bytes(), mutation))
    elif path.suffix in (".json", ".jsonl"):
        path.write_text(change_json(path.read_text(), mutation))
    elif path.suffix == ".parquet":
        change_table(path, mutation)
    else:
        try:
            change_video(path, mutation)
        except av.FFmpegError:  # a muxer does not write everything
            path.write_bytes(damage(path.read_bytes(), mutation))


def damage(content, mutation):
    """Bytes changed, lost, added or moved."""
    data, what = bytearray(content), mutation.what
    size = max(len(data), 1)
    # Ends of files hold what matters most.
    where = mutation.where % size if what % 4 else size - 1 - mutation.where % min(size, 400)
    length = 1 + what % 61
    kind = BYTE_KINDS[mutation.kind % len(BYTE_KINDS)]
    other = (where * 7 + what) % size
    if kind == "flip":
        data[where] ^= 1 << what % 8
    elif kind == "set":
        data[where] = what % 256
    elif kind == "zero":
        data[where : where + length] = bytes(min(length, size - where))
    elif kind == "cut":
        del data[where:]
    elif kind == "delete":
        del data[where : where + length]
    elif kind == "insert":
        data[where:where] = np.random.default_rng(what).bytes(length)
    elif kind == "copy":
        data[where : where + length] = data[other : other + length]
    else:
        data[where], data[other] = data[other], data[where]
    return bytes(data)


def leaves(tree):
    """(container, key) of everything in a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from leaves(value)


def change_json(text, mutation):
    """A value replaced, lost or renamed; or a character, where it need not be JSON any more."""
    lines = text.splitlines(keepends=True) if "\n{" in text else [text]
    number = mutation.where % len(lines)
    kind = mutation.kind % 5
    if kind == 4:
        place = mutation.where % len(text)
        return text[:place] + SWAPPED[mutation.what % len(SWAPPED)] + text[place + 1 :]
    if kind == 3 and len(lines) > 1:
        lines[number], lines[0] = lines[0], lines[number]
        return "".join(lines)
    tree = json.loads(lines[number])
    places = list(leaves(tree))
    container, key = places[mutation.where // 7 % len(places)]
    value, old = container[key], key
    if kind == 0:
        value = VALUES[mutation.what % len(VALUES)]
    elif kind == 1 and isinstance(value, int | float) and not isinstance(value, bool):
        value += (-1, 1, 0.25, 1000)[mutation.what % 4]
    elif kind == 2 and isinstance(container, dict):
        key = f"{key}_"
    if isinstance(container, dict):
        # In the same order, which is that of the cameras and said nowhere else.
        items = [(key, value) if name == old else (name, v) for name, v in container.items()]
        container.clear()
        container.update((name, v) for name, v in items if kind != 3 or name != old)
    else:
        container[key] = value
    lines[number] = json.dumps(tree) + "\n"
    return "".join(lines)


def change_table(path, mutation):
    """Rows lost, doubled or swapped, columns lost, values changed to null or others."""
    table = pq.read_table(path)
    rows, what = table.to_pylist(), mutation.what
    kind = DATA_KINDS[mutation.kind % len(DATA_KINDS)]
    row, other = mutation.where % len(rows), (mutation.where + 1 + what) % len(rows)
    name = table.column_names[mutation.where // 5 % table.num_columns]
    if name in RECORDED and kind in ("value", "type"):
        name = "frame_index"  # any other value of those is just as good
    value = rows[row].get(name)
    if kind == "row lost":
        del rows[row]
    elif kind == "row doubled":
        rows.insert(row, rows[row])
    elif kind == "rows swapped":
        rows[row], rows[other] = rows[other], rows[row]
    elif kind == "column lost":
        write(table.drop_columns([name]), path)
        return
    elif kind == "null":
        rows[row][name] = None
    elif kind == "value" and isinstance(value, int | float):
        step = (
            (-1, 1, 0.25, 2**31)[what % 4]
            if isinstance(value, float)
            else (-1, 1, 2, 2**31)[what % 4]
        )
        rows[row][name] = bool(what % 2) if isinstance(value, bool) else value + step
    elif kind == "value" and isinstance(value, str):
        rows[row][name] = value + "x"
    elif kind == "value" and isinstance(value, list):
        rows[row][name] = value[:-1]
    elif kind == "type" and isinstance(value, int | float):
        column = [str(cell[name]) for cell in rows] if what % 2 else [None] * len(rows)
        write(table.set_column(table.column_names.index(name), name, pa.array(column)), path)
        return
    write(pa.Table.from_pylist(rows, table.schema), path)


def write(table, path):
    pq.write_table(table, path, write_page_checksum=True)


def change_video(path, mutation):
    """Packets lost, doubled, or given other times."""
    kind = VIDEO_KINDS[mutation.kind % len(VIDEO_KINDS)]
    if kind == "empty":
        path.write_bytes(b"")
        return
    new = path.with_suffix(".new.mp4")
    with av.open(str(path)) as source, av.open(str(new), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        tick = packets[0].duration or 1
        place, other = mutation.where % len(packets), mutation.what % len(packets)
        if kind == "packet lost":
            del packets[place]
        elif kind == "times swapped":
            a, b = packets[place], packets[other]
            a.pts, b.pts = b.pts, a.pts
        elif kind == "time":
            packets[place].pts += tick // 3
        for packet in packets:
            if kind == "rate":
                packet.pts, packet.dts = packet.pts * 2, packet.dts * 2
            packet.stream = stream
            target.mux(packet)
            if kind == "packet doubled" and packet is packets[place]:
                packet.pts, packet.dts = packet.pts + tick // 2, packet.dts + tick // 2
                target.mux(packet)
    os.replace(new, path)


FUZZ = None


def start(folder):
    """Makes the data sets; the process's first task."""
    global FUZZ
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    FUZZ = Fuzz(Path(folder))


def judge(mutation):
    """The verdict on one mutation."""
    return FUZZ.judge(mutation)
