"""Seconds that commands take: `--help`, and a training that exits after its first step.

    python tests/bench/start.py [--rounds 5] [--json FILE]

`fit` is that of an experiment as shipped, from four demonstrations that are there already, with a
callback that notes the time after the first step and exits. Commands take turns; files are in the
page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from turns import WIDTH, Goal, Spread, make_parser, print_goals, take_turns, write_report

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("insertion_state", "insertion")
EPISODES = 4
HELP_S, STEP_S = 1.5, 8.0
"""Goals."""


def run(folder: Path, *arguments: str) -> None:
    """Runs a verb in a folder of its own, quietly."""
    command = [sys.executable, "-m", "act_lightning", *arguments]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    env = os.environ | {"PYTHONPATH": paths, "START_MARK": str(folder / "mark")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def settings(experiment: str) -> list[str]:
    """The experiment as shipped, with a few demonstrations."""
    return [
        *(f"--config={ROOT / 'experiments' / name}.yaml" for name in ("base", experiment)),
        f"--demonstrations.path={experiment}.zarr",
        f"--demonstrations.episodes={EPISODES}",
    ]


def first_step(folder: Path, experiment: str) -> None:
    """Trains one step."""
    mark = folder / "mark"
    mark.unlink(missing_ok=True)
    start = time.monotonic()
    run(folder, "fit", *settings(experiment), "--trainer.callbacks+=start_mark.FirstStep")
    if not start < float(mark.read_text()) <= time.monotonic():
        sys.exit(f"{experiment}: no step was taken")


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often all take their turn")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for experiment in EXPERIMENTS:
            run(folder, "record", *settings(experiment))
        contenders = {"--help": partial(run, folder, "--help")}
        contenders |= {each: partial(first_step, folder, each) for each in EXPERIMENTS}
        seconds = take_turns(contenders, arguments.rounds, warmup=1)
    table = Table("", "s (quartiles)", title="from the command on")
    report: dict[str, Any] = {}
    goals = []
    for name, values in seconds.items():
        spread = Spread.of(values)
        table.add_row(name, spread.text())
        report[name] = spread._asdict()
        goals.append(Goal(name, spread.median, HELP_S if name == "--help" else STEP_S, False))
    console = Console(width=WIDTH)
    console.print(table)
    print_goals(goals, console)
    write_report(arguments.json, {"seconds": report, "goals": [goal.as_dict() for goal in goals]})


if __name__ == "__main__":
    main()
