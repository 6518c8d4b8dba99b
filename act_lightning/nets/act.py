"""ACT: an observation in, a chunk of K future actions out, and a latent for the manner of doing it.

    actions (K) ──┐
    qpos ─────────┼── cvae_encoder ── z (training only) ──┐
    CLS ──────────┘                                       │
                                  qpos, (env_state) ──────┼── obs_encoder ── memory ──┐
    images ── backbone ── feature tokens of each camera ──┘                           │
                                                  learned queries (K) ── chunk_decoder ── chunk (K)

Source: Zhao et al. 2023 (arXiv 2304.13705) and its code (tonyzhaozh/act); the env_state token is
LeRobot's. Departures:
- The decoder has as many layers as are used (the original builds 7 and reads the first), and there
  is no padding head.
- Normalisation is inside the network.
- Padded actions neither reach the CVAE encoder nor dilute the loss (`l1_reduction: all` does what
  the original does).
- Cameras have an identity: without it, images swapped between cameras give the same actions.

Defaults are the paper's sizes. Whose each option is, and which are for comparison only, is in
experiments/README.md.

Shapes: B batch, K chunk size, D qpos, A action, E env_state, N cameras, L latent,
C = dim_model, T tokens, P feature tokens a camera.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.nets.across_ranks import weight_of_rank
from act_lightning.nets.backbone import Backbone, BackboneConfig
from act_lightning.nets.chunk_net import (
    ChunkNet,
    ChunkNetConfig,
    Evaluation,
    Posterior,
    standard_normal,
)
from act_lightning.nets.cvae import MLPCVAEEncoder, TransformerCVAEEncoder
from act_lightning.nets.losses import RECONSTRUCTION, KLSchedule, kl_divergence, masked_l1
from act_lightning.nets.normalize import Stats
from act_lightning.nets.transformer import (
    Decoder,
    Encoder,
    Float32Linear,
    LayerConfig,
    sine_positions_2d,
    xavier_uniform,
)

CVAE_ENCODERS = {"transformer": TransformerCVAEEncoder, "mlp": MLPCVAEEncoder}
CHOICES = {
    "activation": ("relu", "gelu"),
    "cvae_encoder": tuple(CVAE_ENCODERS),
    "qpos_encoder": ("linear", "mlp"),
    "latent_at_inference": ("zero", "sample"),
    "reconstruction": tuple(RECONSTRUCTION),
    "l1_reduction": ("valid", "all"),
    "kl_reduction": ("sum", "mean"),
}


@dataclass(frozen=True, kw_only=True)
class ACTConfig(ChunkNetConfig):
    """The network, and what it is trained to do; sizes default to the paper's."""

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
    """Layers of the observation encoder; 0 leaves it out: the decoder then attends to the latent's
    and the observation's tokens as they are (with `pre_norm`, normalised)."""
    num_decoder_layers: int = 1
    """Layers of the chunk decoder, all of them used. The original builds 7 and uses 1."""
    dim_latent: int = 32
    """L, size of the latent z."""
    use_cvae: bool = True
    """Train with a latent; false makes it plain behaviour cloning with z = 0. There is no CVAE
    encoder then, and no KL term: what is set for these does nothing."""
    cvae_encoder: Literal["transformer", "mlp"] = "transformer"
    """transformer: over a token for each action, ACT's; mlp: over observation and flattened chunk,
    the textbook's, with `num_cvae_layers` hidden layers `dim_feedforward` wide."""
    latent_at_inference: Literal["zero", "sample"] = "zero"
    """zero: the prior's mean, ACT's; sample: z ~ N(0, I) for every chunk, the textbook's, to be
    executed whole: temporal ensembling would average chunks of different z."""
    qpos_encoder: Literal["linear", "mlp"] = "linear"
    """What turns joint positions into a token: a linear layer, ACT's, or one with a hidden layer
    before it."""
    camera_embedding: bool = True
    """A learned vector a camera, added to its tokens, where there are two or more. Without it, as
    in the original and in LeRobot, cameras can be told apart by content only."""
    pre_norm: bool = False
    """Normalise before each transformer block instead of after its residual sum."""
    activation: Literal["relu", "gelu"] = "relu"
    """Non-linearity of the feed-forward blocks."""
    backbone: BackboneConfig = BackboneConfig()
    """What turns images into features; not built when there are no cameras."""
    reconstruction: Literal["l1", "mse"] = "l1"
    """`l1` as in the paper's text and code, or `mse` as in its Algorithm 1."""
    l1_reduction: Literal["valid", "all"] = "valid"
    """What the reconstruction error is divided by: `valid` actions only, LeRobot's; or `all`, those
    past the episode's end included, which dilutes the last chunks: the original's."""
    kl_reduction: Literal["sum", "mean"] = "sum"
    """Over the dimensions of the latent. `mean` is the textbook variant's, L times weaker."""
    free_bits: float = 0.0
    """KL, in nats a dimension, below which the loss does not push it (Kingma et al. 2016)."""
    kl_schedule: KLSchedule = KLSchedule()
    """Weight of the KL term (beta) at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = 0 if field.name == "num_obs_layers" else 1
            if type(value) is int and value < lowest:
                raise ValueError(f"ACTConfig: {field.name}={value} must be at least {lowest}")
            if value not in (choices := CHOICES.get(field.name, (value,))):
                raise ValueError(
                    f"ACTConfig: {field.name}={value!r}; choose {' or '.join(choices)}"
                )
        if self.dim_model % self.num_heads or self.dim_model % 4:
            raise ValueError(
                f"ACTConfig: dim_model={self.dim_model} must be a multiple of 4 and of "
                f"num_heads={self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ACTConfig: dropout={self.dropout} must be in [0, 1)")
        if not 0 <= self.free_bits < float("inf"):
            raise ValueError(
                f"ACTConfig: free_bits={self.free_bits} must be finite and not negative"
            )
        if self.latent_at_inference == "sample" and not self.use_cvae:
            raise ValueError(
                "ACTConfig: latent_at_inference=sample with use_cvae=false: there is no latent to "
                "sample; use latent_at_inference: zero"
            )

    def build(self, spec: DataSpec, stats: Stats | None = None, *, pretrained: bool = True) -> ACT:
        """Builds the network; see `ChunkNetConfig.build`."""
        return ACT(self, spec, stats, pretrained=pretrained)

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


class ACT(ChunkNet):
    """Action Chunking with Transformers, from raw observations to action chunks."""

    config: ACTConfig

    def __init__(
        self,
        config: ACTConfig,
        spec: DataSpec,
        stats: Stats | None = None,
        *,
        pretrained: bool = True,
    ) -> None:
        """Builds the network; arguments as `ChunkNetConfig.build`.

        Raises:
            FileNotFoundError: if the backbone's weights cannot be found.
            ValueError: if `stats` do not fit `spec`, or the weights are not a ResNet-18's.
        """
        super().__init__(config, spec, stats)
        self.dim_noise = config.dim_latent if config.use_cvae else 0
        self.cvae_encoder = (
            CVAE_ENCODERS[config.cvae_encoder](config, spec) if config.use_cvae else None
        )
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
        noise: Tensor | None = None,
    ) -> ACTOutput:
        """Predicts a chunk and, where demonstrated actions are given, their latent's posterior.

        z is a sample of the posterior in training, its mean in evaluation with `actions`, and 0
        (the prior's mean) without `actions` or without a CVAE.

        Args:
            observation: raw: uint8 images, un-normalised qpos.
            actions: (B, K, A) demonstrated actions in physical units; needed to train with the
                CVAE.
            is_pad: (B, K) bool, True past the episode's end; goes with `actions`.
            noise: (B, L) standard normal, for the sample of the posterior; None draws from torch's
                generator.

        Raises:
            ValueError: if a tensor is missing or has the wrong shape.
        """
        if self.cvae_encoder is None or (actions is None and not self.training):
            return ACTOutput(self.decode(observation), None, None)
        if actions is None or is_pad is None:
            raise ValueError(
                "ACT.forward: give actions and is_pad together; training with use_cvae needs both"
            )
        mu, logvar = self.posterior(observation, actions, is_pad)
        latent = mu
        if self.training:
            noise = torch.randn_like(mu) if noise is None else noise
            latent = mu + (0.5 * logvar).exp() * noise
        return ACTOutput(self.decode(observation, latent), mu, logvar)

    def losses(self, batch: Batch, step: int, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The reconstruction plus kl_weight * KL: Algorithm 1 of the paper.

        Returns:
            `loss`; `l1` or `mse`; with a CVAE also `kl` (nats, summed over the latent whatever the
            loss does) and `kl_weight`.
        """
        config = self.config
        output = self(batch.observation, batch.actions, batch.is_pad, noise)
        target = self.normalizer.normalize_actions(batch.actions)
        reconstruction = RECONSTRUCTION[config.reconstruction](
            output.chunk, target, batch.is_pad, reduction=config.l1_reduction
        )
        if config.l1_reduction == "valid":
            reconstruction = reconstruction * weight_of_rank(batch.is_pad)
        logged: dict[str, Tensor] = {config.reconstruction: reconstruction}
        if output.mu is None:
            return {"loss": reconstruction, **logged}
        kl_weight = config.kl_schedule(step)
        kl_term = kl_divergence(
            output.mu, output.logvar, reduction=config.kl_reduction, free_bits=config.free_bits
        )
        return {
            "loss": reconstruction + kl_weight * kl_term,
            **logged,
            "kl": kl_divergence(output.mu, output.logvar),
            "kl_weight": torch.tensor(kl_weight),
        }

    def evaluate(self, batch: Batch, seeds: Tensor) -> Evaluation:
        """L1 with z = 0; with a CVAE also with the posterior's mean and with z from the prior.

        What the demonstrated chunk tells the decoder is `l1_prior` - `l1_posterior`; what ignorance
        of it costs a policy that samples is `l1_sampled`.
        """
        target = self.normalizer.normalize_actions(batch.actions)
        tokens = self.observe(batch.observation)
        zero = self._no_latent(len(batch))
        chunk = self._decode(tokens, zero)
        errors = {"l1_prior": masked_l1(chunk, target, batch.is_pad)}
        if self.cvae_encoder is None:
            return Evaluation(errors, {}, chunk)
        posterior = self.posterior(batch.observation, batch.actions, batch.is_pad)
        noise = standard_normal(len(batch), self.config.dim_latent, seeds, zero.device)
        for name, latent in (("l1_posterior", posterior.mu), ("l1_sampled", noise)):
            errors[name] = masked_l1(self._decode(tokens, latent), target, batch.is_pad)
        return Evaluation(errors, {"kl": kl_divergence(*posterior)}, chunk, posterior)

    def sample(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Decodes z = 0 or a z from the prior, as `latent_at_inference` says."""
        if self.config.latent_at_inference == "zero":
            return self.decode(observation)
        latent = standard_normal(
            len(observation), self.config.dim_latent, seeds, observation.qpos.device
        )
        return self.decode(observation, latent)

    def posterior(self, observation: Observation, actions: Tensor, is_pad: Tensor) -> Posterior:
        """Encodes demonstrated actions; arguments as `forward`.

        Raises:
            ValueError: if a tensor has the wrong shape, or there is no CVAE.
        """
        if self.cvae_encoder is None:
            raise ValueError("ACT.posterior: this network has use_cvae=False: no latent")
        self.check(observation)
        expected = (len(observation), self.config.chunk_size, self.spec.dim_action)
        if actions.shape != expected or is_pad.shape != expected[:2]:
            raise ValueError(
                f"ACT: actions {tuple(actions.shape)} and is_pad {tuple(is_pad.shape)} "
                f"must be {expected} and {expected[:2]}: give the data the network's chunk_size"
            )
        normalizer = self.normalizer
        mu, logvar = self.cvae_encoder(
            normalizer.normalize_qpos(observation.qpos),
            None
            if observation.env_state is None
            else normalizer.normalize_env_state(observation.env_state),
            normalizer.normalize_actions(actions),
            is_pad,
        )
        return Posterior(mu, logvar)

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
        tokens = self.observe(observation)
        return self._decode(tokens, self._no_latent(len(tokens)) if latent is None else latent)

    def observe(self, observation: Observation) -> Tensor:
        """(B, T - 1, C) tokens of a raw observation: all of the decoder's input but the latent."""
        self.check(observation)
        qpos = self.normalizer.normalize_qpos(observation.qpos)
        env_state = features = None
        if observation.env_state is not None:
            env_state = self.normalizer.normalize_env_state(observation.env_state)
        if self.backbone is not None and observation.images is not None:
            features = self.backbone(self.normalizer.normalize_images(observation.images))
        tokens: Tensor = self.obs_encoder.observe(qpos, env_state, features)
        return tokens

    def _decode(self, tokens: Tensor, latent: Tensor) -> Tensor:
        memory, positions = self.obs_encoder(latent, tokens)
        chunk: Tensor = self.chunk_decoder(memory, positions)
        return chunk

    def _no_latent(self, rows: int) -> Tensor:
        return self.normalizer.qpos_mean.new_zeros(rows, self.config.dim_latent)


class ObsEncoder(nn.Module):
    """Latent and observation to memory: tokens [latent, qpos, (env_state), image features].

    Learned positions for the single tokens, DETR's sine positions for image features, the same for
    every camera, as in the original.
    """

    image_positions: Tensor

    def __init__(self, config: ACTConfig, spec: DataSpec) -> None:
        super().__init__()
        width = config.dim_model
        self.latent_proj = nn.Linear(config.dim_latent, width)
        self.qpos_proj: nn.Module = Float32Linear(spec.dim_qpos, width)
        if config.qpos_encoder == "mlp":
            self.qpos_proj = nn.Sequential(self.qpos_proj, nn.ReLU(), Float32Linear(width, width))
        self.env_state_proj = (
            Float32Linear(spec.dim_env_state, width) if spec.dim_env_state else None
        )
        self.image_proj = nn.Linear(config.backbone.dim_features, width) if spec.cameras else None
        num_slots = 2 + (self.env_state_proj is not None)
        self.slot_positions = nn.Parameter(torch.randn(num_slots, width))
        image_positions = torch.empty(0, width)
        if spec.cameras:
            rows, columns = config.backbone.feature_size(spec.image_size)
            image_positions = sine_positions_2d(rows, columns, width)
        self.register_buffer(
            "image_positions", image_positions.repeat(len(spec.cameras), 1), persistent=False
        )
        self.encoder = Encoder(config.layer, config.num_obs_layers)
        xavier_uniform(self.encoder)
        # A lone camera needs no name.
        self.camera_embedding = (
            nn.Parameter(torch.randn(len(spec.cameras), width))
            if config.camera_embedding and len(spec.cameras) > 1
            else None
        )

    def observe(self, qpos: Tensor, env_state: Tensor | None, features: Tensor | None) -> Tensor:
        """Turns an observation into tokens.

        Args:
            qpos: (B, D), in standard deviations.
            env_state: (B, E), in standard deviations.
            features: (B, N, P, channels) of the backbone.

        Returns:
            (B, T - 1, C).
        """
        tokens = [self.qpos_proj(qpos).unsqueeze(1)]
        if self.env_state_proj is not None:
            tokens.append(self.env_state_proj(env_state).unsqueeze(1))
        if self.image_proj is not None and features is not None:
            image_tokens = self.image_proj(features)
            if self.camera_embedding is not None:
                image_tokens = image_tokens + self.camera_embedding[:, None].to(image_tokens.dtype)
            tokens.append(image_tokens.flatten(1, 2))
        return torch.cat(tokens, dim=1)

    def forward(self, latent: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a latent (B, L) and the (B, T - 1, C) tokens of `observe`.

        Returns:
            memory (B, T, C), and its positions (T, C).
        """
        positions = torch.cat([self.slot_positions, self.image_positions])
        tokens = torch.cat([self.latent_proj(latent).unsqueeze(1), tokens], dim=1)
        return self.encoder(tokens, positions), positions


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
