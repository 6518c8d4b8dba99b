"""Several processes that train together: how many there are, and how they meet.

Each process is a rank. They are started by torchrun, by Slurm's `srun`, or by the first of them
(Lightning's own launcher): none is written here. The number of ranks is the launcher's, and
`trainer.devices` and `trainer.num_nodes` follow from it. No wait is endless: neither for a rank
that never starts, nor for one that never comes to the point where all exchange something.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from act_lightning.rank_process import GONE, LAUNCHER, is_of_srun
from act_lightning.run_lock import REQUEUED_S

SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # the second before torch 2.14
    if name in signature(DistributedDataParallel).parameters
)
"""Setting of DDP: whether rank 0's buffers are sent at each forward pass."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How long ranks wait for each other."""

    start_timeout_s: float = 50.0
    """Seconds from when a rank has opened the data and built the network until all have."""
    timeout_min: float = 60.0
    """Minutes that a rank waits for the others to come to where all exchange something. Longer than
    what one does while the rest waits: longer rollouts, saving, filming the final evaluation."""

    def __post_init__(self) -> None:
        for name in ("start_timeout_s", "timeout_min"):
            if getattr(self, name) <= 0:
                raise ValueError(f"launch.{name}={getattr(self, name)}; give more than 0")


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks that a launcher has started."""

    launcher: str
    """Its name."""
    num_nodes: int
    devices: int
    """Ranks on each node, a device each."""


def launched_world() -> World | None:
    """What torchrun or `srun` says of the ranks; None if this process was started by itself.

    A step of one task is a process by itself, which may start others. So is the script of a batch
    job, whatever the job's tasks are.

    Raises:
        ValueError: the nodes have different numbers of ranks.
    """
    if TorchElasticEnvironment.detect():
        devices, size = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        launcher, even = "torchrun", int(os.environ["GROUP_WORLD_SIZE"]) * devices == size
    elif is_of_srun():
        size, num_nodes = (int(os.environ[f"SLURM_STEP_NUM_{x}"]) for x in ("TASKS", "NODES"))
        launcher, devices = "srun", size // num_nodes
        even = "," not in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    else:
        return None
    if not even or size % devices:
        raise ValueError(
            f"{launcher} has started {size} ranks, not the same number on each node; start as many "
            "on each (torchrun --nproc-per-node, srun --ntasks-per-node)"
        )
    return World(launcher=launcher, num_nodes=size // devices, devices=devices)


def settle(trainer: Namespace, arguments: Sequence[str], launch: LaunchConfig) -> None:
    """Gives the trainer's settings the launcher's number of ranks, and the way these work together.

    Settings of files give way to the launcher, so that one file serves any number of ranks; only a
    list of as many devices says which. A strategy other than `auto` is left as it is.

    Args:
        trainer: settings of the trainer; are changed.
        arguments: of the command line.
        launch: how long ranks wait.

    Raises:
        ValueError: an argument asks for other ranks than the launcher has started, or
            `trainer.devices` is none.
    """
    world = launched_world()
    if world is not None:
        _check_arguments(trainer, arguments, world)
        if not isinstance(trainer.devices, list) or len(trainer.devices) != world.devices:
            trainer.devices = world.devices
        trainer.num_nodes = world.num_nodes
    devices = _count_devices(trainer.devices, trainer.accelerator)
    size = devices * trainer.num_nodes
    if size > 1 and trainer.strategy == "auto":
        trainer.strategy = Ranks(launch, static_graph=not _accumulates(trainer))
    given = [*(trainer.plugins or []), getattr(trainer.strategy, "cluster_environment", None)]
    environment = _environment(world)
    if environment and not any(isinstance(plugin, ClusterEnvironment) for plugin in given):
        trainer.plugins = [*(trainer.plugins or []), environment]
    if world is None and size > 1 and "LOCAL_RANK" not in os.environ:
        os.environ |= {LAUNCHER: str(os.getpid()), "LOCAL_WORLD_SIZE": str(devices)}


class Ranks(DDPStrategy):
    """Data-parallel training: each rank has the whole network, and gradients are averaged.

    Every parameter gets a gradient at every step, and no buffer ever changes. So the gradients of
    a layer are sent while the layers before it still compute, from where they were written, and
    nothing else is.

    Args:
        launch: how long ranks wait.
        static_graph: whether gradients are sent at every backward pass. If so, torch looks up once
            which of them there are; where gradients are accumulated it fails of that (2.14).
    """

    def __init__(self, launch: LaunchConfig, *, static_graph: bool = True) -> None:
        settings: dict[str, Any] = {
            "static_graph": static_graph,
            "gradient_as_bucket_view": True,
            "find_unused_parameters": False,
            # Sent in validation too otherwise, where ranks may have different numbers of batches.
            SYNC_BUFFERS: False,
        }
        self._start_timeout_s = launch.start_timeout_s
        if "SLURM_RESTART_COUNT" in os.environ:
            self._start_timeout_s += REQUEUED_S  # rank 0 may wait for the run's lock
        super().__init__(timeout=timedelta(seconds=self._start_timeout_s), **settings)
        self._launch = launch

    def setup_distributed(self) -> None:
        """Meets the other ranks.

        Raises:
            ConnectionError: they do not all come.
            RuntimeError: one has come, and is gone.
        """
        try:
            super().setup_distributed()
        except RuntimeError as error:
            if GONE.search(str(error)):
                raise
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ConnectionError(
                f"not all of {self.world_size} ranks met at {address} within "
                f"{self._start_timeout_s:g} s ({str(error).splitlines()[0]}); if no other rank has "
                "failed, see that each node starts its ranks and reaches this address, or raise "
                f"launch.start_timeout_s={self._launch.start_timeout_s:g}"
            ) from error
        timeout = timedelta(minutes=self._launch.timeout_min)
        if hasattr(dist, "set_timeout"):
            dist.set_timeout(timeout)
        else:  # torch before 2.14
            dist.distributed_c10d._set_pg_timeout(timeout)


def _check_arguments(trainer: Namespace, arguments: Sequence[str], world: World) -> None:
    names = {argument.split("=")[0] for argument in arguments}
    for name, wanted in (
        ("devices", given_devices(trainer.devices)),
        ("num_nodes", trainer.num_nodes),
    ):
        started = getattr(world, name)
        if f"--trainer.{name}" in names and wanted not in (None, started):
            raise ValueError(
                f"--trainer.{name}={getattr(trainer, name)}, but {world.launcher} has started "
                f"{world.devices} ranks on each of {world.num_nodes} nodes, so it is {started}; "
                "leave the argument out, or start other ranks"
            )


def given_devices(devices: Any) -> int | None:
    """How many a setting of `trainer.devices` names; None if it leaves it open.

    Raises:
        ValueError: it names no devices.
    """
    if isinstance(devices, str) and "," in devices:
        devices = [device for device in devices.split(",") if device.strip()]
    if isinstance(devices, list):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        return None
    try:
        return int(devices)
    except ValueError:
        raise ValueError(
            f"trainer.devices={devices}; give a number of devices, a list of them as 0,1, or auto"
        ) from None


def _count_devices(devices: Any, accelerator: str) -> int:
    given = given_devices(devices)
    if given is not None:
        return given
    return max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1


def _accumulates(trainer: Namespace) -> bool:
    scheduled = any(isinstance(x, GradientAccumulationScheduler) for x in trainer.callbacks or ())
    return scheduled or trainer.accumulate_grad_batches != 1


def _environment(world: World | None) -> ClusterEnvironment | None:
    """What tells Lightning the number of each rank; None where it finds out by itself."""
    if world is not None and world.launcher == "srun":
        # Lightning wants it, and srun sets it only if it was asked for.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(world.devices))
        return SLURMEnvironment(auto_requeue=False)
    if world is None and "SLURM_NTASKS" in os.environ:
        return LightningEnvironment()  # Lightning would wait for the job's other tasks
    return None
