"""How often `hierarchical_bootstrap` is right: intervals, and p-values without a difference.

    python tests/bench/coverage.py [--cases 400] [--worlds 200] [--json FILE]

Each case draws success rates for the training seeds (normal, of the standard deviation named), the
difficulty of worlds (`hard`: by how much it varies, on the scale of a normal quantile), and
outcomes; 0 where the rates of two groups are drawn alike. `mean`: 95% intervals of one group that
hold the rate over all training seeds and worlds; `difference`: those of two groups that hold 0,
which is 1 less the share of p-values below 0.05; `plain`: the same without moving training seeds
apart; `same policies`: two ways of executing each policy, alike on average, that differ by training
seed by half of that standard deviation. `known to`: half of the median width of an interval of a
difference, in points.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import norm
from turns import make_parser, write_report

from act_lightning.study import statistics
from act_lightning.study.statistics import hierarchical_bootstrap

NUM_RESAMPLES = 1000
SEEDS = (3, 5)
RATES = (0.6, 0.9, 0.98)
DEVIATIONS = (0.0, 0.03, 0.1)
HARD = (0.0, 1.0)

Array = NDArray[np.float64]


def main() -> None:
    """Simulates every setting, and prints a row for each."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--worlds", type=int, default=200)
    options = parser.parse_args()
    headings = ("mean", "difference", "plain", "same policies", "known to")
    table = Table(title=f"{options.cases} cases of {options.worlds} worlds")
    for heading in ("seeds", "rate", "deviation", "hard", *headings):
        table.add_column(heading, justify="right")
    rows = []
    for num_seeds in SEEDS:
        for rate in RATES:
            for deviation in DEVIATIONS:
                for hard in HARD:
                    found = simulate(num_seeds, rate, deviation, hard, options)
                    rows.append(
                        {"seeds": num_seeds, "rate": rate, "deviation": deviation, "hard": hard}
                        | found
                    )
                    shares = [f"{found[name]:.1%}" for name in headings[:-1]]
                    table.add_row(
                        *map(str, (num_seeds, rate, deviation, hard)),
                        *shares,
                        f"{100 * found['known to']:.1f}",
                    )
    Console().print(table)
    write_report(options.json, {"rows": rows})


def simulate(
    num_seeds: int, rate: float, deviation: float, hard: float, options: argparse.Namespace
) -> dict[str, float]:
    """Shares of the cases in which the truth was held, by what was asked."""
    rng = np.random.default_rng(0)
    truth = np.mean(
        [_draw(rng, num_seeds, rate, deviation, hard, 1000)().mean() for _ in range(400)]
    )
    held = {"mean": 0, "difference": 0, "plain": 0, "same policies": 0}
    widths = []
    for _ in range(options.cases):
        draw = _draw(rng, num_seeds, rate, deviation, hard, options.worlds)
        first, second = draw(), draw()
        low, high = hierarchical_bootstrap(first, num_resamples=NUM_RESAMPLES).interval
        held["mean"] += low <= truth <= high
        found = hierarchical_bootstrap(first, second, num_resamples=NUM_RESAMPLES)
        held["difference"] += found.p_value is not None and found.p_value >= 0.05
        widths.append(found.interval[1] - found.interval[0])
        with mock.patch.object(statistics._Resampled, "at", _unmoved(num_seeds)):
            plain = hierarchical_bootstrap(first, second, num_resamples=NUM_RESAMPLES)
        held["plain"] += plain.p_value is not None and plain.p_value >= 0.05
        ways = _two_ways(rng, num_seeds, rate, deviation, hard, options.worlds)
        found = hierarchical_bootstrap(*ways, same_policies=True, num_resamples=NUM_RESAMPLES)
        held["same policies"] += found.p_value is not None and found.p_value >= 0.05
    shares = {name: count / options.cases for name, count in held.items()}
    return shares | {"known to": float(np.median(widths)) / 2}


def _unmoved(num_seeds: int) -> Callable[[statistics._Resampled, float], Array]:
    """The means of the plain bootstrap, in place of `_Resampled.at`."""
    shrink = np.sqrt((num_seeds - 1) / num_seeds)
    return lambda resampled, confidence: resampled.fixed_r + shrink * resampled.moved_r


def _draw(
    rng: np.random.Generator,
    num_seeds: int,
    rate: float,
    deviation: float,
    hard: float,
    num_worlds: int,
) -> Callable[[], Array]:
    """Draws groups (S, W) of outcomes in the same worlds."""
    hard_w = rng.normal(0, hard, num_worlds)

    def draw() -> Array:
        rates_s = rng.normal(rate, deviation, num_seeds).clip(0.001, 0.999)
        return _play(rng, rates_s, hard_w)

    return draw


def _two_ways(
    rng: np.random.Generator,
    num_seeds: int,
    rate: float,
    deviation: float,
    hard: float,
    num_worlds: int,
) -> tuple[Array, Array]:
    """(S, W) outcomes of the same policies, executed in two ways."""
    hard_w = rng.normal(0, hard, num_worlds)
    rates_s = rng.normal(rate, deviation, num_seeds)
    first, second = (
        _play(rng, (rates_s + rng.normal(0, deviation / 2, num_seeds)).clip(0.001, 0.999), hard_w)
        for _ in range(2)
    )
    return first, second


def _play(rng: np.random.Generator, rates_s: Array, hard_w: Array) -> Array:
    """(S, W) outcomes; where worlds differ in difficulty, rates are those of the middling world."""
    chance_sw = norm.cdf(norm.ppf(rates_s)[:, None] * np.hypot(1, hard_w.std()) - hard_w)
    outcomes: Array = (rng.random(chance_sw.shape) < chance_sw).astype(np.float64)
    return outcomes


if __name__ == "__main__":
    main()
