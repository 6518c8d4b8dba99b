"""Transformer layers and position tables of ACT.

Source: DETR (Carion et al. 2020), as used by tonyzhaozh/act: positions are added to queries and
keys at every attention, never to values; each layer is normalised after its residual sums
(post-norm), optionally before. Departure from torch's own layers: those positions, and batch first
only. Parameters have the layout of `nn.MultiheadAttention` (query, key and value weights stacked in
one matrix), so that other ACTs' weights fit one to one and Xavier initialisation draws from the
same range as theirs.

Shapes: B batch, L tokens, M memory tokens, C = dim_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Sizes every layer shares."""

    dim_model: int
    """C, width of a token."""
    num_heads: int
    """Attention heads; must divide dim_model."""
    dim_feedforward: int
    """Hidden width of the feed-forward block."""
    dropout: float
    """Probability, on attention weights, hidden units and residual branches."""
    activation: Literal["relu", "gelu"]
    """Non-linearity of the feed-forward block."""
    pre_norm: bool
    """Normalise a block's input instead of the residual sum behind it."""


class Encoder(nn.Module):
    """Self-attention layers; with pre-norm a last normalisation of the residual sum."""

    def __init__(self, config: LayerConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.dim_model) if config.pre_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor, is_pad: Tensor | None = None) -> Tensor:
        """Encodes tokens.

        Args:
            x: (B, L, C) tokens.
            positions: (L, C), added to queries and keys.
            is_pad: (B, L) bool, True where no token may attend to.

        Returns:
            (B, L, C).
        """
        positions = positions.to(x.dtype)  # else a float32 table would promote bf16 tokens
        for layer in self.layers:
            x = layer(x, positions, is_pad)
        out: Tensor = self.norm(x)
        return out


class Decoder(nn.Module):
    """Self- and cross-attention layers, then a last normalisation in either norm order (DETR)."""

    def __init__(self, config: LayerConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.dim_model)

    def forward(
        self, x: Tensor, memory: Tensor, positions: Tensor, memory_positions: Tensor
    ) -> Tensor:
        """Decodes tokens from a memory.

        Args:
            x: (B, L, C) tokens.
            memory: (B, M, C) encoded tokens to attend to.
            positions: (L, C), added to the tokens as queries and keys.
            memory_positions: (M, C), added to the memory as keys.

        Returns:
            (B, L, C).
        """
        positions = positions.to(x.dtype)
        memory_keys = memory + memory_positions.to(memory.dtype)
        for layer in self.layers:
            x = layer(x, memory, positions, memory_keys)
        out: Tensor = self.norm(x)
        return out


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.self_attention = Attention(config)
        self.self_residual = Residual(config)
        self.feed_forward = feed_forward(config)
        self.feed_forward_residual = Residual(config)

    def forward(self, x: Tensor, positions: Tensor, is_pad: Tensor | None = None) -> Tensor:
        """(B, L, C) to (B, L, C); arguments as `Encoder.forward`."""

        def attend(x: Tensor) -> Tensor:
            placed = x + positions
            out: Tensor = self.self_attention(placed, placed, x, is_pad)
            return out

        x = self.self_residual(x, attend)
        out: Tensor = self.feed_forward_residual(x, self.feed_forward)
        return out


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to the memory, then feed-forward."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.self_attention = Attention(config)
        self.self_residual = Residual(config)
        self.cross_attention = Attention(config)
        self.cross_residual = Residual(config)
        self.feed_forward = feed_forward(config)
        self.feed_forward_residual = Residual(config)

    def forward(self, x: Tensor, memory: Tensor, positions: Tensor, memory_keys: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C); `memory_keys` (B, M, C) is the memory plus its positions."""

        def attend(x: Tensor) -> Tensor:
            placed = x + positions
            out: Tensor = self.self_attention(placed, placed, x)
            return out

        x = self.self_residual(x, attend)
        x = self.cross_residual(
            x, lambda x: self.cross_attention(x + positions, memory_keys, memory)
        )
        out: Tensor = self.feed_forward_residual(x, self.feed_forward)
        return out


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017)."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.in_proj = nn.Linear(config.dim_model, 3 * config.dim_model)
        self.out_proj = nn.Linear(config.dim_model, config.dim_model)
        # As nn.MultiheadAttention starts.
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, is_pad: Tensor | None = None
    ) -> Tensor:
        """Attends from each query to all unpadded keys.

        Args:
            query: (B, L, C).
            key: (B, M, C).
            value: (B, M, C).
            is_pad: (B, M) bool, True for keys to leave out.

        Returns:
            (B, L, C); where every key is padding, finite but meaningless.
        """
        q, k, v = (
            x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for x in self._project(query, key, value)
        )
        keep = None if is_pad is None else ~is_pad[:, None, None, :]
        attention = explicit_attention if q.is_cpu else F.scaled_dot_product_attention
        # Mixed precision would take the softmax in float32, and copy all weights there and back.
        with torch.autocast(q.device.type, enabled=False):
            attended = attention(q, k, v, keep, self.dropout if self.training else 0.0)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        width, same = value.shape[-1], key is query
        inputs = [query, value] if same else [query, key, value]
        widths = [2 * width, width] if same else [width, width, width]
        # Not slices: each would have a gradient of the whole weight's size, all but its part zero.
        weights, biases = (torch.split(x, widths) for x in (self.in_proj.weight, self.in_proj.bias))
        *keyed, v = map(F.linear, inputs, weights, biases)
        q, k = keyed[0].chunk(2, -1) if same else keyed
        return q, k, v


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, dropout: float
) -> Tensor:
    """What F.scaled_dot_product_attention computes, written out.

    For the CPU, where that function's backward pass is slow: a bf16 training step of a small ACT
    takes 1.6 times as long with it (measured on torch 2.14).

    Args:
        q: (B, heads, L, C / heads).
        k: (B, heads, M, C / heads).
        v: (B, heads, M, C / heads).
        keep: (B, 1, 1, M) bool, False for keys to leave out; None keeps all.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, heads, L, C / heads); where no key is kept, the mean of all values.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if keep is not None:
        # Added: filling in takes several times as long, and again in the backward pass.
        left_out = torch.zeros_like(keep, dtype=scores.dtype)
        scores += left_out.masked_fill_(~keep, torch.finfo(scores.dtype).min / 2)
    weights = drop(scores.softmax(dim=-1), dropout)
    return weights @ v


