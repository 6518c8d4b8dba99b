"""Policy: a checkpoint, and nothing else, turned into what a robot or a simulator calls.

The checkpoint holds weights, normalisation, sizes, camera names and fps; no config file, data set
or statistics file is read (tonyzhaozh/act needs its `dataset_stats.pkl` beside the weights).
"""

from __future__ import annotations

import argparse
import copy
import errno
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from act_lightning import __version__
from act_lightning.batch import DataSpec, Observation
from act_lightning.execution import ExecutionConfig, Executor
from act_lightning.memory import keep_freed_memory
from act_lightning.nets.chunk_net import ChunkNet, ChunkNetConfig
from act_lightning.nets.inference import InferenceNet, Precision

NOT_OF_THE_FILE = (
    errno.EACCES,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
)
"""Errors of reading a file that say nothing about what it holds."""
CHECKPOINT_KEY = "act_lightning"
"""Where a checkpoint says what rebuilds its network."""
PAPER_EXECUTION = ExecutionConfig(ensemble_decay=0.01)


class Policy:
    """Predicts action chunks from observations; satisfies `sim.rollout.ChunkPolicy`.

    Args:
        net: the trained network.
        step: optimizer steps it was trained for.
        sha256: of the checkpoint file.
        train_seconds: how long training took.
        cost: what training took besides time: `cpu_seconds` of rank 0, `device`, `num_devices`;
            empty if it is not known.
        latent: what validation found out about the latent (see `latent.LatentCallback`); None for a
            network without one.
        prediction: what it found out about the error of each step of the chunk (see
            `prediction.PredictionCallback`); None if it did not look.
    """

    def __init__(
        self,
        net: ChunkNet,
        step: int = 0,
        sha256: str = "",
        train_seconds: float = 0.0,
        cost: dict[str, Any] | None = None,
        latent: dict[str, Any] | None = None,
        prediction: dict[str, Any] | None = None,
    ) -> None:
        self.net = net.eval()
        self.step = step
        self.sha256 = sha256
        self.train_seconds = train_seconds
        self.cost = cost or {}
        self.latent = latent
        self.prediction = prediction
        self._predict = net.predict_chunk
        self._executor: Executor | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "cpu") -> Policy:
        """Loads the policy that `fit` saved at `path`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a checkpoint of act_lightning, or of another version.
        """
        path = Path(path)
        checkpoint = read_checkpoint(path)
        description = checkpoint[CHECKPOINT_KEY]
        try:
            net = build_net(description)
        except (argparse.ArgumentError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} was written by act_lightning {description.get('version')}, and "
                f"{__version__} cannot read it ({' '.join(str(error).split())}); evaluate it with "
                "that version, or train again"
            ) from error
        net.load_state_dict(
            {
                name.removeprefix("net."): value
                for name, value in checkpoint["state_dict"].items()
                if name.startswith("net.")
            }
        )
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            net.to(device),
            step=int(checkpoint["global_step"]),
            sha256=sha256,
            train_seconds=float(description["train_seconds"]),
            cost=description.get("cost"),
            latent=description.get("latent"),
            prediction=description.get("prediction"),
        )

    def optimized(self, precision: Precision = "float32", *, compile: bool = False) -> Policy:
        """This policy, predicting faster: `Policy.from_checkpoint(path).optimized("bfloat16")`.

        Evaluate a policy as it will be used: worlds that barely succeed may end otherwise. The
        process keeps freed memory from then on (`memory.keep_freed_memory`).

        Args:
            precision: `float32` predicts the same to 1e-5 standard deviations of the actions;
                `bfloat16` to 3e-2, and is faster where the hardware multiplies it (processors with
                AMX or AVX512-BF16, GPUs from Ampere on).
            compile: spend a minute or two on torch.compile now, and be faster from then on; for
                observations of batch size 1, as a robot makes them. Others compile at their first
                use. Needs a C++ compiler.

        Returns:
            A policy of its own, with `net` as trained.

        Raises:
            RuntimeError: the network cannot be compiled here.
            ValueError: there is no such precision.
        """
        keep_freed_memory()
        policy = copy.copy(self)
        policy._predict = InferenceNet(self.net, precision, compiled=compile).predict_chunk
        policy._executor = None
        return policy

    @property
    def spec(self) -> DataSpec:
        """What an observation must hold."""
        return self.net.spec

    @property
    def chunk_size(self) -> int:
        """K, the number of actions a prediction holds."""
        return self.net.config.chunk_size

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def start(self, execution: ExecutionConfig = PAPER_EXECUTION) -> None:
        """Begins an episode on a robot.

        Args:
            execution: how chunks become actions; the default is the paper's temporal ensembling.
        """
        self._executor = execution.build(1, self.chunk_size, self.spec.dim_action)

    def act(self, observation: Observation) -> Tensor:
        """Decides the next action of the episode that `start` began; call it every control step.

        Args:
            observation: what the robot perceives now, a batch of one.

        Returns:
            (A,) float32 action, in physical units.

        Raises:
            RuntimeError: `start` was not called.
            ValueError: the observation does not fit, or is not a batch of one.
        """
        if self._executor is None:
            raise RuntimeError("Policy.act: call start() at the beginning of the episode")
        if len(observation) != 1:
            raise ValueError(f"Policy.act: got {len(observation)} observations; give one")
        row = torch.tensor([0])
        if self._executor.needs_chunk[0]:
            self._executor.push(row, self.predict_chunk(observation).cpu())
        return self._executor.pop(row)[0]

    @torch.inference_mode()
    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Predicts (B, K, A) actions in physical units; see `ChunkNet.sample` for `seeds`."""
        return self._predict(observation.to(self.device, non_blocking=True), seeds)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint into the CPU's memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, not a checkpoint of act_lightning, or from before networks
            were chosen by class_path.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; train first, or see runs/")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        described = checkpoint[CHECKPOINT_KEY]["net"]
    except Exception as error:  # torch raises many types, with long texts, for a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_OF_THE_FILE:
            raise
        raise ValueError(
            f"{path} is damaged or not a checkpoint of act_lightning ({type(error).__name__}); "
            "give another, such as the run's best.ckpt or last.ckpt"
        ) from error
    if "class_path" not in described:
        raise ValueError(
            f"{path} is from before networks were chosen by class_path, and can no longer be read; "
            "train again"
        )
    return checkpoint


def bare_checkpoint(net: ChunkNet, step: int = 0) -> dict[str, Any]:
    """What `Policy.from_checkpoint` needs of a file, and nothing that training could go on from."""
    return {
        "global_step": step,
        "state_dict": {f"net.{name}": value for name, value in net.state_dict().items()},
        CHECKPOINT_KEY: describe_net(net) | {"train_seconds": 0.0},
    }


def describe_net(net: ChunkNet) -> dict[str, Any]:
    """What rebuilds the network untrained, as plain types."""
    config = type(net.config)
    return {
        "version": __version__,
        "net": {
            "class_path": f"{config.__module__}.{config.__qualname__}",
            "init_args": asdict(net.config),
        },
        "spec": asdict(net.spec),
    }


def build_net(description: dict[str, Any]) -> ChunkNet:
    """Rebuilds an untrained network from what `describe_net` says."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=ChunkNetConfig)
    parser.add_argument("--spec", type=DataSpec)
    described = {name: description[name] for name in ("net", "spec")}
    built = parser.instantiate_classes(parser.parse_object(described))
    net: ChunkNet = built.net.build(built.spec, pretrained=False)
    return net
