"""LeRobotDatasets written for tests, from the format's description, by neither LeRobot nor us."""

import io
import json
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 30
HEIGHT, WIDTH = 48, 64
CAMERAS = ("top", "wrist")
BITS = 8
TASK = "put the peg into the socket"
NAMES = ["height", "width", "channels"]
V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
V21_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V21_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


@dataclass
class Demo:
    """One episode as it is written."""

    tables: dict  # feature -> (T, D) float32, or (T,) of another kind
    frames: dict  # camera -> (T, H, W, 3) uint8
    task: str = TASK

    def __len__(self):
        return len(self.tables["action"])


def make_demos(lengths, *, seed=0, cameras=CAMERAS, dims=(5, 4, 3), size=(HEIGHT, WIDTH), **more):
    """Episodes with frames that say which they are: `read_step` finds episode, camera and step."""
    rng = np.random.default_rng(seed)
    names = ("observation.state", "action", "observation.environment_state")
    return [
        Demo(
            tables={
                name: rng.normal(size=(length, dim)).astype(np.float32)
                for name, dim in zip(names, dims, strict=True)
                if dim
            }
            | {key: make(length) for key, make in more.items()},
            frames={
                name: np.stack([draw(size, (number, column, t)) for t in range(length)])
                for column, name in enumerate(cameras)
            },
        )
        for number, length in enumerate(lengths)
    ]


def draw(size, numbers):
    """A smooth picture with `numbers` in rows of black and white squares, one a bit."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    shade = [80 + 60 * np.sin(x / 17 + numbers[2] / 9), 90 + y, 60 + 40 * np.cos((x + y) / 23)]
    frame = np.stack(shade, axis=-1).clip(0, 255).astype(np.uint8)
    square = width // BITS
    for row, number in enumerate(numbers):
        for bit in range(BITS):
            colour = 235 if number >> bit & 1 else 20
            frame[row * square : (row + 1) * square, bit * square : (bit + 1) * square] = colour
    return frame


def read_step(frame):
    """The (episode, camera, step) that `draw` put into a frame."""
    square = frame.shape[1] // BITS
    middle = square // 2
    return tuple(
        sum(
            int(frame[row * square + middle, bit * square + middle].mean() > 128) << bit
            for bit in range(BITS)
        )
        for row in range(3)
    )


def psnr(a, b):
    """Of the worst frame, in dB."""
    errors = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2
    return 10 * np.log10(255**2 / max(errors.reshape(len(errors), -1).mean(axis=1).max(), 1e-9))


@dataclass
class Layout:
    """How to write: which version, videos or images, how many episodes a file."""

    version: str = "v3.0"
    video: bool = True
    codec: str = "libx264"
    options: dict = field(default_factory=lambda: {"crf": "18", "g": "2"})
    episodes_a_file: int = 2
    fps: int = FPS
    chunks_size: int = 1000

    def __str__(self):
        return f"{self.version}-{self.codec if self.video else 'images'}"


def write_dataset(root, demos, layout):
    """Writes a data set."""
    tasks = list(dict.fromkeys(demo.task for demo in demos))
    starts = np.cumsum([0, *map(len, demos)])
    tables = [
        make_table(demo, number, int(starts[number]), tasks.index(demo.task), layout)
        for number, demo in enumerate(demos)
    ]
    (root / "meta").mkdir(parents=True)
    write = write_v3 if layout.version == "v3.0" else write_v21
    info = write(root, demos, tables, tasks, starts, layout)
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))


def make_table(demo, number, start, task_index, layout):
    steps = np.arange(len(demo))
    columns = {key: as_column(values) for key, values in demo.tables.items()}
    if not layout.video:
        for name, frames in demo.frames.items():
            cells = [
                {"bytes": png(frame.tobytes(), frame.shape), "path": f"frame_{t}.png"}
                for t, frame in enumerate(frames)
            ]
            columns[f"observation.images.{name}"] = pa.array(cells)
    columns |= {
        "timestamp": pa.array((steps / layout.fps).astype(np.float32)),
        "frame_index": pa.array(steps),
        "episode_index": pa.array(np.full(len(demo), number)),
        "index": pa.array(steps + start),
        "task_index": pa.array(np.full(len(demo), task_index)),
    }
    return pa.table(columns)


def as_column(values):
    if values.ndim == 1:
        return pa.array(values)
    return pa.array(list(values))


@cache
def png(pixels, shape):
    content = io.BytesIO()
    Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(shape)).save(content, "PNG")
    return content.getvalue()


def encode(path, episodes, layout):
    """Writes one mp4 with all frames of some episodes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(layout.codec, layout.fps, options=layout.options)
        stream.height, stream.width = episodes[0].shape[1:3]
        stream.pix_fmt = "yuv420p"
        for count, pixels in enumerate(np.concatenate(episodes)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = count, Fraction(1, layout.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def features_of(demos, tables, layout):
    kinds = {"float": "float32", "double": "float64"}
    features = {}
    for key, kind in zip(tables[0].column_names, tables[0].schema.types, strict=True):
        values = demos[0].tables.get(key)
        if pa.types.is_struct(kind):
            continue
        inner = kind.value_type if pa.types.is_list(kind) else kind
        shape = list(values.shape[1:]) or [1] if values is not None else [1]
        features[key] = {"dtype": kinds.get(str(inner), str(inner)), "shape": shape, "names": None}
    for name, frames in demos[0].frames.items():
        dtype = "video" if layout.video else "image"
        shape = list(frames.shape[1:])
        features[f"observation.images.{name}"] = {"dtype": dtype, "shape": shape, "names": NAMES}
    return features


def common_info(demos, tables, tasks, layout):
    return {
        "codebase_version": layout.version,
        "robot_type": "aloha",
        "total_episodes": len(demos),
        "total_frames": sum(map(len, demos)),
        "total_tasks": len(tasks),
        "chunks_size": layout.chunks_size,
        "fps": layout.fps,
        "splits": {"train": f"0:{len(demos)}"},
        "features": features_of(demos, tables, layout),
    }


def write_v3(root, demos, tables, tasks, starts, layout):
    rows = []
    for file, first in enumerate(range(0, len(demos), layout.episodes_a_file)):
        here = range(first, min(first + layout.episodes_a_file, len(demos)))
        place = dict(
            zip(("chunk_index", "file_index"), divmod(file, layout.chunks_size), strict=True)
        )
        path = root / V3_DATA.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, tables[0].schema) as writer:
            for number in here:
                writer.write_table(tables[number])
        for name in demos[0].frames if layout.video else ():
            key = f"observation.images.{name}"
            video = root / V3_VIDEO.format(video_key=key, **place)
            encode(video, [demos[number].frames[name] for number in here], layout)
        for number in here:
            begin, end = int(starts[number]), int(starts[number + 1])
            row = {"episode_index": number, "tasks": [demos[number].task], "length": end - begin}
            row |= {"dataset_from_index": begin, "dataset_to_index": end}
            row |= {f"data/{name}": value for name, value in place.items()}
            for name in demos[0].frames if layout.video else ():
                key = f"videos/observation.images.{name}"
                row |= {f"{key}/{part}": value for part, value in place.items()}
                row[f"{key}/from_timestamp"] = (begin - int(starts[first])) / layout.fps
                row[f"{key}/to_timestamp"] = (end - int(starts[first])) / layout.fps
            rows.append(row | {"stats/action/count": [end - begin]})
    episodes = root / "meta/episodes/chunk-000/file-000.parquet"
    episodes.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), episodes)
    table = pa.table({"task_index": range(len(tasks)), "__index_level_0__": tasks})
    pq.write_table(table, root / "meta/tasks.parquet")
    info = common_info(demos, tables, tasks, layout)
    limits = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
    paths = {"data_path": V3_DATA, "video_path": V3_VIDEO if layout.video else None}
    return info | limits | paths


