"""The table that a sweep shows: what each run is doing, how well, and for how much longer."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

from rich import box, get_console
from rich.console import Console
from rich.table import Table

from act_lightning.study.events import RunEvents
from act_lightning.study.run_state import RunFiles, State

RELOAD_S = 5.0
"""How often the event files of a running run are read."""
URGENT = (
    State.RUNNING,
    State.FAILED,
    State.INTERRUPTED,
    State.QUEUED,
    State.WAITING,
    State.FINISHED,
)
"""Order of the rows: a terminal may be too low for all of them."""


class Progress(NamedTuple):
    """How far a run has come; None where that is not known."""

    step: int | None = None
    """Optimizer steps taken."""
    success: float | None = None
    """Success rate: of the evaluation, or of the latest rollouts while training."""
    seconds_left: float | None = None
    """Until training ends, at its pace so far."""


class Watcher:
    """Follows runs by what they write.

    Args:
        files: of each run.
        max_steps: of each run, by variant.
    """

    def __init__(self, files: Sequence[RunFiles], max_steps: Mapping[str, int]) -> None:
        self.files = files
        self.max_steps = max_steps
        self.states = {id(file): file.state() for file in files}
        self._events: dict[int, RunEvents] = {}
        self._progress: dict[int, Progress] = {}
        self._read_at: dict[int, float] = {}

    def set(self, file: RunFiles, state: State) -> None:
        """Says what has become of a run."""
        if state != self.states[id(file)]:
            self.states[id(file)] = state
            self._read_at.pop(id(file), None)

    def state(self, file: RunFiles) -> State:
        """What has become of a run, as far as `set` was told."""
        return self.states[id(file)]

    def count(self) -> Counter[State]:
        """Runs by state."""
        return Counter(self.states.values())

    def progress(self, file: RunFiles) -> Progress:
        """How far a run has come; read again now and then while it runs."""
        key, now = id(file), time.monotonic()
        state = self.states[key]
        outdated = now - self._read_at.get(key, -RELOAD_S) >= RELOAD_S
        if key not in self._read_at or (state == State.RUNNING and outdated):
            self._read_at[key] = now
            self._progress[key] = self._read(file, state)
        return self._progress[key]

    def table(self, title: str) -> Table:
        """All runs, those that matter now first."""
        counts = ", ".join(f"{count} {state}" for state, count in sorted(self.count().items()))
        table = Table(title=f"{title}: {counts}", box=box.SIMPLE, title_justify="left")
        for heading in ("run", "state"):
            table.add_column(heading, no_wrap=True)
        for heading in ("step", "success", "left"):
            table.add_column(heading, no_wrap=True, justify="right")
        for file in sorted(self.files, key=lambda file: URGENT.index(self.state(file))):
            table.add_row(*self.row(file))
        return table

    def row(self, file: RunFiles) -> tuple[str, ...]:
        """Cells of a run."""
        state, progress = self.state(file), self.progress(file)
        left = progress.seconds_left if state == State.RUNNING else None
        return (
            file.name,
            state,
            "" if progress.step is None else f"{progress.step}/{self.max_steps[file.run.variant]}",
            "" if progress.success is None else f"{progress.success:.0%}",
            "" if left is None else str(timedelta(seconds=round(left))),
        )

    def _read(self, file: RunFiles, state: State) -> Progress:
        max_steps = self.max_steps[file.run.variant]
        if state == State.FINISHED:
            try:
                report = json.loads(file.results.read_text())["execution"]
                rates = [summary["success_rate"] for summary in report.values()]
            except (OSError, ValueError, KeyError):  # `compare` says what is wrong with it
                return Progress(max_steps)
            return Progress(max_steps, sum(rates) / len(rates))
        if state == State.WAITING:
            return Progress()
        events = self._events.setdefault(id(file), RunEvents(file.run.folder))
        events.reload()
        loss, success = (events.scalars.get(tag) for tag in ("train/loss", "rollout/success_rate"))
        if loss is None:
            return Progress()
        steps, seconds = int(loss.steps[-1] - loss.steps[0]), loss.times[-1] - loss.times[0]
        left = seconds / steps * (max_steps - loss.steps[-1]) if steps > 0 else None
        return Progress(
            int(loss.steps[-1]), None if success is None else float(success.values[-1]), left
        )


def print_change(watcher: Watcher, file: RunFiles, event: str) -> None:
    """A line for a log file, which has no use for a table that moves."""
    console = get_console()
    if not console.is_terminal:
        name, _, step, success, _ = watcher.row(file)
        details = ", ".join([f"step {step}"] * bool(step) + [f"success {success}"] * bool(success))
        console.print(f"{name} {event}{f' ({details})' if details else ''}", highlight=False)


def print_failures(watcher: Watcher, console: Console) -> None:
    """Says of each failed run what it failed of, and where its output is."""
    for file in watcher.files:
        if watcher.state(file) == State.FAILED:
            console.print(
                f"{file.name} failed: {file.failure()} (see {file.log})",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
