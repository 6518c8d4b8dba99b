"""The recognition side of the CVAE: a demonstrated chunk to the posterior of its latent.

Used in training and validation only. There are two, behind the same call: ACT's transformer (Zhao
et al. 2023), and for comparison the textbook's perceptron over observation and flattened chunk
(Sohn et al. 2015, "Learning Structured Output Representation using Deep Conditional Generative
Models"). Departure of both: padded actions are blanked, so that not even NaN there matters.

Shapes: B batch, K chunk size, D qpos, E env_state, A action, L latent, C = dim_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from act_lightning.batch import DataSpec
from act_lightning.nets.transformer import Encoder, sinusoid_table

if TYPE_CHECKING:
    from act_lightning.nets.act import ACTConfig


class TransformerCVAEEncoder(nn.Module):
    """ACT's: a transformer over the tokens [CLS, qpos, a_t, ..., a_t+K-1].

    As in the original it sees no images; nor env_state, as in LeRobot.
    """

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

    def forward(
        self, qpos: Tensor, env_state: Tensor | None, actions: Tensor, is_pad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes a normalised chunk.

        Args:
            qpos: (B, D), in standard deviations.
            env_state: (B, E), not read.
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


class MLPCVAEEncoder(nn.Module):
    """The textbook's: a perceptron over [qpos, env_state, a_t, ..., a_t+K-1], all in one vector.

    It has `num_cvae_layers` hidden layers, `dim_feedforward` wide. Padded actions are 0, the mean.
    """

    def __init__(self, config: ACTConfig, spec: DataSpec) -> None:
        super().__init__()
        width = config.dim_feedforward
        layers: list[nn.Module] = []
        dim_in = spec.dim_qpos + spec.dim_env_state + config.chunk_size * spec.dim_action
        for _ in range(config.num_cvae_layers):
            layers += [nn.Linear(dim_in, width), nn.ReLU(), nn.Dropout(config.dropout)]
            dim_in = width
        self.hidden = nn.Sequential(*layers)
        self.latent_head = nn.Linear(width, 2 * config.dim_latent)

    def forward(
        self, qpos: Tensor, env_state: Tensor | None, actions: Tensor, is_pad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes a normalised chunk; arguments and result as `TransformerCVAEEncoder.forward`."""
        actions = actions.masked_fill(is_pad.unsqueeze(-1), 0.0)
        given = [qpos] if env_state is None else [qpos, env_state]
        hidden = self.hidden(torch.cat([*given, actions.flatten(1)], dim=1))
        mu, logvar = self.latent_head(hidden).float().chunk(2, dim=-1)
        return mu, logvar
