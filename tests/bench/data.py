"""Samples a second of our readers against others, and against the limit of the machine.

    python tests/bench/data.py [--rounds 20] [--sizes 96x96 480x640] [--noise 2] [--json FILE]

Every reader delivers the same samples in random order: joint positions, uint8 pictures of one or
two cameras, the next 100 actions, and which of them are padding; that they are the same is checked
first. Files are in the page cache. Every round each reader takes its turn, in a new order, so that
a load on the machine meets all of them; ratios are taken within a round, and the median over rounds
is reported. Peers run as their training does, in one process and in two loader processes; goals
are measured against the better of the two. The limit is a plain preadv of the same compressed
pictures plus decoding them; see `Limit`.

Run it in the environment that `make lerobot-env` makes, with h5py; a reader that is not installed
is left out, and said to be. LeRobotDataset runs with torchcodec, its own choice, where that is
installed with FFmpeg's libraries (`pip install --no-deps torchcodec`), and with PyAV.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import data_readers as readers
import numpy as np
from data_readers import Reader, Samples, Setting
from data_sets import once, record, size_on_disk, write_hdf5, write_lerobot, write_store
from rich.console import Console
from rich.table import Table
from turns import make_parser, write_report

OURS_ONE, OURS = "ours, 1 thread", "ours, prefetching (2 threads)"
LIMIT_ONE, LIMIT = "limit, 1 thread", "limit, 2 threads"
HDF5, LEROBOT = "HDF5, opened per sample", "LeRobotDataset"
GOALS = {LEROBOT: 5.0, HDF5: 3.0, "limit": 0.6}
"""Our speed over theirs; the better of the rows whose name begins so."""
TURN_SECONDS = 0.15
"""A turn takes about this long, and two batches at least."""

console = Console(width=max(Console().width, 120))


def make_readers(setting: Setting) -> tuple[dict[str, Reader], dict[str, Path]]:
    """The readers by name, and the folder or file that each reads."""
    recorded, cameras = setting.recorded, setting.num_cameras
    folder = recorded.folder
    store = once(folder / "ours.zarr", partial(write_store, recorded))
    raw = folder / "pictures.npy"
    made: dict[str, Reader] = {}
    places: dict[str, Path] = {}

    def add(name: str, place: Path, reader: Callable[[], Reader]) -> None:
        made[name], places[name] = reader(), place

    # Those with processes of their own come first.
    if find_spec("lerobot"):
        write = partial(write_lerobot, recorded, num_cameras=cameras)
        root = once(folder / f"lerobot-{cameras}", write)
        for backend in video_backends():
            samples = partial(readers.LeRobotSamples, setting, root, backend)
            for workers, text in ((2, "2 processes"), (0, "1 process")):
                name = f"{LEROBOT}, {backend}, {text}"
                add(name, root, lambda s=samples, w=workers: readers.Loaded(setting, s(), w))
    if find_spec("h5py"):
        files = once(folder / "hdf5", partial(write_hdf5, recorded))
        for workers, text in ((2, "2 processes"), (0, "1 process")):
            episodes = readers.EpisodeFiles(setting, files)
            name = f"{HDF5}, {text}"
            add(name, files, lambda e=episodes, w=workers: readers.Loaded(setting, e, w))
    add("ours, 2 loader processes", store, lambda: readers.Streaming(setting, store, num_workers=2))
    add(OURS, store, lambda: readers.Streaming(setting, store))
    add(OURS_ONE, store, lambda: readers.OneThread(setting, store))
    add("zarr-python, array[i]", store, lambda: readers.ZarrPython(setting, store))
    add("numpy memory map, raw", raw, lambda: readers.MemoryMap(setting))
    add(LIMIT_ONE, store, lambda: readers.Limit(setting, store, 1))
    add(LIMIT, store, lambda: readers.Limit(setting, store, 2))
    return dict(reversed(made.items())), places


def video_backends() -> list[str]:
    """The one LeRobot chooses by itself, if it works here, and PyAV."""
    try:
        import torchcodec.decoders  # noqa: F401  it may be installed without FFmpeg's libraries
    except (ImportError, OSError, RuntimeError):
        return ["pyav"]
    return ["torchcodec", "pyav"]


def check(name: str, reader: Reader, setting: Setting) -> float | None:
    """Compares some batches with the truth.

    Returns:
        None if they are equal; the pictures' PSNR in dB where they come from a video.

    Raises:
        SystemExit: they are not the same samples.
    """
    errors = []
    for _ in range(3):
        _, batch = reader.take(1)
        steps = np.asarray(batch.qpos)[:, 0].astype(int) if batch.steps is None else batch.steps
        _check_low_dimensional(name, batch, setting, steps)
        truth = setting.recorded.pictures[steps][:, : setting.num_cameras]
        images = np.asarray(batch.images)
        if images.dtype != np.uint8 or images.shape != truth.shape:
            raise SystemExit(f"{name}: pictures are {images.dtype} {images.shape}")
        errors.append(np.mean((images.astype(float) - truth) ** 2))
    error = float(np.mean(errors))
    if error == 0:
        return None
    psnr = float(10 * np.log10(255**2 / error))
    if not name.startswith(LEROBOT) or psnr < 25:
        raise SystemExit(f"{name}: pictures differ, PSNR {psnr:.1f} dB")
    return psnr


def _check_low_dimensional(name: str, batch: Samples, setting: Setting, steps: Any) -> None:
    if batch.qpos is None:
        return
    for key, truth in setting.low_dimensional(steps).items():
        value = np.asarray(getattr(batch, key))
        if value.dtype != truth.dtype or not np.array_equal(value, truth):
            raise SystemExit(f"{name}: {key} differs")


def measure(made: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    """Seconds a batch, by reader and round."""
    turn = {}
    for name, reader in made.items():
        reader.take(reader.ahead + 2)
        turn[name] = max(2, int(TURN_SECONDS / (reader.take(4)[0] / 4)))
    seconds: dict[str, list[float]] = {name: [] for name in made}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(made)).tolist():
            reader = made[name]
            # What was read ahead in the others' turns does not count; when the clock stops as much
            # is being read ahead as when it started, and is done before the next one's turn.
            if reader.ahead:
                reader.take(reader.ahead)
            spent, _ = reader.take(turn[name])
            seconds[name].append(spent / turn[name])
            time.sleep(min(1.0, 2 * reader.ahead * seconds[name][-1]))
    return seconds


def summarise(
    seconds: dict[str, list[float]],
    psnrs: dict[str, float | None],
    places: dict[str, Path],
    setting: Setting,
) -> dict[str, Any]:
    """Speeds, ratios and goals of one setting."""
    rows = []
    for name, values in seconds.items():
        row: dict[str, Any] = {
            "name": name,
            "samples_per_second": setting.batch_size / float(np.median(values)),
            "psnr_db": psnrs[name],
            "bytes": size_on_disk(places[name]),
        }
        for key, one in (("ratio", OURS), ("ratio_1_thread", OURS_ONE)):
            ratios = np.array(values) / np.array(seconds[one])
            row[key] = float(np.median(ratios))
            row[f"{key}_quartiles"] = np.quantile(ratios, [0.25, 0.75]).tolist()
        rows.append(row)
    goals = {}
    for prefix, wanted in GOALS.items():
        ratios = [row["ratio"] for row in rows if row["name"].startswith(prefix)]
        if ratios:
            goals[prefix] = {"wanted": wanted, "ratio": min(ratios), "met": min(ratios) >= wanted}
    height, width = setting.recorded.image_size
    return {
        "image_size": [height, width],
        "cameras": setting.num_cameras,
        "rows": rows,
        "goals": goals,
    }


def print_table(result: dict[str, Any]) -> None:
    """Prints one setting for people."""
    height, width = result["image_size"]
    table = Table(title=f"{height}x{width}, cameras: {result['cameras']}")
    table.add_column("reader", no_wrap=True)
    headings = ("samples/s", "2 threads / it", "quartiles", "1 thread / it", "MB", "note")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["name"],
            f"{row['samples_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{row['ratio_1_thread']:.2f}",
            f"{row['bytes'] / 1e6:,.1f}",
            "" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.1f} dB",
        )
    console.print(table)
    for name, goal in result["goals"].items():
        word = "[green]met[/]" if goal["met"] else "[red]missed[/]"
        console.print(f"  {goal['wanted']:g} times {name}: {goal['ratio']:.2f}, {word}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, data_dir=True)
    parser.add_argument("--rounds", type=int, default=20, help="how often all take their turn")
    parser.add_argument("--sizes", nargs="+", default=["96x96", "120x160", "480x640"])
    parser.add_argument("--cameras", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="of each episode")
    parser.add_argument("--noise", type=float, default=0, help="camera-like, of 255")
    return parser.parse_args()


def main() -> None:
    """Parses the command line, measures, prints."""
    arguments = parse_arguments()
    results = []
    for size in arguments.sizes:
        height, width = map(int, size.split("x"))
        recorded = record(
            arguments.data_dir,
            (height, width),
            arguments.episodes,
            arguments.steps,
            arguments.noise,
        )
        for cameras in arguments.cameras:
            setting = Setting(
                recorded=recorded, num_cameras=cameras, batch_size=arguments.batch_size
            )
            made, places = make_readers(setting)
            try:
                psnrs = {name: check(name, reader, setting) for name, reader in made.items()}
                seconds = measure(made, arguments.rounds)
            finally:
                for reader in made.values():
                    reader.close()
            results.append(summarise(seconds, psnrs, places, setting))
            print_table(results[-1])
    settings = {"batch_size": arguments.batch_size, "noise": arguments.noise}
    write_report(arguments.json, settings | {"settings": results})


if __name__ == "__main__":
    main()
