"""The verbs of the trainer and the simulator.

`fit` and `validate` are LightningCLI's own; `record` and `evaluate` read the same configuration. An
experiment is `--config experiments/base.yaml --config experiments/<name>.yaml`; what two parts must
agree on (chunk size, cameras, paths, seeds) is linked here, so it can be set in one place only.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
    SIGTERMException,
)

from act_lightning.callbacks import RolloutCallback
from act_lightning.checkpoint import (
    AtomicCheckpointIO,
    LastCheckpoint,
    Reached,
    best_checkpoint,
    put_in_place,
    resume_point,
)
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.wait import DataWait
from act_lightning.evaluation import evaluate_run, find_checkpoint, read_executions
from act_lightning.event_files import cut_events
from act_lightning.latent import LatentCallback
from act_lightning.launch import LaunchConfig, given_devices, settle
from act_lightning.main import brief
from act_lightning.memory import keep_freed_memory
from act_lightning.module import ACTModule
from act_lightning.nets.inference import multiplies_bfloat16
from act_lightning.prediction import PredictionCallback
from act_lightning.preemption import StopRequest
from act_lightning.progress import TrainingProgress
from act_lightning.provenance import finish_provenance
from act_lightning.rank_process import as_rank, lost_another, this_rank
from act_lightning.run_config import RunConfig
from act_lightning.run_lock import hold_run
from act_lightning.sim import num_cpus
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.ranks import together
from act_lightning.sim.record import RecordConfig, record
from act_lightning.sim.splits import SPLITS, STANDARD, split_env
from act_lightning.tensorboard import finish_run

WORLD_SECTIONS = ("env", "demonstrations", "rollout")


class Parser(LightningArgumentParser):
    """Says what is wrong with an argument, without 100 lines of all those that exist."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        if not self.exit_on_error:  # the caller tries something else, or makes its own message
            super().error(message, ex)
        where = "--help lists all settings, --model.net.help=CLASS_PATH those of a network"
        rank = this_rank()
        of = f" on {rank}" if rank else ""
        self.exit(2, f"\nerror{of}: {brief(message)}\n{where}\n")


