"""Behaviour cloning with a perceptron: the baseline that ACT has to beat.

Vanilla behaviour cloning (Pomerleau 1988) regresses the next action on the observation, which is
`chunk_size: 1`. A larger one regresses a chunk in the same way, which tells what chunking alone
brings, without transformer and latent. Where demonstrations do different things in one situation,
either predicts something between them. Images are averaged over the feature map; data, loss mask,
normalisation, rollouts and checkpoints are ACT's, so that nothing else differs.

Shapes: B batch, K chunk size, D qpos, A action, E env_state, N cameras.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.nets.across_ranks import weight_of_rank
from act_lightning.nets.backbone import Backbone, BackboneConfig
from act_lightning.nets.chunk_net import ChunkNet, ChunkNetConfig, Evaluation
from act_lightning.nets.losses import RECONSTRUCTION, masked_l1
from act_lightning.nets.normalize import Stats
from act_lightning.nets.transformer import Float32Linear


@dataclass(frozen=True, kw_only=True)
class BCConfig(ChunkNetConfig):
    """A perceptron from observation to chunk."""

    chunk_size: int = 1
    """K, actions predicted at once (control steps); 1 is vanilla behaviour cloning."""
    dim_hidden: int = 512
    """Width of the hidden layers."""
    num_layers: int = 3
    """Hidden layers."""
    dropout: float = 0.0
    """Dropout probability after each hidden layer."""
    reconstruction: Literal["l1", "mse"] = "mse"
    """Error to be minimised."""
    backbone: BackboneConfig = BackboneConfig()
    """What turns images into features; not built when there are no cameras."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim_hidden", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"BCConfig: {name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"BCConfig: dropout={self.dropout} must be in [0, 1)")
        if self.reconstruction not in RECONSTRUCTION:
            raise ValueError(f"BCConfig: reconstruction={self.reconstruction!r}; choose l1 or mse")

    def build(self, spec: DataSpec, stats: Stats | None = None, *, pretrained: bool = True) -> BC:
        """Builds the network; see `ChunkNetConfig.build`."""
        return BC(self, spec, stats, pretrained=pretrained)


class BC(ChunkNet):
    """Behaviour cloning, from raw observations to action chunks."""

    config: BCConfig

    def __init__(
        self, config: BCConfig, spec: DataSpec, stats: Stats | None = None, *, pretrained: bool
    ) -> None:
        """Builds the network; arguments as `ChunkNetConfig.build`."""
        super().__init__(config, spec, stats)
        num_cameras = len(spec.cameras)
        self.backbone = (
            Backbone(config.backbone, num_cameras, pretrained=pretrained) if num_cameras else None
        )
        dim_in = spec.dim_qpos + spec.dim_env_state
        if num_cameras:
            dim_in += num_cameras * config.backbone.dim_features
        layers: list[nn.Module] = []
        for _ in range(config.num_layers):
            layers += [nn.Linear(dim_in, config.dim_hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            dim_in = config.dim_hidden
        self.hidden = nn.Sequential(*layers)
        self.action_head = Float32Linear(dim_in, config.chunk_size * spec.dim_action)

    def losses(self, batch: Batch, step: int, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The error of the predicted actions, as `loss` and by its name."""
        target = self.normalizer.normalize_actions(batch.actions)
        error = RECONSTRUCTION[self.config.reconstruction](
            self.sample(batch.observation), target, batch.is_pad
        )
        error = error * weight_of_rank(batch.is_pad)
        return {"loss": error, self.config.reconstruction: error}

    def evaluate(self, batch: Batch, seeds: Tensor) -> Evaluation:
        """L1 of the predicted actions."""
        target = self.normalizer.normalize_actions(batch.actions)
        chunk = self.sample(batch.observation)
        return Evaluation({"l1_prior": masked_l1(chunk, target, batch.is_pad)}, {}, chunk)

    def sample(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Predicts the chunk; nothing about it is random."""
        self.check(observation)
        given = [self.normalizer.normalize_qpos(observation.qpos)]
        if observation.env_state is not None:
            given.append(self.normalizer.normalize_env_state(observation.env_state))
        if self.backbone is not None and observation.images is not None:
            tokens = self.backbone(self.normalizer.normalize_images(observation.images))
            given.append(tokens.mean(dim=2).flatten(1).float())
        chunk: Tensor = self.action_head(self.hidden(torch.cat(given, dim=1)))
        return chunk.view(len(observation), self.config.chunk_size, self.spec.dim_action)
