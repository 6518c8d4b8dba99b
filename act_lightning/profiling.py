"""What the time of a training step is spent on: a Chrome trace, and a table of the top operators.

`profile` trains as `fit` does, with the same settings, logger and callbacks, but for a few steps
and without validation and rollouts, and keeps no checkpoint.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich import box, get_console
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, schedule

from act_lightning.cli import ACTCLI, run_trainer
from act_lightning.new_file import write_file
from act_lightning.preemption import StopRequest
from act_lightning.run_lock import hold_run

TRACE, TABLE = "trace.json", "operators.txt"
PROFILER_STEPS = 2
"""Steps between warm-up and those recorded, in which the profiler's own start-up shows."""
NUM_OPERATORS = 25
"""Rows of the table."""
_OWN = {
    "trainer.max_steps": "give --steps and --warmup",
    "trainer.val_check_interval": "there is no validation",
    "trainer.limit_val_batches": "there is no validation",
    "rollout.episodes": "there are no rollouts",
    "rollout.final_episodes": "there are no rollouts",
    "ckpt_path": "training starts anew",
}


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are looked at."""

    warmup: int = 6
    """Steps before, in which memory is allocated, files are cached and kernels are chosen."""
    steps: int = 5
    """Steps that are recorded; by default step 10 is among them, whose losses are logged."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.steps < 1:
            raise ValueError(
                f"--warmup={self.warmup} --steps={self.steps}; give 0 or more steps of warm-up, "
                "and 1 or more to record"
            )

    @property
    def max_steps(self) -> int:
        """Steps in all."""
        return self.warmup + PROFILER_STEPS + self.steps