class ACTCLI(LightningCLI):
    """LightningCLI with the sections `env`, `demonstrations` and `rollout`."""

    def __init__(
        self,
        args: list[str],
        run: bool = True,
        exit_on_error: bool = True,
        stop: StopRequest | None = None,
    ) -> None:
        _quieten()
        self.arguments = args
        self.stop = stop or StopRequest()
        self._reached: Reached | None = None
        # Help shows what stands below our settings' fields; reading it costs other calls seconds.
        asks_for_help = any(arg in ("-h", "--help") or ".help" in arg for arg in args)
        set_parsing_settings(docstring_parse_attribute_docstrings=asks_for_help)
        super().__init__(
            ACTModule,
            ACTDataModule,
            args=args,
            run=run,
            parser_class=Parser,
            parser_kwargs={"exit_on_error": exit_on_error},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=RunConfig,
            # A requeued or resumed run writes its config again.
            save_config_kwargs={"overwrite": True, "arguments": args[1:]},
            trainer_defaults={"callbacks": [TrainingProgress()]},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's verbs that this project uses."""
        skipped = {"model", "datamodule"}
        return {
            "fit": {"train_dataloaders", "val_dataloaders"} | skipped,
            "validate": {"dataloaders"} | skipped,
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds our sections, and links what must agree."""
        parser.add_argument("--experiment", type=str, default="unnamed", help="Name; runs/<name>.")
        parser.add_argument(
            "--run", type=str | None, default=None, help="Folder of the run; default version_<n>."
        )
        _add_world_sections(parser)
        parser.add_class_arguments(LaunchConfig, "launch")
        parser.link_arguments(("experiment", "run"), "trainer.logger", compute_fn=_logger)
        parser.link_arguments("demonstrations.path", "data.path")
        parser.link_arguments("env.cameras", "data.cameras")
        parser.link_arguments("env.env_state", "data.use_env_state")
        parser.link_arguments("model.net.init_args.chunk_size", "data.chunk_size")
        for section in ("model", "data"):
            parser.link_arguments("seed_everything", f"{section}.seed", compute_fn=int)
        parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")
        parser.link_arguments("data.stats", "model.stats", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the arguments of `main`, without LightningCLI's guess at where they come from."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)
        section = self.config.get(self.config.get("subcommand")) or self.config
        if section.get("ckpt_path"):  # read here: Lightning's errors name neither file nor remedy
            run = section.run and Path("runs", section.experiment, section.run)
            section.ckpt_path, self._reached = resume_point(section.ckpt_path, run)
            if section.ckpt_path is None and self.config.get("subcommand") == "validate":
                raise ValueError(
                    f"--ckpt_path=last: {run} has no checkpoint; give the --experiment and --run "
                    "of one that has"
                )

    def before_instantiate_classes(self) -> None:
        """Chooses bfloat16 where the hardware has it, and sees that training ends validated."""
        trainer = (self.config[self.subcommand] if self.subcommand else self.config).trainer
        given_devices(trainer.devices)  # or it says what is wrong, before data are opened
        if trainer.precision is None:
            trainer.precision = "bf16-mixed" if has_bfloat16(trainer.accelerator) else "32-true"
        for callback in trainer.callbacks or ():
            if callback.class_path.endswith("WeightAveraging"):
                # All buffers here are constants; an average of one is off by rounding.
                callback.init_args.use_buffers = False
        steps, interval = trainer.max_steps, trainer.val_check_interval
        if steps > 0 and isinstance(interval, int):
            trainer.val_check_interval = interval = min(interval, steps)
            if steps % interval:
                raise ValueError(
                    f"trainer.max_steps={steps} is not a multiple of trainer.val_check_interval="
                    f"{interval}: the last {steps % interval} steps would never be validated; "
                    "change one of the two"
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds what every run has: checkpoints, the wait for data, and a look at the latent."""
        trainer = self._section("trainer")
        trainer.callbacks = [
            *(trainer.callbacks or []),
            DataWait(),
            LatentCallback(),
            PredictionCallback(),
            best_checkpoint(with_rollouts=self._section("rollout").episodes > 0),
            LastCheckpoint(self.stop),
        ]
        trainer.plugins = [*(trainer.plugins or []), AtomicCheckpointIO()]
        if isinstance(trainer.val_check_interval, int):
            # Steps, as `max_steps`; Lightning counts batches.
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        settle(trainer, self.arguments, self._section("launch"))
        return super().instantiate_trainer(**kwargs)

    def fit(self, **arguments: Any) -> None:
        """Trains, then grades the best checkpoint on worlds that nothing has seen before.

        Raises:
            SIGTERMException: it was asked to end.
        """
        logger = self.trainer.logger
        with ExitStack() as stack:
            if self.trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                stack.enter_context(hold_run(Path(logger.log_dir)))
                put_in_place(Path(logger.log_dir, "checkpoints"), arguments.get("ckpt_path"))
                if self._reached is not None:
                    cut_events(Path(logger.log_dir), **self._reached._asdict())
            self.trainer.fit(**arguments)
            if self.stop.is_asked_of_any():
                raise SIGTERMException
            self._grade()
            self._leave()

    def _leave(self) -> None:
        """Ends with the other ranks."""
        if dist.is_available() and dist.is_initialized():
            # While the interpreter ends, gloo's threads may abort the process of a finished run.
            dist.barrier()
            dist.destroy_process_group()

    def _grade(self) -> None:
        rollout = self._section("rollout")
        log_dir = self.trainer.log_dir  # every rank has to ask
        report = None
        if rollout.final_episodes and log_dir:
            report = evaluate_run(
                Path(log_dir),
                rollout.env,
                rollout.executions,
                episodes=rollout.final_episodes,
                num_workers=rollout.num_workers or max(1, num_cpus() // self.trainer.num_devices),
                media=rollout.final_media,
            )
        with together():
            if log_dir and self.trainer.is_global_zero:
                finish_run(Path(log_dir), report)
                finish_provenance(Path(log_dir))

    def _section(self, name: str) -> Any:
        """What a section of the configuration was built into."""
        return (self.config_init[self.subcommand] if self.subcommand else self.config_init)[name]


class ConfigReader(ACTCLI):
    """Checks the whole configuration, but builds only `env`, `demonstrations` and `rollout`.

    Args:
        args: those of `fit`.
        exit_on_error: whether a bad argument ends the program; else it raises ArgumentError.
    """

    def __init__(self, args: list[str], exit_on_error: bool = True) -> None:
        super().__init__(args, run=False, exit_on_error=exit_on_error)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the arguments of `fit` too: they stand in the configuration that a run keeps."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))

    def instantiate_classes(self) -> None:
        """Builds no model, opens no store, starts no trainer."""
        self.config_init = build_world({name: self.config[name] for name in WORLD_SECTIONS})


def build_world(sections: dict[str, Any]) -> Namespace:
    """Builds `env`, `demonstrations` and `rollout` from their settings; those left out, by default.

    So a run can be evaluated whose training settings have since changed their names.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    _add_world_sections(parser)
    return parser.instantiate_classes(parser.parse_object(sections))


def read_world(config: Path) -> dict[str, Any]:
    """What a run's configuration says of the world and of rollouts in it.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        settings = yaml.safe_load(config.read_text())
        return {name: settings[name] for name in ("env", "rollout")}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config} is not the configuration of a run ({error!r}); "
            "give a run's folder, as runs/insertion/version_0"
        ) from error


def _add_world_sections(parser: LightningArgumentParser) -> None:
    parser.add_class_arguments(EnvConfig, "env")
    parser.add_class_arguments(RecordConfig, "demonstrations")
    parser.add_lightning_class_args(RolloutCallback, "rollout")
    parser.link_arguments("env", "rollout.env", apply_on="instantiate")


def _logger(experiment: str, run: str | None) -> dict[str, Any]:
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": experiment, "version": run},
    }


