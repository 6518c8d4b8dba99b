"""What jobs ask of Slurm, for single trainings (`slurm`) and for sweeps (`sweep --slurm`)."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jsonargparse import ArgumentParser

from act_lightning.main import brief


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What each run asks of Slurm; what is left out is for the cluster to say."""

    partition: str | None = None
    """Where to run."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that a node must have."""
    nodelist: str | None = None
    """Nodes to run on."""
    exclude: str | None = None
    """Nodes not to run on."""
    gpus_per_node: int | None = None
    """GPUs of a run, on each of its nodes."""
    gres: str | None = None
    """Other devices of a run, on each of its nodes."""
    cpus_per_task: int | None = None
    """Cores of each process of a run."""
    mem_gb: float | None = None
    """Memory of a run on each of its nodes, GB."""
    timeout_min: int = 240
    """Minutes until a run is requeued, if it takes longer."""
    signal_delay_s: int = 120
    """Seconds before that, in which it saves."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell to run first, as ["module load cuda"]."""
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Other options of sbatch, as {reservation: mine}."""

    def __post_init__(self) -> None:
        for name in ("timeout_min", "signal_delay_s", "cpus_per_task", "gpus_per_node", "mem_gb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}; give more than 0")
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ValueError(
                f"signal_delay_s={self.signal_delay_s} leaves nothing of timeout_min="
                f"{self.timeout_min}; give less, or a longer time"
            )


def read_config(options: Sequence[str]) -> SlurmConfig:
    """Reads `key=value` arguments; values are YAML.

    Raises:
        ValueError: one of them is wrong; names it, and the keys that exist.
    """
    keys = [key.name for key in fields(SlurmConfig)]
    for option in options:
        if "=" not in option or option.split("=")[0] not in keys:
            raise ValueError(f"--slurm {option}: give key=value, with a key of {', '.join(keys)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SlurmConfig, "slurm")
    try:
        parsed = parser.parse_args([f"--slurm.{option}" for option in options])
        config: SlurmConfig = parser.instantiate_classes(parsed).slurm
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"--slurm {' '.join(options)}: {brief(str(error))}") from error
    return config


def check_commands(remedy: str) -> None:
    """Sees that jobs can be submitted from this machine.

    Args:
        remedy: what to do where they cannot.

    Raises:
        OSError: they cannot.
    """
    for command in ("sbatch", "srun", "squeue"):
        if shutil.which(command) is None:
            raise OSError(f"{command} is not found here; {remedy}")