class StepProfiler(Callback):
    """Records some steps of training, from the end of one to the end of the last.

    Args:
        config: which steps.

    Attributes:
        profile: of torch, with what was recorded.
        seconds: that the recorded steps took; None until they are over.
        page_faults: in the recorded steps: pages that the kernel had to provide.
    """

    def __init__(self, config: ProfileConfig) -> None:
        self.profile: profile | None = None
        self.seconds: float | None = None
        self.page_faults = 0
        self._config = config
        self._step = 0
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for the first step that counts."""
        activities = [ProfilerActivity.CPU]
        if pl_module.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        steps = schedule(
            wait=self._config.warmup, warmup=PROFILER_STEPS, active=self._config.steps, repeat=1
        )
        self._step = trainer.global_step
        self.profile = profile(activities=activities, schedule=steps)
        self.profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Goes on to the next step, where this was no part of one."""
        assert self.profile is not None
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        skipped = self._config.max_steps - self._config.steps
        if pl_module.device.type == "cuda" and self._step in (skipped, self._config.max_steps):
            torch.cuda.synchronize(pl_module.device)  # what is queued belongs to the step before
        if self._step == self._config.max_steps:
            self.seconds = time.perf_counter() - self._start
            self.page_faults += _page_faults()
        self.profile.step()
        if self._step == skipped:
            self.page_faults = -_page_faults()
            self._start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the recording."""
        assert self.profile is not None
        self.profile.stop()


class ProfileCLI(ACTCLI):
    """`fit` of a few steps, recorded.

    Args:
        args: those of `fit`.
        stop: when training ends before its last step.
        config: which steps are recorded.
    """

    def __init__(self, args: list[str], stop: StopRequest, config: ProfileConfig) -> None:
        self._profiler = StepProfiler(config)
        self._profile_config = config
        super().__init__(args, stop=stop)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the profiler; no checkpoint is written, also where a signal ends it."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        kept = [each for each in callbacks if not isinstance(each, ModelCheckpoint)]
        trainer.callbacks = [*kept, self._profiler]  # type: ignore[attr-defined]
        return trainer

    def fit(self, **arguments: Any) -> None:
        """Trains, and the first rank writes what it recorded.

        Raises:
            ValueError: the folder is that of a training.
            RuntimeError: training ended too early.
        """
        log_dir = self.trainer.log_dir  # every rank has to ask
        assert log_dir is not None
        folder = Path(log_dir)
        if (folder / "checkpoints").exists():
            raise ValueError(f"{folder} is a training's; give another --run, or none")
        if not self.trainer.is_global_zero:
            self.trainer.fit(**arguments)
            self._leave()
            return
        with hold_run(folder):
            self.trainer.fit(**arguments)
            recorded, seconds = self._profiler.profile, self._profiler.seconds
            if recorded is None or seconds is None:
                raise RuntimeError(
                    f"training ended before step {self._profile_config.max_steps}, so nothing was "
                    "recorded; see trainer.max_time and trainer.max_epochs"
                )
            write_profile(
                folder,
                recorded,
                self._profile_config.steps,
                seconds,
                self._profiler.page_faults,
            )
        self._leave()


def write_profile(
    folder: Path, recorded: profile, steps: int, seconds: float, page_faults: int
) -> None:
    """Writes trace and table, and shows the table.

    Args:
        folder: where to; exists.
        recorded: what torch's profiler has seen.
        steps: recorded.
        seconds: that they took.
        page_faults: that they took.
    """
    part = folder / f"{TRACE}.part"
    recorded.export_chrome_trace(str(part))
    part.replace(folder / TRACE)
    table = operator_table(recorded.key_averages(), steps, seconds)
    # What torch's profiler allocates falls into freed blocks, which are then too small.
    table.caption = (
        f"{page_faults / steps:,.0f} page faults a step, which recording may have caused: on a CPU "
        "operators that write large new tensors, such as fill_, then look slower than they are."
    )
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    write_file(folder / TABLE, text.getvalue().encode())
    get_console().print(table)
    get_console().print(
        f"{folder / TRACE} (open in https://ui.perfetto.dev or chrome://tracing), {folder / TABLE}",
        highlight=False,
        soft_wrap=True,
    )


def operator_table(events: list[FunctionEventAvg], steps: int, seconds: float) -> Table:
    """The operators that took longest, by their own time, without that of those they call.

    That on the GPU, where there is one; kernels count for the operator that launched them.

    Args:
        events: averages of torch's profiler.
        steps: recorded.
        seconds: that they took, the profiler's own share included.
    """
    operators = [e for e in events if e.device_type == DeviceType.CPU and not e.is_user_annotation]
    on_gpu = any(event.self_device_time_total for event in operators)

    def own(event: FunctionEventAvg) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    total = sum(own(event) for event in operators)
    device = "GPU" if on_gpu else "CPU"
    title = f"{steps} steps of {1e3 * seconds / steps:.2f} ms, recording included; "
    title += f"operators: {total / 1e3 / steps:.2f} ms of {device} a step"
    if on_gpu:
        title += f", {total / 1e6 / seconds:.0%} busy"
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("operator, a step", overflow="fold")
    for name in ("calls", "own ms", "share", "with callees", *["own CPU ms"] * on_gpu):
        table.add_column(name, justify="right", no_wrap=True)
    for event in sorted(operators, key=own, reverse=True)[:NUM_OPERATORS]:
        whole = event.device_time_total if on_gpu else event.cpu_time_total
        row = [event.key, f"{event.count / steps:g}", f"{own(event) / 1e3 / steps:.3f}"]
        row += [f"{own(event) / total:.1%}", f"{whole / 1e3 / steps:.3f}"]
        if on_gpu:
            row.append(f"{event.self_cpu_time_total / 1e3 / steps:.3f}")
        table.add_row(*row)
    return table


def _page_faults() -> int:
    """Of this process so far, without those that waited for a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def profile_verb(args: list[str]) -> None:
    """`profile --config FILE ... [--steps N] [--warmup N] [settings of fit]`."""
    parser = argparse.ArgumentParser(
        prog="act_lightning profile",
        description="Show what a training step spends its time on: train a few steps as fit does, "
        "without validation and rollouts, and write a Chrome trace and a table of operators into "
        "runs/<experiment>/profile, or the folder that --run names.",
        epilog="All other arguments are those of fit, see fit --help.",
        allow_abbrev=False,
    )
    default = ProfileConfig()
    parser.add_argument(
        "--steps", type=int, default=default.steps, help=f"recorded (default {default.steps})"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=default.warmup,
        help=f"steps before those (default {default.warmup})",
    )
    options, settings = parser.parse_known_args(args)
    # Where there is no GPU, torch's profiler calls that an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    config = ProfileConfig(steps=options.steps, warmup=options.warmup)
    names = {each.split("=")[0].removeprefix("--") for each in settings if each[:2] == "--"}
    for name in sorted(names & _OWN.keys()):
        raise ValueError(f"--{name} is not for profile: {_OWN[name]}; leave it out")
    own = {
        "trainer.max_steps": config.max_steps,
        "trainer.val_check_interval": config.max_steps,
        "trainer.limit_val_batches": 0,
        "rollout.episodes": 0,
        "rollout.final_episodes": 0,
    }
    run = () if "run" in names else ("--run=profile",)
    arguments = ["fit", *settings, *run, *(f"--{name}={value}" for name, value in own.items())]
    run_trainer(lambda stop: ProfileCLI(arguments, stop, config))
