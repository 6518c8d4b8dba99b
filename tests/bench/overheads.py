"""What training costs beside its arithmetic: logging, progress bar, callbacks, waiting for data.

    python tests/bench/overheads.py [--experiments NAME ...] [--rounds 100] [--json FILE]

`fit` trains an experiment as shipped: with its logger, a progress bar on a terminal (whose output
goes nowhere), all callbacks, and the loader reading the store. After every few steps of it a bare
loop takes as many with a copy of the network, on batches in memory: forward, backward, clipping,
optimizer, learning rate. Both run in one process, so whatever else the machine does meets both; the
overhead of a round is what its steps took longer. Rollouts, validations and checkpoints lie between
steps, and are left out. First the two must agree: after the same steps from the same start, weights
may differ by TOLERANCE.

Demonstrations are recorded anew, a few episodes, unless `--data` names a folder that has them.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import rich
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer import Trainer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from turns import WIDTH, Goal, Spread, make_parser, print_goals, write_report

from act_lightning.batch import Batch
from act_lightning.cli import ACTCLI
from act_lightning.data.stream import TrainingStream
from act_lightning.main import main as run_verb
from act_lightning.module import ACTModule

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
GOAL = 0.03
"""Overhead at most, as a share of the bare step."""
TOLERANCE = 1e-6
"""Of weights after the same steps, those of the experiments being of order 1."""

console = Console(width=WIDTH)


class BareLoop:
    """Forward, backward, clipping, optimizer and learning rate, and nothing else.

    Args:
        module: is copied, with the weights that it has now.
        trainer: whose precision and clipping it has.
        batches: taken in turn.
    """

    def __init__(self, module: ACTModule, trainer: Trainer, batches: list[Batch]) -> None:
        self.device = module.device
        self.net = copy.deepcopy(module.net)
        self.module = module
        self.precision = trainer.precision_plugin
        self.max_norm = trainer.gradient_clip_val
        (theirs,) = trainer.optimizers
        ours = iter([p for p in self.net.parameters() if p.requires_grad])
        pairs = dict(
            zip((p for p in module.net.parameters() if p.requires_grad), ours, strict=True)
        )
        groups = [
            {name: value for name, value in group.items() if name != "initial_lr"}
            | {"params": [pairs[p] for p in group["params"]], "lr": group["initial_lr"]}
            for group in theirs.param_groups
        ]
        self.optimizer = type(theirs)(groups)
        factor = trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.batches: Iterator[Batch] = cycle(batches)
        self.step = 0

    def take(self, steps: int, *, seeded: bool = False) -> None:
        """Takes some steps.

        Args:
            steps: how many.
            seeded: whether each draws the random numbers that `ACTModule` does.
        """
        module = self.module
        for batch in islice(self.batches, steps):
            if seeded:
                key = np.random.SeedSequence([module.seed, self.step, 0, 0])
                torch.default_generator.manual_seed(int(key.generate_state(1, np.uint64)[0]))
            batch = module.augmentation(batch.to(self.device), self.net.normalizer.qpos_std)
            with self.precision.forward_context():
                losses = self.net.losses(batch, self.step, module._draw_noise(batch))
            self.optimizer.zero_grad()
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.max_norm)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1

    def difference(self) -> float:
        """The largest difference of a weight from the module's."""
        pairs = zip(self.net.parameters(), self.module.net.parameters(), strict=True)
        return float(torch.stack([(a - b).detach().abs().max() for a, b in pairs]).max())


