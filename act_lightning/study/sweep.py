"""The verb `sweep`: trains all runs of a study, on this machine or as a Slurm job array.

Each run is a process of its own, an ordinary `fit`. Runs that are finished are left alone, those
that were interrupted go on from their last checkpoint, those that failed are tried again if asked
for. A sweep can be stopped or killed at any time and called again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from rich import get_console
from rich.live import Live

from act_lightning.slurm_config import check_commands, read_config
from act_lightning.study.resolve import (
    Resolved,
    check_run,
    resolve_study,
    varying_settings,
)
from act_lightning.study.run_state import RunFiles, State, environment_of_slot
from act_lightning.study.slurm import SlurmQueue
from act_lightning.study.study import Study, read_study
from act_lightning.study.sweep_table import Watcher, print_change, print_failures
from act_lightning.tensorboard import write_experiment

POLL_S = 0.5
"""How often the processes are looked at."""


def sweep_verb(args: list[str]) -> None:
    """`sweep STUDY.yaml [--jobs N] [--retry] [--slurm [key=value ...]]`."""
    parser = argparse.ArgumentParser(
        prog="act_lightning sweep", description="Train and evaluate all runs of a study."
    )
    parser.add_argument("study", type=Path, help="as experiments/studies/kl_weight.yaml")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at once: here, where they share cores and GPUs, 1 by default; with --slurm all",
    )
    parser.add_argument("--retry", action="store_true", help="also runs that failed before")
    parser.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="run as a Slurm job array, with what a run needs, as partition=gpu gpus_per_node=1",
    )
    options = parser.parse_args(args)
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs={options.jobs}; give 1 or more")
    slurm = None if options.slurm is None else read_config(options.slurm)
    if slurm is not None:
        check_commands("call sweep where jobs are submitted, or without --slurm to run here")
    study = read_study(options.study)
    resolved = resolve_study(study)
    files = [RunFiles(run) for run in study.runs()]
    _check_folders(files, resolved, options.retry)
    watcher = Watcher(files, {name: settings.max_steps for name, settings in resolved.items()})
    queue = None if slurm is None else SlurmQueue(study, watcher, slurm)
    todo = [file for file in files if _is_due(watcher.state(file), options.retry)]
    describe_in_tensorboard(study, resolved)
    if todo:
        record_demonstrations(study, resolved)
    if queue is None:
        run_here(study, watcher, todo, options.jobs or 1)
    elif not queue.run(todo, options.jobs):
        return
    _conclude(study, watcher)


def describe_in_tensorboard(study: Study, resolved: Mapping[str, Resolved]) -> None:
    """Gives TensorBoard's tab HParams the study's columns: what varies, and what came of it."""
    executions = dict.fromkeys(
        name for settings in resolved.values() for name in settings.executions
    )
    graded = [f"evaluation/{name}/success_rate" for name in executions]
    metrics = [*graded, "rollout/success_rate", "val/l1_prior", "val/kl", "val/active_units"]
    write_experiment(study.folder, varying_settings(study, resolved), metrics)


def record_demonstrations(study: Study, resolved: Mapping[str, Resolved]) -> None:
    """Records what the runs train on, each store once; complete ones are left alone.

    Raises:
        ValueError: two variants record different demonstrations into one store.
    """
    # Here, after torchvision: where MUJOCO_GL is osmesa, importing MuJoCo loads Mesa's LLVM, and
    # triton, which torchvision imports, crashes if it finds that one instead of its own.
    from act_lightning.sim.record import record

    known: dict[str, tuple[str, Resolved]] = {}
    for name, settings in resolved.items():
        path = settings.demonstrations.path
        first, before = known.setdefault(path, (name, settings))
        same = before.demonstrations == settings.demonstrations
        if not same or before.recorded_env != settings.recorded_env:
            raise ValueError(
                f"study {study.name}: {first} and {name} record different demonstrations into "
                f"{path}; set demonstrations.path for each, or what both record under `record`"
            )
    for _, settings in known.values():
        record(settings.demonstrations, settings.recorded_env)


def run_here(study: Study, watcher: Watcher, todo: Sequence[RunFiles], jobs: int) -> None:
    """Runs `fit` for each of `todo`, `jobs` at once, and shows how far they are.

    Ctrl-C and SIGTERM are handed on, so that every run saves what it has, and end the sweep.
    """
    waiting, active = deque(todo), dict[int, tuple[RunFiles, subprocess.Popen[bytes]]]()
    console = get_console()
    with (
        _noting_signals() as noted,
        Live(console=console, auto_refresh=False, transient=True) as live,
    ):
        while (waiting or active) and not noted:
            for slot in range(jobs):
                if slot in active and not _has_ended(*active[slot], watcher):
                    continue
                active.pop(slot, None)
                if (started := _start_next(waiting, slot, jobs, watcher)) is not None:
                    active[slot] = started
            if console.is_terminal:
                live.update(watcher.table(study.title), refresh=True)
            time.sleep(POLL_S)
    if noted:
        for _, process in active.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)  # all its ranks, as a terminal does
        console.print("stopping; each run saves what it has")
        for _, process in active.values():
            process.wait()
        raise KeyboardInterrupt


def _start_next(
    waiting: deque[RunFiles], slot: int, jobs: int, watcher: Watcher
) -> tuple[RunFiles, subprocess.Popen[bytes]] | None:
    """Starts the first waiting run that no other process has."""
    all_cores = sorted(os.sched_getaffinity(0))
    cores = all_cores[slot::jobs] or all_cores
    for _ in range(len(waiting)):
        file = waiting.popleft()
        if file.state() == State.FINISHED:  # by another sweep, meanwhile
            watcher.set(file, State.FINISHED)
            continue
        os.sched_setaffinity(0, cores)  # which the process inherits
        try:
            process = file.start(environment_of_slot(slot, jobs, _gpus(), cores))
        finally:
            os.sched_setaffinity(0, all_cores)
        if process is None:
            watcher.set(file, State.RUNNING)
            waiting.append(file)
            continue
        watcher.set(file, State.RUNNING)
        print_change(watcher, file, "started")
        return file, process
    return None


def _has_ended(file: RunFiles, process: subprocess.Popen[bytes], watcher: Watcher) -> bool:
    exit_code = process.poll()
    if exit_code is None:
        return False
    watcher.set(file, file.ended(exit_code))
    print_change(watcher, file, watcher.state(file))
    return True


def _gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


def _is_due(state: State, retry: bool) -> bool:
    return state not in (State.FINISHED, State.QUEUED) and (retry or state != State.FAILED)


def _check_folders(
    files: Sequence[RunFiles], resolved: Mapping[str, Resolved], retry: bool
) -> None:
    """Sees that what is there was made with the settings of the study."""
    for file in files:
        state = file.state()
        goes_on = state == State.FAILED and retry and file.last_checkpoint.is_file()
        if state in (State.FINISHED, State.INTERRUPTED) or goes_on:
            check_run(file.run, resolved[file.run.variant])


def _conclude(study: Study, watcher: Watcher) -> None:
    """Shows what came of it.

    Raises:
        RuntimeError: runs have failed, or were given up by Slurm or by another sweep.
    """
    console = get_console()
    console.print(watcher.table(study.title))
    print_failures(watcher, console)
    counts = watcher.count()
    if counts[State.FAILED]:
        raise RuntimeError(
            f"{counts[State.FAILED]} of {len(watcher.files)} runs have failed, see above; the same "
            "command with --retry (make: in ARGS) tries them again"
        )
    if unfinished := len(watcher.files) - counts[State.FINISHED]:
        raise RuntimeError(
            f"{unfinished} of {len(watcher.files)} runs are not finished; the same command goes on"
        )
    console.print(f"compare them: make compare STUDY={study.name}", highlight=False)


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Notes Ctrl-C and SIGTERM, which would else come between a run's start and its note here.

    What a sweep started in the background ignores, its runs do not, which have to be stopped by it.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
