"""How cost grows: training steps with cameras, chunk and batch, and reading with the episodes.

    python tests/bench/growth.py [--rounds 9] [--parts steps full data] [--image-size 24 32]

`steps`: our training step (loss, backward pass, clipping, fused AdamW; bfloat16 where the hardware
has it, as `fit` chooses) of experiments/insertion.yaml's network on its 120x160 pictures, against
1 to 4 cameras, chunks of 10 to 400 and batches of 1 to 64; and of experiments/insertion_state.yaml,
which has no pictures to hide the transformer behind, against the same chunks and batches. `full`:
the paper's network on 480x640 pictures, against 1 to 4 cameras, at a batch of FULL_BATCH.

All sizes of an axis take turns. "Linear or better": a camera, action or sample costs, where there
are most of them, at most MARGIN more than where it is cheapest; what it costs is taken within a
round, by the first's.
The column "slope" is that of the logarithms from one size to the next: above 1 the next ones will
be dearer than linear.

`data`: samples a second of our loader against 10 to 10,000 episodes of EPISODE_STEPS steps, as
training reads (threads read ahead) and in one thread; seconds to open the store and up to the first
batch. "Constant": with the most episodes at most MARGIN slower than with the fewest. Pictures are
24x32 by default, which leaves nothing to hide behind; `--image-size 120 160` are those of
experiments/insertion.yaml, 4 GB of them. The stores are written once, by our writer, which is timed
by the episode while it does. Files are in the page cache.

Before anything is timed, the loss in bfloat16 is compared with float32, and what is read with what
was written.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import FULL, INSERTION, INSERTION_STATE, Size
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from turns import WIDTH, Goal, Spread, make_parser, print_goals, take_turns, write_report

from act_lightning.batch import Batch, DataSpec
from act_lightning.cli import has_bfloat16
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.episode import Episode
from act_lightning.data.store import Store
from act_lightning.data.writer import StoreWriter
from act_lightning.memory import keep_freed_memory
from act_lightning.nets.act import ACT

MARGIN = 0.1
LOSS_TOLERANCE = 0.02
"""Of the loss in bfloat16, relative to that in float32."""
CAMERAS, CHUNKS, BATCHES = (1, 2, 3, 4), (10, 25, 50, 100, 200, 400), (1, 4, 16, 64)
FULL_BATCH = 2
NUM_EPISODES = (10, 100, 1000, 10_000)
EPISODE_STEPS = 20
PICTURES = 64
"""Different ones; step i shows number i modulo this."""
SMALL = (24, 32)
"""Rows and columns of pictures that cost next to nothing to read."""
READ = {"batch_size": 32, "chunk_size": 10}
READ_BATCHES = 60
"""A turn of a loader."""
READ_WARMUP = 16
"""Turns that do not count: they read from all 3125 shards of the largest store, as a first pass of
training does, after which their indexes are in memory."""

console = Console(width=WIDTH)


# ---- steps --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Sizes that differ in one number only."""

    name: str
    unit: str
    sizes: dict[int, Size]
    rounds: int | None = None
    """Fewer where a step takes seconds."""


def make_axes(parts: Sequence[str]) -> list[Axis]:
    """The axes of `steps` and `full`."""
    axes = []
    if "steps" in parts:
        cameras = {count: replace(INSERTION, cameras=count) for count in CAMERAS}
        axes.append(Axis(name="insertion, cameras", unit="camera", sizes=cameras))
        for name, size in (("insertion", INSERTION), ("insertion_state", INSERTION_STATE)):
            chunks = {
                count: replace(size, config=replace(size.config, chunk_size=count))
                for count in CHUNKS
            }
            batches = {count: replace(size, batch_size=count) for count in BATCHES}
            axes.append(Axis(name=f"{name}, chunk", unit="action", sizes=chunks))
            axes.append(Axis(name=f"{name}, batch", unit="sample", sizes=batches))
    if "full" in parts:
        full = replace(FULL, batch_size=FULL_BATCH)
        cameras = {count: replace(full, cameras=count) for count in (1, 2, 4)}
        axes.append(Axis(name="full size, cameras", unit="camera", sizes=cameras, rounds=3))
    return axes


def autocast() -> Any:
    """The precision that `fit` chooses on a CPU."""
    return torch.autocast("cpu", torch.bfloat16) if has_bfloat16("cpu") else nullcontext()


class Step:
    """A network in training, and a batch."""

    def __init__(self, size: Size) -> None:
        self.net: ACT = size.build().train()
        self.batch = size.batch()
        self.noise = torch.randn(len(self.batch), self.net.dim_noise)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        with autocast():
            loss = self.net.losses(self.batch, 0, self.noise)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def check(self, name: str) -> float:
        """Relative difference of the loss from float32.

        Raises:
            SystemExit: it is too large.
        """
        self.net.eval()  # dropout draws anew each time
        plain = float(self.net.losses(self.batch, 0, self.noise)["loss"])
        with autocast():
            error = abs(float(self.net.losses(self.batch, 0, self.noise)["loss"]) / plain - 1)
        self.net.train()
        if not error <= LOSS_TOLERANCE:
            raise SystemExit(f"{name}: the loss is {error:.2g} off float32")
        return error