class Turns(Callback):
    """After every `window` steps of `fit` the bare loop takes as many.

    Args:
        window: steps of a turn.
        warmup: rounds that do not count; the first is the one in which both are compared.

    Attributes:
        whole: seconds a step of `fit` in each round.
        bare: seconds a step of the bare loop.
        waits: seconds a step in which `fit` waited for a batch.
    """

    def __init__(self, window: int, warmup: int) -> None:
        self.whole: list[float] = []
        self.bare: list[float] = []
        self.waits: list[float] = []
        self.difference: float | None = None
        self._window, self._warmup = window, warmup
        self._loop: BareLoop | None = None
        self._start = self._waited = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ACTModule)
        stream = trainer.train_dataloader
        assert isinstance(stream, TrainingStream)
        batches = [stream.batch(step) for step in range(self._window)]
        self._loop = BareLoop(pl_module, trainer, batches)
        self._begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        stream = trainer.train_dataloader
        self._waited += stream.delivered_at - stream.asked_at
        if trainer.global_step % self._window:
            return
        self._wait_for_gpu()
        whole = time.perf_counter() - self._start
        assert self._loop is not None
        start = time.perf_counter()
        self._loop.take(self._window, seeded=self.difference is None)
        self._wait_for_gpu()
        bare = time.perf_counter() - start
        if self.difference is None:
            self.difference = self._loop.difference()
        if trainer.global_step > self._warmup * self._window:
            self.whole.append(whole / self._window)
            self.bare.append(bare / self._window)
            self.waits.append(self._waited / self._window)
        self._begin()

    def _begin(self) -> None:
        self._waited, self._start = 0.0, time.perf_counter()

    @staticmethod
    def _wait_for_gpu() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class TurnsCLI(ACTCLI):
    """`fit`, with the bare loop taking turns."""

    def __init__(self, args: list[str], turns: Turns) -> None:
        self._turns = turns
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self._turns)
        return trainer

    def fit(self, **arguments: Any) -> None:
        self.trainer.fit(**arguments)


def measure(name: str, options: argparse.Namespace, data: Path) -> dict[str, NDArray[np.float64]]:
    """Seconds a step in each round: of `fit`, of the bare loop, and of waiting for data.

    Raises:
        SystemExit: the two do not train the same.
    """
    arguments = [
        f"--config={EXPERIMENTS / 'base.yaml'}",
        f"--config={EXPERIMENTS / name}.yaml",
        f"--demonstrations.path={data / name.replace('/', '_')}.zarr",
        *options.settings,
    ]
    if not options.data:
        arguments.append(f"--demonstrations.episodes={options.episodes}")
        if run_verb(["record", *arguments]):
            raise SystemExit(f"cannot record {name}")
    turns = Turns(options.window, warmup=2)
    steps = options.window * (2 + options.rounds)
    own = {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.limit_val_batches": 0,
        "rollout.episodes": 0,
        "rollout.final_episodes": 0,
    }
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        TurnsCLI(["fit", *arguments, *(f"--{key}={value}" for key, value in own.items())], turns)
    assert turns.difference is not None
    if not turns.difference <= TOLERANCE:
        raise SystemExit(f"{name}: weights differ by {turns.difference:.1e} after the same steps")
    return {part: np.array(getattr(turns, part)) for part in ("whole", "bare", "waits")}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--experiments", nargs="+", default=["insertion_state", "insertion"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--window", type=int, default=10, help="steps of a turn")
    parser.add_argument("--episodes", type=int, default=10, help="recorded for each experiment")
    parser.add_argument("--data", type=Path, help="folder of recorded <experiment>.zarr")
    options, options.settings = parser.parse_known_args()

    table = Table("experiment", "bare step, ms", "step of fit, ms", "data wait, ms", "overhead")
    goals, report = [], {}
    # The bar is drawn, to nowhere: a terminal of ours would scroll the tables away.
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        rich.reconfigure(force_terminal=True, file=nowhere)
        data = options.data.resolve() if options.data else Path(folder)
        for name in options.experiments:
            seconds = measure(name, options, data)
            overhead = Spread.of(seconds["whole"] / seconds["bare"] - 1)
            times = {part: Spread.of(1e3 * values) for part, values in seconds.items()}
            table.add_row(
                name,
                *(times[part].text() for part in ("bare", "whole", "waits")),
                f"{overhead.median:.1%} ({overhead.low:.1%} - {overhead.high:.1%})",
            )
            goals.append(Goal(f"{name}: overhead", overhead.median, GOAL, at_least=False))
            report[name] = {
                "overhead": overhead._asdict(),
                "ms": {part: spread._asdict() for part, spread in times.items()},
            }
    console.print(table)
    print_goals(goals, console)
    whole = {"experiments": report, "goals": [goal.as_dict() for goal in goals]}
    write_report(options.json, whole)


if __name__ == "__main__":
    main()
