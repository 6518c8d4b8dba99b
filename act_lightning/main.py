"""Finds the verb of a command line, runs it, and says in one message what went wrong.

Nothing else is imported before the verb is known: the trainer and the simulator take seconds and
half a gigabyte, and verbs that read or write data sets need neither.
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType, ModuleType

VERBS = {
    "fit": ("cli:fit_verb", "Train, with rollouts, and evaluate at the end."),
    "validate": ("cli:validate_verb", "Validation losses and rollouts."),
    "profile": ("profiling:profile_verb", "Show what a training step spends its time on."),
    "record": ("cli:record_verb", "Record demonstrations in simulation."),
    "ingest": ("ingest.verbs:ingest_verb", "Read demonstrations of another format into a store."),
    "inspect": (
        "study.inspect.verb:inspect_verb",
        "Show what demonstrations hold, and what is wrong with them.",
    ),
    "export-dataset": (
        "lerobot.verbs:export_dataset_verb",
        "Write demonstrations as a LeRobotDataset v3.0.",
    ),
    "evaluate": ("cli:evaluate_verb", "Play a run's policy in the evaluation worlds."),
    "slurm": ("slurm_job:slurm_verb", "Train as a Slurm job, on several nodes."),
    "sweep": ("study.sweep:sweep_verb", "Train all runs of a study."),
    "compare": (
        "study.compare:compare_verb",
        "Compare evaluated runs, world by world; report on a study.",
    ),
    "watch": ("watch:watch_verb", "Play a run's policy in a window, or write a video of it."),
    "import-lerobot": (
        "lerobot.verbs:import_verb",
        "Make a run from a policy folder of LeRobot's ACT.",
    ),
    "export-lerobot": (
        "lerobot.verbs:export_verb",
        "Write a run's policy as a folder that LeRobot opens.",
    ),
}
"""Function of each verb, below this package, and its purpose."""

EXIT_PREEMPTED = 75
"""Exit code of a training that SIGTERM or SIGUSR1 ended, to be started again with
`--ckpt_path last`. It is EX_TEMPFAIL of sysexits.h."""
EXPECTED_ERRORS = (argparse.ArgumentError, OSError, RuntimeError, ValueError)
"""What bad input ends in; anything else is a fault of this program, and shows where it happened."""


def main(args: list[str] | None = None) -> int:
    """Runs a verb. Returns 0 (done), 1 (failed, one clear message) or 2 (bad usage)."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] not in VERBS:
        wanted_help = bool(args) and args[0] in ("-h", "--help")
        print("usage: python -m act_lightning VERB [options]; each VERB has --help\n")
        for verb, (_, purpose) in VERBS.items():
            print(f"  {verb:<14} {purpose}")
        if args and not wanted_help:
            print(f"\nerror: there is no verb {args[0]}", file=sys.stderr)
        return 0 if wanted_help else 2
    module, _, function = VERBS[args[0]][0].partition(":")
    try:
        with _preemptible() if args[0] == "fit" else nullcontext():
            getattr(_import(f"act_lightning.{module}"), function)(args[1:])
    except KeyboardInterrupt:
        print("\ninterrupted; what was complete is kept", file=sys.stderr)
        return 1
    except EXPECTED_ERRORS as error:
        if os.environ.get("ACT_LIGHTNING_TRACEBACK"):
            raise
        print(f"\nerror: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def _import(module: str) -> ModuleType:
    """Imports a module without looking for garbage, of which modules leave none.

    Among the objects of torch and Lightning, looking for it takes long.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _preemptible() -> Iterator[None]:
    """Has the right exit code also while the trainer is imported, which then takes the signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_PREEMPTED)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(error: Exception) -> str:
    """What a user is told of an error."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"{error}. Make room and go on (training: `make resume RUN=...`); what was complete, "
            "the last checkpoint included, is kept"
        )
    return brief(str(error)).strip()


def brief(message: str) -> str:
    """Takes out of jsonargparse's message what says nothing about the mistake."""
    empty = (
        "Does not validate against any of the Union",
        "Subtypes:",
        "Errors:",
        "- Expected a <class 'NoneType'>",
        "- Expected a path but",
        "Given value type:",
    )
    return "\n".join(line for line in message.splitlines() if not line.strip().startswith(empty))
