"""What training, rollouts and checkpoints need of a network that predicts action chunks.

ACT is one such network; a baseline, a diffusion head or an autoregressive one is another: a config
and a network in a file of their own, chosen in YAML by the config's `class_path`. The network owns
its loss, because what is minimised differs more between such heads than anything else does.

Shapes: B batch, K chunk size, A action, L latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.nets.normalize import Normalizer, Stats


@dataclass(frozen=True, kw_only=True)
class ChunkNetConfig(ABC):
    """Settings of a network that predicts action chunks; the subclass says which."""

    chunk_size: int = 100
    """K, actions predicted at once (control steps)."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(
                f"{type(self).__name__}: chunk_size={self.chunk_size} must be at least 1"
            )

    @abstractmethod
    def build(
        self, spec: DataSpec, stats: Stats | None = None, *, pretrained: bool = True
    ) -> ChunkNet:
        """Builds the network.

        Args:
            spec: what observations and actions hold.
            stats: normalisation, from the training episodes; None when a state_dict brings it.
            pretrained: False when a state_dict is loaded next: then no weights file is needed.
        """


class Posterior(NamedTuple):
    """A Gaussian over the latent for each sample of a batch."""

    mu: Tensor
    """(B, L) float32 means."""
    logvar: Tensor
    """(B, L) float32 logarithms of the variances."""


class Evaluation(NamedTuple):
    """What validation says of a batch."""

    errors: dict[str, Tensor]
    """Scalars, means over the batch's real actions, logged as `val/<name>`. `l1_prior` is always
    there: with the prior's mean as latent, or of what is predicted without one."""
    metrics: dict[str, Tensor]
    """Scalars, means over the batch's samples, logged likewise."""
    chunk: Tensor
    """(B, K, A) float32, the prediction that `l1_prior` is the error of, in standard deviations."""
    posterior: Posterior | None = None
    """Of the latent, given the demonstrated actions; None where there is no latent."""


class ChunkNet(nn.Module, ABC):
    """A network from raw observations to action chunks.

    Parameters below the attribute `backbone`, if there is one, train at `optimizer.backbone_lr`.

    Attributes:
        dim_noise: standard normal numbers that a training sample needs.
    """

    dim_noise: int = 0

    def __init__(self, config: ChunkNetConfig, spec: DataSpec, stats: Stats | None = None) -> None:
        """Keeps what every network has.

        Raises:
            ValueError: if `stats` do not fit `spec`.
        """
        super().__init__()
        self.config = config
        self.spec = spec
        self.normalizer = Normalizer(spec, stats)

    @abstractmethod
    def losses(self, batch: Batch, step: int, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Computes the loss of a training batch.

        Args:
            batch: raw observations and demonstrated actions.
            step: optimizer steps taken, for what is scheduled.
            noise: (B, dim_noise) standard normal; None draws from torch's generator.

        Returns:
            Scalars: `loss`, to be minimised, and what else is worth logging, as `train/<name>`. Of
            each the mean over the ranks is that of the batch they share.
        """

    @abstractmethod
    def evaluate(self, batch: Batch, seeds: Tensor) -> Evaluation:
        """Compares predictions with demonstrated actions, in evaluation mode.

        Args:
            batch: raw observations and demonstrated actions.
            seeds: (B,) int64, as in `sample`.
        """

    @abstractmethod
    def sample(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Predicts the chunk to execute.

        Args:
            observation: raw: uint8 images, un-normalised qpos.
            seeds: (B,) int64: all randomness of row i is a function of seeds[i] alone, so that
                rollouts can be repeated; None draws from torch's generator.

        Returns:
            (B, K, A) float32 actions, in standard deviations.

        Raises:
            ValueError: if the observation does not fit the network's `spec`.
        """

    @torch.no_grad()
    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Predicts the chunk to execute, (B, K, A) float32 in physical units; see `sample`.

        Raises:
            RuntimeError: in training mode, where dropout would blur the actions.
            ValueError: if the observation does not fit the network's `spec`.
        """
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__}.predict_chunk: call eval() first; dropout is still active"
            )
        return self.normalizer.unnormalize_actions(self.sample(observation, seeds))

    def check(self, observation: Observation) -> None:
        """Refuses observations that the network was not built for.

        Raises:
            ValueError: a tensor is missing, superfluous, or has another shape than `spec` says.
        """
        spec = self.spec
        expected = {
            "qpos": (spec.dim_qpos,),
            "env_state": (spec.dim_env_state,) if spec.dim_env_state else None,
            "images": (len(spec.cameras), 3, *spec.image_size) if spec.cameras else None,
        }
        for name, shape in expected.items():
            tensor = getattr(observation, name)
            found = None if tensor is None else tuple(tensor.shape[1:])
            if found != shape:
                raise ValueError(
                    f"{type(self).__name__}: observation.{name} is {found} a sample, this network "
                    f"was built for {shape} (cameras {list(spec.cameras)})"
                )


def standard_normal(rows: int, dim: int, seeds: Tensor | None, device: torch.device) -> Tensor:
    """Draws noise for each row of a batch, the same for the same seed whatever the batch.

    Args:
        rows: B.
        dim: values a row.
        seeds: (B,) int64, one a row; None draws from torch's generator.
        device: where the noise is wanted.

    Returns:
        (B, dim) float32.
    """
    if seeds is None:
        return torch.randn(rows, dim, device=device)
    generator = torch.Generator()
    drawn = [torch.randn(dim, generator=generator.manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(drawn).to(device)
