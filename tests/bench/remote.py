"""Samples a second from an object store against local disk, in one interleaved run.

    python tests/bench/remote.py [--rounds 5] [--batches 20] [--latency 0.02] [--json FILE]

The object store is moto's S3 server on loopback (tests/s3_server.py), which shares the cores with
the reader and needs 3 to 4 ms of them for every request: figures over the network are low bounds.
Batches are read by the training stream with two prefetch threads. Each round each contender takes a
few batches; ratios are taken within a round, and the median over rounds is reported. "Mirror cold"
begins every round with an empty mirror.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from turns import make_parser, write_report

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.data.mirror import MirrorConfig
from act_lightning.data.order import FrameSampling, SampleOrder
from act_lightning.data.store import Store
from act_lightning.data.stream import BatchReader, TrainingStream
from act_lightning.data.writer import StoreWriter

sys.path.insert(0, str(Path(__file__).parents[1]))
from s3_server import S3Server

LOCAL = "local disk"
SIZES = ((96, 96), (120, 160), (480, 640))
EPISODE_STEPS = 400


def record(path: Path, size: tuple[int, int], cameras: int, num_frames: int) -> Store:
    """A store whose frames compress about as simulated ones do."""
    names = ("top", "left_wrist", "right_wrist")[:cameras]
    spec = DataSpec(
        task="bench", fps=50, dim_qpos=14, dim_action=14, dim_env_state=0, cameras=names,
        image_size=size,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    num_episodes = -(-num_frames // EPISODE_STEPS)
    with StoreWriter.create(path, spec, {}, num_episodes) as writer:
        for number in range(num_episodes):
            images = np.empty((EPISODE_STEPS, cameras, 3, *size), np.uint8)
            for place in np.ndindex(images.shape[:2]):
                coarse = rng.integers(0, 256, (3, -(-size[0] // 8), -(-size[1] // 8)), np.uint8)
                fine = coarse.repeat(8, axis=1).repeat(8, axis=2)
                images[place] = fine[:, : size[0], : size[1]]
            table = rng.normal(size=(EPISODE_STEPS, 14))
            writer.append(Episode(qpos=table, actions=table, images=images, id=number))
    return Store.open(path)


def make_stream(store: Store, batch_size: int, seed: int) -> TrainingStream:
    """Batches as in training, in an order of their own."""
    reader = BatchReader(
        store=store, chunk_size=100, cameras=store.spec.cameras, use_env_state=False
    )
    order = SampleOrder(FrameSampling(seed=seed, frames=np.arange(store.num_frames)))
    return TrainingStream(reader=reader, order=order, batch_size=batch_size)


def measure(size: tuple[int, int], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Samples a second, by contender and round."""
    with tempfile.TemporaryDirectory() as folder, S3Server() as server:
        os.environ.update(server.environment)
        local = record(Path(folder, "store"), size, arguments.cameras, arguments.frames)
        url = server.upload(Path(folder, "store"), "bench", "store")
        warm = Store.open(url, mirror=MirrorConfig(directory=f"{folder}/warm"))
        shards = len(list(Path(folder, "store").glob("data/images_*/c/*")))
        while len(list(Path(folder, "warm").rglob("data*0"))) < shards:
            warm.read_images(np.arange(0, local.num_frames, 128))
        ranges = Store.open(url, mirror=MirrorConfig(max_gb=0))
        ranges.read_images(np.arange(0, local.num_frames, 128))  # the shards' indices

        def cold(number: int) -> Store:
            return Store.open(url, mirror=MirrorConfig(directory=f"{folder}/cold-{number}"))

        delay = arguments.latency
        contenders: dict[str, tuple[float, Callable[[int], Store]]] = {
            LOCAL: (0, lambda _: local),
            "mirror warm": (delay, lambda _: warm),
            "mirror cold, 0 ms": (0, lambda number: cold(2 * number)),
            f"mirror cold, {1e3 * delay:.0f} ms": (delay, lambda number: cold(2 * number + 1)),
            "ranges, 0 ms": (0, lambda _: ranges),
            f"ranges, {1e3 * delay:.0f} ms": (delay, lambda _: ranges),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(arguments.rounds):
            for name, (latency, open_store) in contenders.items():
                server.set(latency=latency)
                stream = make_stream(open_store(number), arguments.batch_size, seed=number)
                start = time.perf_counter()
                count = sum(len(b.actions) for b in islice(stream, arguments.batches))
                rates[name].append(count / (time.perf_counter() - start))
                stream.close()
        return rates


def summarise(size: tuple[int, int], rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median rate and ratio of each contender."""
    local = np.array(rates[LOCAL])
    return [
        {
            "size": f"{size[0]}x{size[1]}",
            "name": name,
            "samples_per_second": float(np.median(values)),
            "ratio": float(np.median(np.array(values) / local)),
            "ratio_quartiles": np.quantile(np.array(values) / local, [0.25, 0.75]).tolist(),
        }
        for name, values in rates.items()
    ]


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """Prints the rows for people."""
    table = Table(title=title)
    for heading in ("frames", "store", "samples/s", "share of local", "quartiles"):
        table.add_column(heading, justify="left" if heading == "store" else "right")
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["size"],
            row["name"],
            f"{row['samples_per_second']:.0f}",
            f"{row['ratio']:.3f}",
            f"{low:.3f} - {high:.3f}",
            end_section=row["name"].startswith("ranges,") and not row["name"].endswith(" 0 ms"),
        )
    Console().print(table)


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often all take their turn")
    parser.add_argument("--batches", type=int, default=20, help="batches a turn")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cameras", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--frames", type=int, default=4000, help="steps in each store")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before an answer")
    arguments = parser.parse_args()
    rows = [row for size in SIZES for row in summarise(size, measure(size, arguments))]
    print_table(rows, f"{arguments.cameras} camera(s), batches of {arguments.batch_size}")
    write_report(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
