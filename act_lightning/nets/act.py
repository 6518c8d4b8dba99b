"""ACT: an observation in, a chunk of K future actions out, and a latent for the manner of doing it.

    actions (K) ──┐
    qpos ─────────┼── cvae_encoder ── z (training only) ──┐
    CLS ──────────┘                                       │
                                  qpos, (env_state) ──────┼── obs_encoder ── memory ──┐
    images ── backbone ── feature tokens of each camera ──┘                           │
                                                  learned queries (K) ── chunk_decoder ── chunk (K)

Source: Zhao et al. 2023 (arXiv 2304.13705) and its code (tonyzhaozh/act); the env_state token is
LeRobot's. Departures: a decoder of as many layers as are used (the original builds 7 and reads the
first); no padding head; normalisation inside the network; padded actions are blanked before the
CVAE encoder sees them, so that not even NaN there matters. Defaults are the paper's.

Shapes: B batch, K chunk size, D qpos, A action, E env_state, N cameras, L latent,
C = dim_model, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from act_lightning.batch import DataSpec, Observation
from act_lightning.nets.backbone import Backbone, BackboneConfig
from act_lightning.nets.normalize import Normalizer, Stats
from act_lightning.nets.transformer import (
    Decoder,
    Encoder,
    LayerConfig,
    sine_positions_2d,
    sinusoid_table,
    xavier_uniform,
)


@dataclass(frozen=True, kw_only=True)
class ACTConfig:
    """Sizes of the network; the defaults are the paper's."""

    chunk_size: int = 100
    """K, actions predicted at once (control steps)."""
    dim_model: int = 512
    """C, width of every token; a multiple of 4 and of num_heads."""
    num_heads: int = 8
    """Attention heads."""
    dim_feedforward: int = 3200
    """Hidden width of the feed-forward blocks."""
    dropout: float = 0.1
    """Dropout probability throughout the transformer. 0 trains faster and, in simulation,
    better."""
    num_cvae_layers: int = 4
    """Layers of the CVAE encoder (training only)."""
    num_obs_layers: int = 4
    """Layers of the observation encoder."""
    num_decoder_layers: int = 1
    """Layers of the chunk decoder."""
    dim_latent: int = 32
    """L, size of the latent z."""
    use_cvae: bool = True
    """Train with a latent; false makes it plain behaviour cloning with z = 0 and no CVAE
    encoder."""
    pre_norm: bool = False
    """Normalise before each transformer block instead of after its residual sum."""
    activation: Literal["relu", "gelu"] = "relu"
    """Non-linearity of the feed-forward blocks."""
    backbone: BackboneConfig = BackboneConfig()
    """What turns images into features; not built when there are no cameras."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ValueError(f"ACTConfig: {field.name}={value} must be at least 1")
        if self.dim_model % self.num_heads or self.dim_model % 4:
            raise ValueError(
                f"ACTConfig: dim_model={self.dim_model} must be a multiple of 4 and of "
                f"num_heads={self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ACTConfig: dropout={self.dropout} must be in [0, 1)")
        if self.activation not in ("relu", "gelu"):
            raise ValueError(f"ACTConfig: activation={self.activation!r}; choose relu or gelu")

    @property
    def layer(self) -> LayerConfig:
        """What every transformer layer is built from."""
        return LayerConfig(
            dim_model=self.dim_model,
            num_heads=self.num_heads,
            dim_feedforward=self.dim_feedforward,
            dropout=self.dropout,
            activation=self.activation,
            pre_norm=self.pre_norm,
        )


class ACTOutput(NamedTuple):
    """What a forward pass returns."""

    chunk: Tensor
    """(B, K, A) float32 predicted actions, in standard deviations (`ACT.normalizer` undoes
    that)."""
    mu: Tensor | None
    """(B, L) float32 posterior mean; None where no posterior was computed."""
    logvar: Tensor | None
    """(B, L) float32 logarithm of the posterior variance; None as `mu`."""


class ACT(nn.Module):
    """Action Chunking with Transformers, from raw observations to action chunks."""

    def __init__(
        self,
        config: ACTConfig,
        spec: DataSpec,
        stats: Stats | None = None,
        *,
        pretrained: bool = True,
    ) -> None:
        """Builds the network.

        Args:
            config: sizes.
            spec: what observations and actions hold.
            stats: normalisation, from the training episodes; None when a state_dict brings it.
            pretrained: False when a state_dict is loaded next: then no backbone weights file is
                needed.

        Raises:
            FileNotFoundError: if the backbone's weights cannot be found.
            ValueError: if `stats` do not fit `spec`, or the weights are not a ResNet-18's.
        """
        super().__init__()
        self.config = config
        self.spec = spec
        self.normalizer = Normalizer(spec, stats)
        self.cvae_encoder = CVAEEncoder(config, spec) if config.use_cvae else None
        self.backbone = (
            Backbone(config.backbone, len(spec.cameras), pretrained=pretrained)
            if spec.cameras
            else None
        )
        self.obs_encoder = ObsEncoder(config, spec)
        self.chunk_decoder = ChunkDecoder(config, spec)

    def forward(
        self,
        observation: Observation,
        actions: Tensor | None = None,
        is_pad: Tensor | None = None,
    ) -> ACTOutput:
        """Predicts a chunk and, where demonstrated actions are given, their latent's posterior.

        z is a sample of the posterior in training, its mean in evaluation with `actions`, and 0
        (the prior's mean) without `actions` or without a CVAE.

        Args:
            observation: raw: uint8 images, un-normalised qpos.
            actions: (B, K, A) demonstrated actions in physical units; needed to train with the
                CVAE.
            is_pad: (B, K) bool, True past the episode's end; goes with `actions`.

        Raises:
            ValueError: if a tensor is missing or has the wrong shape.
        """
        if self.cvae_encoder is None or (actions is None and not self.training):
            return ACTOutput(self.decode(observation), None, None)
        if actions is None or is_pad is None:
            raise ValueError(
                "ACT.forward: give actions and is_pad together; training with use_cvae needs both"
            )
        expected = (len(observation), self.config.chunk_size, self.spec.dim_action)
        if actions.shape != expected or is_pad.shape != expected[:2]:
            raise ValueError(
                f"ACT.forward: actions {tuple(actions.shape)} and is_pad {tuple(is_pad.shape)} "
                f"must be {expected} and {expected[:2]}: give the data the network's chunk_size"
            )
        mu, logvar = self.cvae_encoder(
            self.normalizer.normalize_qpos(observation.qpos),
            self.normalizer.normalize_actions(actions),
            is_pad,
        )
        latent = mu + (0.5 * logvar).exp() * torch.randn_like(mu) if self.training else mu
        return ACTOutput(self.decode(observation, latent), mu, logvar)

    def decode(self, observation: Observation, latent: Tensor | None = None) -> Tensor:
        """Predicts the chunk for a latent.

        Args:
            observation: raw: uint8 images, un-normalised qpos.
            latent: (B, L) style; None is z = 0.

        Returns:
            (B, K, A) float32 actions, in standard deviations.

        Raises:
            ValueError: if the observation does not fit the network's `spec`.
        """
        self._check(observation)
        qpos = self.normalizer.normalize_qpos(observation.qpos)
        if latent is None:
            latent = qpos.new_zeros(len(qpos), self.config.dim_latent)
        env_state = features = None
        if observation.env_state is not None:
            env_state = self.normalizer.normalize_env_state(observation.env_state)
        if self.backbone is not None and observation.images is not None:
            features = self.backbone(self.normalizer.normalize_images(observation.images))
        memory, positions = self.obs_encoder(latent, qpos, env_state, features)
        chunk: Tensor = self.chunk_decoder(memory, positions)
        return chunk

    @torch.no_grad()
    def predict_chunk(self, observation: Observation, latent: Tensor | None = None) -> Tensor:
        """Predicts actions to execute.

        Args:
            observation: raw: uint8 images, un-normalised qpos.
            latent: (B, L) style; None is z = 0.

        Returns:
            (B, K, A) float32 actions, in physical units.

        Raises:
            RuntimeError: in training mode, where dropout would blur the actions.
            ValueError: if the observation does not fit, or a latent is given to a network without
                one.
        """
        if self.training:
            raise RuntimeError("ACT.predict_chunk: call eval() first; dropout is still active")
        if latent is not None and not self.config.use_cvae:
            raise ValueError(
                "ACT.predict_chunk: this network was trained with use_cvae=False: no latent"
            )
        return self.normalizer.unnormalize_actions(self.decode(observation, latent))

    def _check(self, observation: Observation) -> None:
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
                    f"ACT: observation.{name} is {found} a sample, this network was built for "
                    f"{shape} (cameras {list(spec.cameras)})"
                )


class Float32Linear(nn.Linear):
    """A linear layer that mixed precision leaves in float32.

    bfloat16 has 8 significant bits: at two standard deviations of a joint's range that is a step of
    several milliradians, more than tasks with millimetres of clearance can spare. These layers,
    between physical quantities and tokens, are too small to be worth that.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) of any float dtype to (..., out_features) float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class CVAEEncoder(nn.Module):
    """Demonstrated chunk to the posterior of the latent: tokens [CLS, qpos, a_t, ..., a_t+K-1]."""

    positions: Tensor

    def __init__(self, config: ACTConfig, spec: DataSpec) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, config.dim_model))
        self.qpos_proj = nn.Linear(spec.dim_qpos, config.dim_model)
        self.action_proj = nn.Linear(spec.dim_action, config.dim_model)
        self.encoder = Encoder(config.layer, config.num_cvae_layers)
        self.latent_head = nn.Linear(config.dim_model, 2 * config.dim_latent)
        self.register_buffer(
            "positions", sinusoid_table(2 + config.chunk_size, config.dim_model), persistent=False
        )

    def forward(self, qpos: Tensor, actions: Tensor, is_pad: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a normalised chunk.

        Args:
            qpos: (B, D), in standard deviations.
            actions: (B, K, A), in standard deviations; padded ones are ignored.
            is_pad: (B, K) bool.

        Returns:
            mu and logvar, (B, L) float32 each.
        """
        # A masked key has weight 0, but 0 * NaN is NaN: what is padded must be finite too.
        actions = actions.masked_fill(is_pad.unsqueeze(-1), 0.0)
        action_tokens = self.action_proj(actions)
        cls = self.cls.to(action_tokens.dtype).expand(len(qpos), 1, -1)
        tokens = torch.cat([cls, self.qpos_proj(qpos).unsqueeze(1), action_tokens], dim=1)
        never_pad = is_pad.new_zeros(len(qpos), 2)
        encoded = self.encoder(tokens, self.positions, torch.cat([never_pad, is_pad], dim=1))
        mu, logvar = self.latent_head(encoded[:, 0]).float().chunk(2, dim=-1)
        return mu, logvar


class ObsEncoder(nn.Module):
    """Latent and observation to memory: tokens [latent, qpos, (env_state), image features].

    Learned positions for the single tokens, DETR's sine positions for image features. Every camera
    gets the same positions, as in the original: the network cannot tell cameras apart but by
    content.
    """

    image_positions: Tensor

    def __init__(self, config: ACTConfig, spec: DataSpec) -> None:
        super().__init__()
        self.latent_proj = nn.Linear(config.dim_latent, config.dim_model)
        self.qpos_proj = Float32Linear(spec.dim_qpos, config.dim_model)
        self.env_state_proj = (
            Float32Linear(spec.dim_env_state, config.dim_model) if spec.dim_env_state else None
        )
        self.image_proj = (
            nn.Linear(config.backbone.dim_features, config.dim_model) if spec.cameras else None
        )
        num_slots = 2 + (self.env_state_proj is not None)
        self.slot_positions = nn.Parameter(torch.randn(num_slots, config.dim_model))
        image_positions = torch.empty(0, config.dim_model)
        if spec.cameras:
            rows, columns = config.backbone.feature_size(spec.image_size)
            image_positions = sine_positions_2d(rows, columns, config.dim_model)
        self.register_buffer(
            "image_positions", image_positions.repeat(len(spec.cameras), 1), persistent=False
        )
        self.encoder = Encoder(config.layer, config.num_obs_layers)
        xavier_uniform(self.encoder)

    def forward(
        self, latent: Tensor, qpos: Tensor, env_state: Tensor | None, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encodes an observation.

        Args:
            latent: (B, L).
            qpos: (B, D), in standard deviations.
            env_state: (B, E), in standard deviations.
            features: (B, N, rows * columns, channels) of the backbone.

        Returns:
            memory (B, T, C), and its positions (T, C).
        """
        tokens = [self.latent_proj(latent).unsqueeze(1), self.qpos_proj(qpos).unsqueeze(1)]
        if self.env_state_proj is not None:
            tokens.append(self.env_state_proj(env_state).unsqueeze(1))
        if self.image_proj is not None and features is not None:
            tokens.append(self.image_proj(features.flatten(1, 2)))
        positions = torch.cat([self.slot_positions, self.image_positions])
        return self.encoder(torch.cat(tokens, dim=1), positions), positions


class ChunkDecoder(nn.Module):
    """Memory to actions: one learned query a step of the chunk; its tokens start at zero (DETR)."""

    def __init__(self, config: ACTConfig, spec: DataSpec) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.chunk_size, config.dim_model))
        self.decoder = Decoder(config.layer, config.num_decoder_layers)
        xavier_uniform(self.decoder)
        self.action_head = Float32Linear(config.dim_model, spec.dim_action)

    def forward(self, memory: Tensor, memory_positions: Tensor) -> Tensor:
        """(B, T, C) memory and its (T, C) positions to (B, K, A) float32 actions."""
        start = memory.new_zeros(len(memory), *self.queries.shape)
        decoded = self.decoder(start, memory, self.queries, memory_positions)
        chunk: Tensor = self.action_head(decoded)
        return chunk