def drop(x: Tensor, probability: float) -> Tensor:
    """What F.dropout computes in training, from cheaper random numbers on the CPU.

    torch draws a Bernoulli number an element there, a sixth of a bf16 training step of ACT; here 16
    random bits an element are compared with the probability, which is met to 1e-5. They are
    numpy's, which draws them twice as fast, seeded by torch's generator; and they are compared
    without booleans, which take torch eight times as long to turn into bfloat16 as integers.

    Args:
        x: of any shape.
        probability: of an element to become 0; the others are divided by what is left of 1.
    """
    if probability == 0 or not x.is_cpu:
        return F.dropout(x, probability)
    generator = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
    words = generator.random_raw(-(-x.numel() // 4))
    bits = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)
    lowest = round(probability * 2**16) - 2**15  # that is kept
    keep = bits.clamp_(lowest - 1, lowest).sub_(lowest - 1)
    return x * keep.to(x.dtype).div_(1 - probability)


class Dropout(nn.Dropout):
    """`nn.Dropout` by `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) to (...); as it is in evaluation."""
        return drop(x, self.p) if self.training else x


class Residual(nn.Module):
    """Input plus a block's output, normalising the sum (post-norm) or the input (pre-norm)."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.norm = nn.LayerNorm(config.dim_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        if self.pre_norm:
            out: Tensor = x + self.dropout(block(self.norm(x)))
        else:
            out = self.norm(x + self.dropout(block(x)))
        return out


def feed_forward(config: LayerConfig) -> nn.Sequential:
    """The two-layer perceptron applied to each token."""
    return nn.Sequential(
        nn.Linear(config.dim_model, config.dim_feedforward),
        nn.ReLU() if config.activation == "relu" else nn.GELU(),
        Dropout(config.dropout),
        nn.Linear(config.dim_feedforward, config.dim_model),
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


def xavier_uniform(module: nn.Module) -> None:
    """Initialises every weight matrix Xavier uniform; vectors (biases, norms) stay as they are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def sinusoid_table(num_positions: int, dim: int) -> Tensor:
    """(num_positions, dim) float32, sines in even, cosines in odd columns (Vaswani et al. 2017)."""
    index = torch.arange(num_positions, dtype=torch.float64)
    return _interleaved_sinusoids(index, dim).float()


def sine_positions_2d(height: int, width: int, dim: int) -> Tensor:
    """DETR's fixed positions of a feature map, normalised to 2 pi.

    Args:
        height: rows of the feature map.
        width: columns of the feature map.
        dim: token width C, a multiple of 4.

    Returns:
        (height * width, dim) float32, row by row: the row's sinusoids, then the column's.

    Source: DETR's PositionEmbeddingSine with normalize=True: positions count from 1, so they lie in
    (0, 2 pi].
    """
    rows, columns = (
        _interleaved_sinusoids(
            torch.arange(1, size + 1, dtype=torch.float64) / (size + 1e-6) * 2 * math.pi, dim // 2
        )
        for size in (height, width)
    )
    grid = (height, width, dim // 2)
    table = torch.cat([rows[:, None].expand(grid), columns[None, :].expand(grid)], dim=-1)
    return table.flatten(0, 1).float()


def _interleaved_sinusoids(positions: Tensor, dim: int) -> Tensor:
    """(P,) to (P, dim): sin, cos, sin, cos ... at wavelengths from 2 pi to 10000 * 2 pi."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = positions[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