def has_bfloat16(accelerator: str) -> bool:
    """Whether the device that `accelerator` will choose multiplies bfloat16 in hardware."""
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    return multiplies_bfloat16(torch.device("cuda" if on_gpu else "cpu"))


def fit_verb(args: list[str]) -> None:
    """`fit --config FILE ... [settings]`."""
    run_trainer(lambda stop: ACTCLI(["fit", *args], stop=stop))


def validate_verb(args: list[str]) -> None:
    """`validate --config FILE ... [settings]`."""
    run_trainer(lambda stop: ACTCLI(["validate", *args], stop=stop))


def run_trainer(start: Callable[[StopRequest], ACTCLI]) -> None:
    """Trains or validates as one of the ranks, and ends as it should when it is told to.

    Args:
        start: does it.
    """
    threading.excepthook = _report_thread
    keep_freed_memory()
    stop = StopRequest()
    with as_rank(), stop.listening():
        try:
            start(stop)
        except SIGTERMException:
            sys.exit(stop.exit_code)
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        except Exception as error:
            if stop.signal is not None and lost_another(error):
                sys.exit(stop.exit_code)  # that one was asked to end too, and was the first
            raise


def record_verb(args: list[str]) -> None:
    """`record --config FILE ... [settings]`."""
    sections = ConfigReader(args).config_init
    record(sections.demonstrations, sections.env)


def evaluate_verb(args: list[str]) -> None:
    """`evaluate RUN [--episodes N] [--split NAME ...] [--executions FILE] [--checkpoint best]`."""
    parser = argparse.ArgumentParser(
        prog="act_lightning evaluate", description="Play a run's policy in the evaluation worlds."
    )
    parser.add_argument("run", type=Path, help="a run's folder, as runs/insertion/version_0")
    parser.add_argument("--episodes", type=int, default=200, help="worlds (default 200)")
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or the path of a checkpoint"
    )
    parser.add_argument(
        "--split",
        nargs="+",
        choices=(STANDARD, *SPLITS),
        default=[STANDARD],
        metavar="NAME",
        help=f"which worlds: {STANDARD} (default), or held-out ones: {', '.join(SPLITS)}",
    )
    parser.add_argument(
        "--executions",
        type=Path,
        metavar="FILE",
        help="ways of executing, as experiments/executions.yaml; default those of the run",
    )
    parser.add_argument("--no-media", action="store_true", help="no videos and pictures")
    options = parser.parse_args(args)
    _quieten()
    keep_freed_memory()
    find_checkpoint(options.run, options.checkpoint)
    rollout = build_world(read_world(options.run / "config.yaml")).rollout
    executions = read_executions(options.executions) if options.executions else rollout.executions
    for split in options.split:
        split_env(rollout.env, split)  # all are checked before the first is played
    for split in options.split:
        evaluate_run(
            options.run,
            rollout.env,
            executions,
            episodes=options.episodes,
            checkpoint=options.checkpoint,
            split=split,
            num_workers=rollout.num_workers,
            media=not options.no_media,
        )


def _quieten() -> None:
    """Silences Lightning's hints about its products and its warnings about its own internals."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for name in ("seed", "distributed"):
        logging.getLogger(f"lightning.fabric.utilities.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")


def _report_thread(event: threading.ExceptHookArgs) -> None:
    """Leaves it to the main thread to say that the disk is full, as TensorBoard's also finds."""
    if not isinstance(event.exc_value, OSError):
        threading.__excepthook__(event)