def write_v21(root, demos, tables, tasks, starts, layout):
    for number, (demo, table) in enumerate(zip(demos, tables, strict=True)):
        place = {"episode_chunk": number // layout.chunks_size, "episode_index": number}
        path = root / V21_DATA.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        for name in demo.frames if layout.video else ():
            key = f"observation.images.{name}"
            encode(root / V21_VIDEO.format(video_key=key, **place), [demo.frames[name]], layout)
    info = common_info(demos, tables, tasks, layout)
    episodes = [
        {"episode_index": number, "tasks": [demo.task], "length": len(demo)}
        for number, demo in enumerate(demos)
    ]
    stats = [
        {"episode_index": number, "stats": stats_of(demo, table, info["features"])}
        for number, (demo, table) in enumerate(zip(demos, tables, strict=True))
    ]
    listed = [{"task_index": number, "task": task} for number, task in enumerate(tasks)]
    for name, lines in (("episodes", episodes), ("episodes_stats", stats), ("tasks", listed)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / f"meta/{name}.jsonl").write_text(text)
    videos = len(demos) * len(demos[0].frames) if layout.video else 0
    return info | {
        "total_chunks": (len(demos) - 1) // layout.chunks_size + 1,
        "total_videos": videos,
        "data_path": V21_DATA,
        "video_path": V21_VIDEO if layout.video else None,
    }


def stats_of(demo, table, features):
    """Minimum, maximum, mean, deviation and count of every feature, as v2.1 has them."""
    stats = {}
    for key, feature in features.items():
        if feature["dtype"] in ("image", "video"):
            frames = demo.frames[key.removeprefix("observation.images.")] / 255
            values, axes, shape = frames, (0, 1, 2), (3, 1, 1)
        else:
            values, axes, shape = np.array(table[key].to_pylist(), float), 0, None
            values = values.reshape(len(values), -1)
        stats[key] = {
            name: getattr(values, name)(axis=axes).reshape(shape or -1).tolist()
            for name in ("min", "max", "mean", "std")
        } | {"count": [len(values)]}
    return stats