def measure_axis(axis: Axis, rounds: int) -> dict[str, Any]:
    """Times all sizes of an axis, in turns."""
    steps = {f"{count}": Step(size) for count, size in axis.sizes.items()}
    errors = [step.check(f"{axis.name} {name}") for name, step in steps.items()]
    seconds = take_turns(steps, axis.rounds or rounds, warmup=1 if axis.rounds else 2)
    counts = list(axis.sizes)
    medians = [Spread.of(1e3 * seconds[f"{count}"]) for count in counts]
    units = {count: seconds[f"{count}"] / count for count in counts}
    relative = {count: Spread.of(values / units[counts[0]]) for count, values in units.items()}
    slopes = [
        math.log(after.median / before.median) / math.log(larger / smaller)
        for before, after, smaller, larger in zip(
            medians, medians[1:], counts, counts[1:], strict=False
        )
    ]
    return {
        "name": axis.name,
        "unit": axis.unit,
        "loss_error": max(errors),
        "rows": [
            {
                "count": count,
                "ms": ms._asdict(),
                "per_unit": relative[count]._asdict(),
                "slope": slope,
            }
            for count, ms, slope in zip(counts, medians, [None, *slopes], strict=True)
        ],
        "fitted_slope": float(
            np.polyfit(np.log(counts), [math.log(ms.median) for ms in medians], 1)[0]
        ),
        "ratio": relative[counts[-1]].median / min(one.median for one in relative.values()),
    }


def print_axis(axis: dict[str, Any]) -> None:
    """Prints an axis for people."""
    table = Table(title=f"{axis['name']}: a training step")
    unit = f"a {axis['unit']}" if axis["unit"] != "action" else "an action"
    for heading in ("", "ms (quartiles)", f"{unit}, of the first's", "slope"):
        table.add_column(heading, justify="right")
    for row in axis["rows"]:
        slope = "" if row["slope"] is None else f"{row['slope']:.2f}"
        table.add_row(
            f"{row['count']}",
            Spread(**row["ms"]).text(1),
            Spread(**row["per_unit"]).text(3),
            slope,
        )
    table.add_row("", "", "all, fitted", f"{axis['fitted_slope']:.2f}", style="dim")
    console.print(table)


# ---- data ---------------------------------------------------------------------------------------


