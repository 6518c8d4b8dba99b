"""How sure one can be of success rates, and of differences between them.

Three questions, three answers. How well does this policy do? `wilson_interval` of
sim/results.py. Which of two policies does better, both having played the same worlds?
`mcnemar_exact`. Which of two ways of training does better, each run with several training seeds?
`hierarchical_bootstrap`.

The first two are about the very policies that were played: another training seed is another
policy. Only the third says something about trainings that have not been run.

Shape suffixes: S training seeds, W worlds, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

from act_lightning.sim.results import wilson_interval

Interval = tuple[float, float]
Array = NDArray[np.float64]

NUM_RESAMPLES = 10_000
"""The limits of an interval then repeat within 2% of its width, whatever the generator's seed."""


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Two policies in the same worlds."""

    both: int
    """Worlds in which both succeeded."""
    only_first: int
    """Worlds in which the first succeeded and the second failed."""
    only_second: int
    """Worlds in which the second succeeded and the first failed."""
    neither: int
    """Worlds in which both failed."""
    difference: float
    """Success rate of the first less that of the second."""
    interval: Interval
    """Interval of the difference, see `paired_interval`."""
    p_value: float
    """Two-sided and exact."""


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """A success rate over training seeds and worlds, or the difference of two."""

    mean: float
    """As observed."""
    interval: Interval
    """Where it may lie over all training seeds and worlds."""
    p_value: float | None = None
    """Of a difference, against none: the smallest level at which the interval leaves out 0, so that
    it is below 0.05 where the 95% interval does. None for a single mean."""


def mcnemar_exact(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> McNemar:
    """Compares two policies that played the same worlds.

    Only worlds in which one succeeds and the other fails say which is better. Were neither, each
    of them would be the throw of a coin; the p-value is the chance that so many throws fall at
    least as unevenly. Five such worlds or fewer cannot give less than 0.05, however they fall.

    Assumes that the worlds are independent. Says nothing about training with another seed.

    Args:
        first: (W,) bool, whether the first policy succeeded.
        second: (W,) bool, whether the second did, worlds in the same order.
        confidence: that of the interval. The interval is not made from the exact test, which is
            the more cautious: it can just exclude 0 where the p-value is just above 0.05.

    Raises:
        ValueError: the two differ in length, or are empty.

    Source: McNemar 1947, Psychometrika 12:153; the test is the exact conditional one.
    """
    first_w, second_w = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first_w.ndim != 1 or first_w.shape != second_w.shape or len(first_w) == 0:
        raise ValueError(
            f"first {first_w.shape} and second {second_w.shape} must be (W,), a value for each of "
            "the same worlds"
        )
    only_first = int((first_w & ~second_w).sum())
    only_second = int((~first_w & second_w).sum())
    return McNemar(
        both=int((first_w & second_w).sum()),
        only_first=only_first,
        only_second=only_second,
        neither=int((~first_w & ~second_w).sum()),
        difference=(only_first - only_second) / len(first_w),
        interval=paired_interval(only_first, only_second, len(first_w), confidence),
        p_value=_coin_test(only_first, only_first + only_second),
    )


def paired_interval(
    only_first: int, only_second: int, num_worlds: int, confidence: float = 0.95
) -> Interval:
    """Tango's score interval of the difference of two success rates in the same worlds.

    It holds the differences that a score test does not reject, as Wilson's interval does for one
    rate. So it never leaves [-1, 1], and keeps a width where the two never differ.

    Args:
        only_first: worlds in which only the first succeeded.
        only_second: worlds in which only the second did.
        num_worlds: W, those in which both did the same included.
        confidence: share of such intervals that hold the true difference.

    Source: Tango 1998, Statistics in Medicine 17:891. Recommended for small counts by Fagerland,
    Lydersen and Laake 2014, Statistics in Medicine 33:2850.
    """
    z = float(norm.ppf((1 + confidence) / 2))
    estimate = (only_first - only_second) / num_worlds

    def excess(difference: float) -> float:
        """By how much the estimate is farther from `difference` than z standard errors."""
        b = (2 * num_worlds - only_first + only_second) * difference - only_first - only_second
        c = -only_second * difference * (1 - difference)
        # Most likely share of worlds in which only the second succeeds, given the difference.
        share = (np.sqrt(b * b - 8 * num_worlds * c) - b) / (4 * num_worlds)
        variance = max(0.0, 2 * share + difference * (1 - difference)) / num_worlds
        return float(abs(estimate - difference) - z * np.sqrt(variance))

    # Just beside the estimate, for on it both terms of `excess` can be 0 without it being a limit.
    beside = 1e-9
    low = brentq(excess, -1.0, estimate - beside) if estimate > -1 else -1.0
    high = brentq(excess, estimate + beside, 1.0) if estimate < 1 else 1.0
    return float(low), float(high)


def least_difference(num_differing: int, num_worlds: int, level: float = 0.05) -> float:
    """Smallest difference of two success rates that `mcnemar_exact` could have told from none.

    Args:
        num_differing: worlds in which one succeeded and the other failed. If they are too few for
            any p-value below `level`, the fewest that are enough are taken instead.
        num_worlds: W, all of them.
        level: p-values below it count.
    """
    while _coin_test(num_differing, num_differing) >= level:
        num_differing += 1
    ahead = next(
        ahead
        for ahead in range((num_differing + 1) // 2, num_differing + 1)
        if _coin_test(ahead, num_differing) < level
    )
    return min(1.0, (2 * ahead - num_differing) / num_worlds)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, raised such that the smallest is a fair one.

    The chance that any true "no difference" gets an adjusted p-value below 0.05 is at most 5%.
    Assumes nothing of how the tests depend on each other.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.minimum(1, np.asarray(p_values)[order] * factors))
    return [float(value) for value in adjusted]


def hierarchical_bootstrap(
    outcomes: ArrayLike,
    against: ArrayLike | None = None,
    *,
    same_policies: bool = False,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Bootstrap:
    """Mean success over training seeds and worlds, or the difference of two ways of training.

    Training seeds are resampled and, crossed with them, worlds: a world drawn twice counts twice
    for every training seed and in both groups, so that they stay paired world by world. The
    interval lies between percentiles of the resampled means.

    Assumes that training seeds and worlds are independent draws of all there are, and that the
    training seeds of two groups have nothing to do with each other, unless `same_policies`. Departs
    from the plain method where that fails with few training seeds: S values, resampled, show
    (S - 1) / S of their variance, and may lie close together by chance. So the means of the
    training seeds are first moved apart, by sqrt(S / (S - 1)) and by as much as Student's t
    distribution is wider than the normal. How often the interval then holds the truth, and what
    differences few training seeds can show, is simulated by tests/bench/coverage.py. It is too wide
    where training seeds hardly differ, and holds a mean near 1 too rarely if what lowers it is a
    rare bad training, which few training seeds do not show.

    Args:
        outcomes: (S, W) success of each training seed's policy in each world.
        against: (S', W) those of the other group, in the same worlds; the result is then the
            difference, `outcomes` less `against`. None: the mean of `outcomes`.
        same_policies: whether row s of both are the very same policy, executed in two ways. Then
            S' = S, and a training seed that is drawn twice counts twice in both.
        confidence: share of such intervals that hold the truth.
        num_resamples: R; no p-value is below 2 / R but where nothing varies.
        seed: of the generator; the same arguments always give the same result.

    Raises:
        ValueError: a group has fewer than 2 training seeds, or the worlds are not the same.

    Source: Owen 2007, Annals of Applied Statistics 1:386, resamples two crossed factors;
    Hesterberg 2015, The American Statistician 69:371, tells what few values need. The degrees of
    freedom are Welch's.
    """
    groups = [np.asarray(outcomes, np.float64)]
    if against is not None:
        groups.append(np.asarray(against, np.float64))
    _check_groups(groups, same_policies)
    mean = float(groups[0].mean()) - sum(float(group.mean()) for group in groups[1:])
    resampled = _Resampled.draw(
        [groups[0] - groups[1]] if same_policies else groups, num_resamples, seed
    )
    if np.ptp(resampled.at(confidence)) < 1e-9:
        return _certain(groups, confidence)
    low, high = np.clip(resampled.interval(confidence), -1.0 if len(groups) == 2 else 0.0, 1.0)
    p_value = resampled.p_value(confidence) if len(groups) == 2 else None
    return Bootstrap(mean=mean, interval=(float(low), float(high)), p_value=p_value)


@dataclass(frozen=True, kw_only=True)
class _Resampled:
    """Resampled means, whose training seeds are moved apart by more the surer one wants to be."""

    fixed_r: Array
    """(R,) what the worlds contribute, and the training seeds' common mean."""
    moved_r: Array
    """(R,) what the training seeds' distances from it contribute, per Student's factor."""
    freedom: float | None
    """Welch's degrees of freedom; None if the training seeds do not vary."""

    @classmethod
    def draw(cls, groups: Sequence[Array], num_resamples: int, seed: int) -> _Resampled:
        """Resamples (S, W) outcomes: the first group's, less the second's if there is one."""
        counts_rw = _resampled_worlds(seed, groups[0].shape[1], num_resamples)
        rng = np.random.default_rng([seed, 1])
        fixed_r, moved_r = np.zeros(num_resamples), np.zeros(num_resamples)
        for sign, group_sw in zip((1, -1), groups, strict=False):
            num_seeds = len(group_sw)
            counts_rs = _resample(rng, num_seeds, num_resamples)
            off_s = group_sw.mean(axis=1) - group_sw.mean()
            centred_sw = group_sw - off_s[:, None]
            totals_rs = counts_rw @ centred_sw.T
            fixed_r += sign * np.einsum("rs,rs->r", counts_rs, totals_rs) / group_sw.size
            moved_r += sign * (counts_rs @ off_s) / np.sqrt(num_seeds * (num_seeds - 1))
        return cls(fixed_r=fixed_r, moved_r=moved_r, freedom=_degrees_of_freedom(groups))

    def at(self, confidence: float) -> Array:
        """(R,) resampled means."""
        if self.freedom is None:
            return self.fixed_r
        level = (1 + confidence) / 2
        wider = float(student_t.ppf(level, self.freedom) / norm.ppf(level))
        return self.fixed_r + wider * self.moved_r

    def interval(self, confidence: float) -> Interval:
        """Between percentiles of the resampled means."""
        limits = np.quantile(self.at(confidence), [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(limits[0]), float(limits[1])

    def p_value(self, confidence: float) -> float:
        """The smallest level at which the interval leaves out 0, by halving.

        It starts at the level of `confidence`, so the two cannot say different things.
        """
        least, most = 2 / len(self.fixed_r), 1.0
        level = 1 - confidence
        while most > least * 1.001:
            low, high = self.interval(1 - level)
            if low > 0 or high < 0:
                most = level
            else:
                least = level
            level = float(np.sqrt(least * most))
        return most


def _coin_test(heads: int, throws: int) -> float:
    """Two-sided p-value of a fair coin; 1 without a throw."""
    return float(binomtest(heads, throws).pvalue) if throws else 1.0


def _check_groups(groups: Sequence[Array], same_policies: bool) -> None:
    shapes = " and ".join(str(group.shape) for group in groups)
    for group in groups:
        if group.ndim != 2 or len(group) < 2 or group.shape[1:] != groups[0].shape[1:]:
            raise ValueError(
                f"groups of shape {shapes}: give (S, W), 2 or more training seeds each, in the "
                "same worlds"
            )
    if same_policies and (len(groups) != 2 or len(groups[0]) != len(groups[1])):
        raise ValueError(f"groups of shape {shapes} cannot be the same policies, executed twice")


@lru_cache(maxsize=1)
def _resampled_worlds(seed: int, num_worlds: int, num_resamples: int) -> Array:
    """(R, W) counts; kept, because a report compares many groups in the same worlds."""
    return _resample(np.random.default_rng([seed, 0]), num_worlds, num_resamples)


def _resample(rng: np.random.Generator, size: int, num_resamples: int) -> Array:
    """(R, size) how often each of `size` was drawn, in `size` draws with replacement."""
    drawn = rng.integers(size, size=(num_resamples, size))
    drawn += size * np.arange(num_resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * size)
    return counts.reshape(num_resamples, size).astype(np.float64)


def _degrees_of_freedom(groups: Sequence[Array]) -> float | None:
    """Welch and Satterthwaite's, of the difference of the groups' means."""
    variances = [group.mean(axis=1).var(ddof=1) / len(group) for group in groups]
    if sum(variances) == 0:
        return None
    squares = [v * v / (len(group) - 1) for v, group in zip(variances, groups, strict=True)]
    return float(sum(variances) ** 2 / sum(squares))


def _certain(groups: Sequence[Array], confidence: float) -> Bootstrap:
    """Of groups whose outcomes are all the same: resampled, they would seem to be certain.

    The worlds stand for what was seen, and the training seeds, which agree, count as one.
    """
    num_worlds = groups[0].shape[1]
    counts = [round(float(group.mean()) * num_worlds) for group in groups]
    if len(groups) == 1:
        interval = wilson_interval(counts[0], num_worlds, confidence)
        return Bootstrap(mean=float(groups[0].mean()), interval=interval)
    more = counts[0] - counts[1]
    return Bootstrap(
        mean=float(groups[0].mean() - groups[1].mean()),
        interval=paired_interval(max(0, more), max(0, -more), num_worlds, confidence),
        p_value=_coin_test(abs(more), abs(more)),
    )
