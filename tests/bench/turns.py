"""Contenders that take turns: what the benches time with, and how they report it.

Whatever else the machine does meets all contenders of a round alike, so a ratio is taken within a
round, and the median over the rounds is reported, with the quartiles.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

PACKAGES = (
    *("act_lightning", "lightning", "torch", "torchvision", "numpy", "zarr", "zstandard", "mujoco"),
    *("lerobot", "gym-aloha", "h5py", "av", "torchcodec", "boto3"),
)
WIDTH = 110
"""Columns of the tables."""
LOAD_AVERAGE = os.getloadavg()[0]
"""When the bench began."""


class Spread(NamedTuple):
    """The middle of some values."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Spread:
        """Of values of any number."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)

    def text(self, digits: int = 2) -> str:
        """Median, and quartiles in parentheses."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} - {self.high:.{digits}f})"


class Goal(NamedTuple):
    """What a measured value should be."""

    name: str
    value: float
    wanted: float
    at_least: bool = True
    """Whether `wanted` is the smallest value that will do; else the largest."""

    @property
    def met(self) -> bool:
        return self.value >= self.wanted if self.at_least else self.value <= self.wanted

    def as_dict(self) -> dict[str, Any]:
        return self._asdict() | {"met": self.met}


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 2,
    turns: int = 1,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, NDArray[np.float64]]:
    """Calls every contender once a round, in a new order each time.

    Args:
        contenders: by name.
        rounds: that count.
        warmup: rounds before, which load kernels, compile and fill caches.
        turns: calls in a row that a contender has in a round; each is timed.
        synchronize: waits for what a call may have left to a GPU.

    Returns:
        (rounds * turns,) seconds of each contender, round after round.
    """
    order, rng = list(contenders), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        rng.shuffle(order)
        for name in order:
            for _ in range(turns):
                start = time.perf_counter()
                contenders[name]()
                synchronize()
                if index >= warmup:
                    seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, GPU, threads, load, versions."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": LOAD_AVERAGE,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def make_parser(doc: str | None, *, data_dir: bool = False) -> ArgumentParser:
    """A command line with `--json`, for `write_report`.

    Args:
        doc: of the script; its first line says what the command does.
        data_dir: whether demonstrations are kept from one time to the next: adds `--data-dir`.
    """
    parser = ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    if data_dir:
        parser.add_argument(
            "--data-dir",
            type=Path,
            default=Path(tempfile.gettempdir()) / "act_lightning_bench",
            help="where the demonstrations are kept for the next time",
        )
    return parser


def print_goals(goals: list[Goal], console: Console) -> None:
    """Says of each goal whether it is met."""
    table = Table("goal", "wanted", "measured", "")
    for goal in goals:
        sign = "≥" if goal.at_least else "≤"
        word = "[green]met[/]" if goal.met else "[red]missed[/]"
        table.add_row(goal.name, f"{sign} {goal.wanted:g}", f"{goal.value:.3g}", word)
    console.print(table)


def write_report(path: Path | None, report: Mapping[str, Any]) -> None:
    """Writes JSON, with the command and what `machine` says; nothing where there is no path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        where = {"command": sys.argv, "machine": machine()}
        path.write_text(json.dumps(where | dict(report), indent=2) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    kinds = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags][:1]
    return " ".join([names[0] if names else platform.machine(), *kinds])