def pictures(image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """(PICTURES, 1, 3, H, W) of noise that compresses about as well as a simulator's pictures."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 8, (PICTURES, 1, 3, *image_size), dtype=np.uint8)


def tables(steps: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """qpos and actions of steps counted over all episodes: they tell which step it is."""
    qpos = (steps[..., None] + np.arange(14) / 16).astype(np.float32)
    return qpos, qpos + np.float32(0.5)


def write(path: Path, num_episodes: int, image_size: tuple[int, int]) -> float | None:
    """Writes a store, if it is not there; returns the milliseconds an episode took."""
    if path.exists():
        return None
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    spec = DataSpec(
        task="insertion",
        fps=50,
        dim_qpos=14,
        dim_action=14,
        cameras=("top",),
        image_size=image_size,
    )
    shown = pictures(image_size)
    start = time.perf_counter()
    with StoreWriter.create(part, spec, {"made_by": "tests/bench/growth.py"}, num_episodes) as to:
        for number in range(num_episodes):
            steps = np.arange(EPISODE_STEPS) + number * EPISODE_STEPS
            qpos, actions = tables(steps)
            to.append(
                Episode(
                    qpos=qpos,
                    actions=actions,
                    images=shown[steps % PICTURES],
                    id=number,
                    success=True,
                )
            )
    part.rename(path)
    return 1e3 * (time.perf_counter() - start) / num_episodes


class Loader:
    """Our stream of training batches from one store."""

    def __init__(self, path: Path, prefetch: int) -> None:
        self._data = ACTDataModule(path=str(path), val_fraction=0.0, prefetch=prefetch, **READ)
        self._data.setup("fit")
        self._image_size = self._data.spec.image_size
        self._stream = self._data.train_dataloader()
        self._batches: Iterator[Batch] = iter(self._stream)

    def __call__(self) -> None:
        for _ in range(READ_BATCHES):
            next(self._batches)

    def check(self) -> None:
        """Compares a batch with what was written.

        Raises:
            SystemExit: it is something else.
        """
        batch = next(self._batches)
        images = batch.observation.images
        assert images is not None
        steps = batch.observation.qpos[:, 0].numpy().astype(np.int64)
        qpos, _ = tables(steps)
        last = (steps // EPISODE_STEPS + 1)[:, None] * EPISODE_STEPS - 1
        wanted = steps[:, None] + np.arange(READ["chunk_size"])
        _, actions = tables(np.minimum(wanted, last))
        if not (
            np.array_equal(batch.observation.qpos, qpos)
            and np.array_equal(images, pictures(self._image_size)[steps % PICTURES])
            and np.array_equal(batch.actions, actions)
            and np.array_equal(batch.is_pad, wanted > last)
        ):
            raise SystemExit("a batch is not what was written")

    def close(self) -> None:
        """Ends its threads."""
        self._stream.close()


def measure_data(rounds: int, folder: Path, image_size: tuple[int, int]) -> dict[str, Any]:
    """Times reading of all stores, in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = image_size
    paths = {
        count: folder / f"growth-{count}x{EPISODE_STEPS}-{height}x{width}.zarr"
        for count in NUM_EPISODES
    }
    written = {count: write(path, count, image_size) for count, path in paths.items()}
    for path in paths.values():
        _into_page_cache(path)
    reading = {
        "reading ahead": _read_in_turns(paths, rounds, prefetch=2),
        "in one thread": _read_in_turns(paths, rounds, prefetch=0),
    }
    opening = take_turns(
        {f"{n}": lambda p=path: Store.open(p) for n, path in paths.items()}, rounds
    )
    beginning = take_turns({f"{n}": lambda p=path: _begin(p) for n, path in paths.items()}, rounds)
    samples = READ_BATCHES * READ["batch_size"]
    rows = []
    for count in NUM_EPISODES:
        rows.append(
            {
                "episodes": count,
                "write_ms_an_episode": written[count],
                "open_ms": Spread.of(1e3 * opening[f"{count}"])._asdict(),
                "first_batch_ms": Spread.of(1e3 * beginning[f"{count}"])._asdict(),
                "samples_a_second": {
                    name: Spread.of(samples / seconds[f"{count}"])._asdict()
                    for name, seconds in reading.items()
                },
            }
        )
    first, last = f"{NUM_EPISODES[0]}", f"{NUM_EPISODES[-1]}"
    return {
        "image_size": image_size,
        "rows": rows,
        "speed_ratio": {
            name: Spread.of(seconds[first] / seconds[last]).median
            for name, seconds in reading.items()
        },
    }


def _read_in_turns(
    paths: dict[int, Path], rounds: int, prefetch: int
) -> dict[str, NDArray[np.float64]]:
    loaders = {f"{count}": Loader(path, prefetch) for count, path in paths.items()}
    try:
        for loader in loaders.values():
            loader.check()
        return take_turns(loaders, rounds, warmup=READ_WARMUP)
    finally:
        for loader in loaders.values():
            loader.close()


def _into_page_cache(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            file.read_bytes()


def _begin(path: Path) -> None:
    """Everything up to the first batch."""
    loader = Loader(path, 0)
    next(loader._batches)
    loader.close()


def print_data(data: dict[str, Any]) -> None:
    """Prints the stores for people."""
    rows, columns = data["image_size"]
    table = Table(title=f"reading {rows}x{columns} pictures, by episodes in the store")
    names = list(data["speed_ratio"])
    headings = (
        "episodes",
        *(f"samples/s, {name}" for name in names),
        "open, ms",
        "first batch, ms",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in data["rows"]:
        table.add_row(
            f"{row['episodes']:,}",
            *(Spread(**row["samples_a_second"][name]).text(0) for name in names),
            Spread(**row["open_ms"]).text(0),
            Spread(**row["first_batch_ms"]).text(0),
        )
    console.print(table)
    for row in data["rows"]:
        if row["write_ms_an_episode"] is not None:
            text = f"{row['episodes']:,} episodes written, {row['write_ms_an_episode']:.1f} ms each"
            console.print(text, highlight=False)


# ---- all ----------------------------------------------------------------------------------------


def find_goals(axes: list[dict[str, Any]], data: dict[str, Any] | None) -> list[Goal]:
    """What should be linear, and what constant."""
    goals = [
        Goal(
            f"{axis['name']} {axis['rows'][0]['count']} to {axis['rows'][-1]['count']}: "
            f"cost of one {axis['unit']}, last over cheapest",
            axis["ratio"],
            1 + MARGIN,
            at_least=False,
        )
        for axis in axes
    ]
    if data is not None:
        span = f"{NUM_EPISODES[0]} to {NUM_EPISODES[-1]:,} episodes"
        goals += [
            Goal(f"{span}: samples a second {name}, last over first", ratio, 1 - MARGIN)
            for name, ratio in data["speed_ratio"].items()
        ]
    return goals


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, data_dir=True)
    parser.add_argument("--rounds", type=int, default=9, help="how often all take their turn (9)")
    parser.add_argument(
        "--parts", nargs="+", choices=("steps", "full", "data"), default=["steps", "full", "data"]
    )
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        default=SMALL,
        metavar=("ROWS", "COLUMNS"),
        help="of the pictures of `data`",
    )
    return parser.parse_args()


def main() -> None:
    """Parses the command line, measures, prints."""
    options = parse_arguments()
    keep_freed_memory()  # as `fit` does
    axes = []
    for axis in make_axes(options.parts):
        axes.append(measure_axis(axis, options.rounds))
        print_axis(axes[-1])
    data = None
    if "data" in options.parts:
        data = measure_data(options.rounds, options.data_dir, tuple(options.image_size))
        print_data(data)
    goals = find_goals(axes, data)
    print_goals(goals, console)
    report = {"axes": axes, "data": data, "goals": [goal.as_dict() for goal in goals]}
    write_report(options.json, report)


if __name__ == "__main__":
    main()
