"""Losses over action chunks, the KL divergence of the latent, and schedules of its weight.

Source: Zhao et al. 2023 (arXiv 2304.13705), Algorithm 1. Departure: tonyzhaozh/act divides by every
element of the chunk, padding included, which dilutes chunks near an episode's end; here the
denominator counts real actions only (LeRobot does the same since 2026-04) unless asked otherwise.

Nothing here has a state, so nothing has to be saved to resume a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from act_lightning.nets.across_ranks import mean_over_ranks


def masked_l1(
    pred: Tensor, target: Tensor, is_pad: Tensor, *, reduction: Literal["valid", "all"] = "valid"
) -> Tensor:
    """Mean absolute error; padded actions never add to it.

    Args:
        pred: (B, K, A) predicted actions, in standard deviations.
        target: (B, K, A) demonstrated actions, same unit; padded ones may hold anything, NaN
            included.
        is_pad: (B, K) bool, True past the episode's end.
        reduction: what the sum of errors is divided by. `valid`: the number of real elements;
            `all`: B * K * A as in tonyzhaozh/act, so that a batch half of padding weighs half.

    Returns:
        Scalar; 0 if every step is padding.

    Raises:
        ValueError: if the shapes do not fit together, or there is no such reduction.
    """
    return _reduce(_masked_error(pred, target, is_pad).abs(), is_pad, reduction)


def masked_mse(
    pred: Tensor, target: Tensor, is_pad: Tensor, *, reduction: Literal["valid", "all"] = "valid"
) -> Tensor:
    """Mean squared error; padded actions never add to it. Arguments as `masked_l1`.

    Returns:
        Scalar; 0 if every step is padding.

    Raises:
        ValueError: if the shapes do not fit together, or there is no such reduction.
    """
    return _reduce(_masked_error(pred, target, is_pad).square(), is_pad, reduction)


RECONSTRUCTION = {"l1": masked_l1, "mse": masked_mse}
"""Errors of a chunk, by the name they have in a configuration."""


def kl_per_dim(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each latent dimension, mean over the batch.

    Args:
        mu: (B, L) posterior means.
        logvar: (B, L) logarithms of the posterior variances.

    Returns:
        (L,) float32, in nats.

    Source: Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """
    mu, logvar = mu.float(), logvar.float()
    return (0.5 * (mu.square() + logvar.exp() - 1 - logvar)).mean(dim=0)


def kl_divergence(
    mu: Tensor,
    logvar: Tensor,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    free_bits: float = 0.0,
) -> Tensor:
    """The KL term of the loss: over the latent's dimensions, of the mean over the batch.

    Args:
        mu: (B, L) posterior means.
        logvar: (B, L) logarithms of the posterior variances.
        reduction: over the dimensions. `sum` is the divergence (the paper's, and the default);
            `mean` divides it by L, so a weight of beta then means beta / L.
        free_bits: nats a dimension may use at no cost: one below counts as this much and gets no
            gradient, so nothing pushes it to the prior. 0 for the divergence itself.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: if there is no such reduction.

    Source: free bits from Kingma et al. 2016 (arXiv 1606.04934), appendix C.8, whose groups of
    latents are single dimensions here; like there, the floor is on the mean over the batch, which
    is that of all ranks.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"kl_divergence: reduction={reduction!r}; choose sum or mean")
    kl = kl_per_dim(mu, logvar)
    # Not clamped at 0: rounding can make a dimension at the prior negative, and stop its gradient.
    if free_bits > 0:
        kl = mean_over_ranks(kl).clamp(min=free_bits)
    return kl.sum() if reduction == "sum" else kl.mean()


@dataclass(frozen=True, kw_only=True)
class KLSchedule:
    """Weight of the KL term (beta) at each training step.

    Sources: the linear warm-up is of Sonderby et al. 2016 (arXiv 1602.02282), the cycles of Fu et
    al. 2019 (arXiv 1903.10145). Departure: their cycles fill the run, whose length they have to
    know; here a cycle has a length, and after `num_cycles` the weight stays where it ends.
    `experiments/results/kl_schedules.png` shows each kind.
    """

    kind: Literal["constant", "linear", "cosine", "cyclical"] = "constant"
    """constant: always `weight`; linear, cosine: from 0 to `weight` over `warmup_steps`, then
    constant; cyclical: from 0 to `weight`, again and again."""
    weight: float = 10.0
    """Final weight; the largest one if cyclical."""
    warmup_steps: int = 0
    """Training steps from 0 to `weight`; for linear and cosine alone."""
    cycle_steps: int = 0
    """Training steps of one cycle; for cyclical alone. The paper has four cycles in a run."""
    cycle_ratio: float = 0.5
    """Part of a cycle spent rising, in (0, 1]; the rest stays at `weight`. For cyclical alone.
    With 1, `weight` is only approached."""
    num_cycles: int | None = None
    """Cycles after which the weight stays at `weight`; null for no end. For cyclical alone."""

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
        if not 0 < self.cycle_ratio <= 1:
            raise ValueError(f"KLSchedule: cycle_ratio={self.cycle_ratio} must be in (0, 1]")
        if self.num_cycles is not None and self.num_cycles < 1:
            raise ValueError(
                f"KLSchedule: num_cycles={self.num_cycles}; give 1 or more, or null for no end"
            )
        self._check_rise()
        self._check_cycles()

    def _check_rise(self) -> None:
        rises_once = self.kind in ("linear", "cosine")
        if rises_once and self.warmup_steps == 0:
            raise ValueError(
                f"KLSchedule: kind={self.kind} with warmup_steps=0; give the steps the rise takes, "
                "or use kind: constant"
            )
        if self.warmup_steps > 0 and not rises_once:
            instead = (
                "use kind: linear or cosine, which stay constant after it"
                if self.kind == "constant"
                else "each cycle rises anyway, over cycle_ratio of it"
            )
            raise ValueError(
                f"KLSchedule: warmup_steps={self.warmup_steps} does nothing with kind={self.kind}; "
                f"set it to 0 ({instead})"
            )

    def _check_cycles(self) -> None:
        if self.kind == "cyclical":
            if self.cycle_steps == 0:
                raise ValueError(
                    "KLSchedule: kind=cyclical with cycle_steps=0; give the steps of one cycle "
                    "(a quarter of the run is the paper's choice)"
                )
            return
        for name in ("cycle_steps", "cycle_ratio", "num_cycles"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default:
                raise ValueError(
                    f"KLSchedule: {name}={value} does nothing with kind={self.kind}; "
                    "leave it out, or use kind: cyclical"
                )

    def __call__(self, step: int) -> float:
        """Weight at training step `step` (0 is the first)."""
        if self.kind == "constant":
            return self.weight
        if self.kind == "cyclical":
            cycle, position = divmod(step, self.cycle_steps)
            if self.num_cycles is not None and cycle >= self.num_cycles:
                return self.weight
            return self.weight * min(1.0, position / self.cycle_steps / self.cycle_ratio)
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


def _reduce(values: Tensor, is_pad: Tensor, reduction: str) -> Tensor:
    if reduction == "all":
        return values.mean()
    if reduction != "valid":
        raise ValueError(f"loss: reduction={reduction!r}; choose valid or all")
    num_valid = (~is_pad).sum() * values.shape[-1]
    return values.sum() / num_valid.clamp(min=1)
