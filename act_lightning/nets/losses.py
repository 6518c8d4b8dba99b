"""Losses over unpadded actions, the KL divergence of the latent, and schedules of its weight.

Source: Zhao et al. 2023 (arXiv 2304.13705), Algorithm 1. Departure: tonyzhaozh/act divides by every
element of the chunk, padding included, which dilutes chunks near an episode's end; here the
denominator counts real actions only (LeRobot does the same since 2026-04).

Everything is a pure function, so nothing has to be saved to resume a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


def masked_l1(pred: Tensor, target: Tensor, is_pad: Tensor) -> Tensor:
    """Mean absolute error over real (unpadded) actions.

    Args:
        pred: (B, K, A) predicted actions, in standard deviations.
        target: (B, K, A) demonstrated actions, same unit; padded ones may hold anything, NaN
            included.
        is_pad: (B, K) bool, True past the episode's end.

    Returns:
        Scalar; 0 if every step is padding.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    return _mean_over_valid(_masked_error(pred, target, is_pad).abs(), is_pad)


def masked_mse(pred: Tensor, target: Tensor, is_pad: Tensor) -> Tensor:
    """Mean squared error over real (unpadded) actions; arguments as `masked_l1`.

    Returns:
        Scalar; 0 if every step is padding.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    return _mean_over_valid(_masked_error(pred, target, is_pad).square(), is_pad)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats: sum over the latent, mean over the batch.

    Args:
        mu: (B, L) posterior means.
        logvar: (B, L) logarithms of the posterior variances.

    Returns:
        Scalar.

    Source: Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """
    mu, logvar = mu.float(), logvar.float()
    return (0.5 * (mu.square() + logvar.exp() - 1 - logvar)).sum(dim=-1).mean()


@dataclass(frozen=True, kw_only=True)
class KLSchedule:
    """Weight of the KL term (beta) at each training step."""

    kind: Literal["constant", "linear", "cosine", "cyclical"] = "constant"
    """constant: always `weight`; linear, cosine: from 0 to `weight` over `warmup_steps`, then
    constant;
    cyclical: again and again from 0 to `weight` (Fu et al. 2019, arXiv 1903.10145)."""
    weight: float = 10.0
    """Final weight; the largest one if cyclical."""
    warmup_steps: int = 0
    """Training steps from 0 to `weight`; used by linear and cosine."""
    cycle_steps: int = 0
    """Training steps of one cycle; used by cyclical. The paper has four cycles in a run."""
    cycle_ratio: float = 0.5
    """Part of a cycle spent rising, in (0, 1]; used by cyclical."""

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine", "cyclical"):
            raise ValueError(
                f"KLSchedule: kind={self.kind!r}; choose constant, linear, cosine or cyclical"
            )
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"KLSchedule: weight={self.weight} must be finite and not negative")
        if self.warmup_steps < 0 or self.cycle_steps < 0:
            raise ValueError(
                f"KLSchedule: warmup_steps={self.warmup_steps} and cycle_steps={self.cycle_steps} "
                "must not be negative"
            )
        if self.kind in ("linear", "cosine") and self.warmup_steps == 0:
            raise ValueError(
                f"KLSchedule: kind={self.kind} with warmup_steps=0; give the steps the rise takes, "
                "or use kind: constant"
            )
        if self.kind == "cyclical" and self.cycle_steps == 0:
            raise ValueError(
                "KLSchedule: kind=cyclical with cycle_steps=0; give the steps of one cycle "
                "(a quarter of the run is the paper's choice)"
            )
        if not 0 < self.cycle_ratio <= 1:
            raise ValueError(f"KLSchedule: cycle_ratio={self.cycle_ratio} must be in (0, 1]")

    def __call__(self, step: int) -> float:
        """Weight at training step `step` (0 is the first)."""
        if self.kind == "constant":
            return self.weight
        if self.kind == "cyclical":
            position = (step % self.cycle_steps) / self.cycle_steps
            return self.weight * min(1.0, position / self.cycle_ratio)
        risen = min(1.0, step / self.warmup_steps)
        if self.kind == "cosine":
            risen = 0.5 * (1.0 - math.cos(math.pi * risen))
        return self.weight * risen


def _masked_error(pred: Tensor, target: Tensor, is_pad: Tensor) -> Tensor:
    if pred.shape != target.shape or is_pad.shape != pred.shape[:2]:
        raise ValueError(
            f"loss: pred {tuple(pred.shape)} and target {tuple(target.shape)} must both be "
            f"(B, K, A), and is_pad {tuple(is_pad.shape)} its (B, K)"
        )
    # Filled before abs or square, not multiplied after: 0 * NaN is NaN, in the gradient too.
    return (pred.float() - target.float()).masked_fill(is_pad.unsqueeze(-1), 0.0)


def _mean_over_valid(values: Tensor, is_pad: Tensor) -> Tensor:
    num_valid = (~is_pad).sum() * values.shape[-1]
    return values.sum() / num_valid.clamp(min=1)
