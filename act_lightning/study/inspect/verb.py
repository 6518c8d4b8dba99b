"""The verb `inspect`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from act_lightning.data.layout import REMEDY, StoreError
from act_lightning.main import VERBS
from act_lightning.new_file import write_file
from act_lightning.study.inspect.analysis import inspect_store
from act_lightning.study.inspect.draw import draw_report
from act_lightning.study.inspect.opening import open_leniently
from act_lightning.study.inspect.report import Limits
from act_lightning.study.inspect.show import print_report


def inspect_verb(args: list[str]) -> None:
    """`inspect STORE | --config FILE ... [--out FILE.png] [--json FILE] [--quick] [--limits ...]`.

    Raises:
        StoreError: the store is damaged; everything that was found is printed before.
    """
    options, location = _parse(args)
    opened = open_leniently(location)
    with _progress(location) as on_progress:
        report = inspect_store(opened, options.limits, quick=options.quick, on_progress=on_progress)
    console = get_console()
    print_report(report, console)
    if options.json is not None:
        document = json.dumps(report.as_dict(), indent=1, allow_nan=False)
        write_file(options.json, document.encode())
        console.print(f"written to {options.json}", highlight=False, soft_wrap=True, markup=False)
    if options.out is not None:
        write_file(options.out, draw_report(opened, report, options.episodes))
        console.print(f"drawn to {options.out}", highlight=False, soft_wrap=True, markup=False)
    if report.damaged:
        places = sum(max(1, len(f.places)) for f in report.findings if f.damaged)
        raise StoreError(f"{location} is damaged at {places} places, named above; {REMEDY}")


def _parse(args: list[str]) -> tuple[argparse.Namespace, str]:
    """The options, and where the store is."""
    parser = argparse.ArgumentParser(
        prog="act_lightning inspect",
        description=f"{VERBS['inspect'][1]} With --config, the experiment's demonstrations.path; "
        "settings, as --demonstrations.path=data/mine.zarr, may follow, and the picture is "
        "runs/<experiment>/demonstrations.png. The exit code is 1 if the store is damaged.",
    )
    parser.add_argument("store", metavar="STORE", nargs="?", help="folder, or s3://bucket/prefix")
    parser.add_argument(
        "--config", action="append", default=[], help="configuration; may be repeated"
    )
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="draw a picture there")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the whole report")
    parser.add_argument(
        "--quick", action="store_true", help="read first, middle and last frames only"
    )
    parser.add_argument(
        "--episodes", metavar="N", type=int, nargs="+", help="draw these; default three, apart"
    )
    names = ", ".join(f"{field.name}={field.default}" for field in fields(Limits))
    parser.add_argument(
        "--limits",
        metavar="NAME=VALUE",
        nargs="+",
        default=[],
        help=f"what is odd, see study/inspect/report.py; default {names}",
    )
    options, settings = parser.parse_known_args(args)
    if (settings and not options.config) or (options.store and options.config):
        extra = settings or [options.store]
        parser.error(f"unrecognized arguments: {' '.join(extra)}; give settings as --NAME=VALUE")
    if not options.store and not options.config:
        parser.error("give a STORE, or an experiment by --config FILE")
    if options.out is not None and options.out.suffix.lower() != ".png":
        parser.error(f"--out {options.out}: give a name that ends in .png")
    options.limits = _limits(options.limits)
    if options.store:
        return options, options.store
    # Late, because the command line imports this module.
    from act_lightning.cli import ConfigReader

    configs = [part for file in options.config for part in ("--config", file)]
    experiment = ConfigReader([*configs, *settings])
    if options.out is None:
        options.out = Path("runs", experiment.config.experiment, "demonstrations.png")
    return options, experiment.config_init.demonstrations.path


def _limits(given: list[str]) -> Limits:
    known = [field.name for field in fields(Limits)]
    values = {}
    for part in given:
        name, _, value = part.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise ValueError(f"--limits {part}: give NAME=NUMBER, as jump=10") from None
        if name not in known:
            raise ValueError(f"--limits {part}: there is no limit {name}; there are {known}")
    return Limits(**values)


@contextmanager
def _progress(location: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar while frames are read, on a terminal; nothing is left of it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
    )
    console = get_console()
    disabled = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disabled) as progress:
        bar = progress.add_task(f"reading {location}", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
