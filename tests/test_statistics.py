"""Intervals and tests against published examples, brute force and simulation."""

from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, norm, ttest_1samp, ttest_ind
from scipy.stats import t as student_t

from act_lightning.sim.results import wilson_interval
from act_lightning.study.statistics import (
    hierarchical_bootstrap,
    holm,
    least_difference,
    mcnemar_exact,
    paired_interval,
)


def paired(both, only_first, only_second, neither):
    """Outcomes of two policies with these counts."""
    first = [1] * both + [1] * only_first + [0] * only_second + [0] * neither
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return first, second


def test_wilson_is_the_closed_formula():
    k, n, z = 22, 200, norm.ppf(0.975)
    centre, root = k + z * z / 2, z * np.sqrt(k * (n - k) / n + z * z / 4)
    expected = (centre - root) / (n + z * z), (centre + root) / (n + z * z)
    assert wilson_interval(k, n) == pytest.approx(expected)


def test_no_episodes_have_no_interval():
    with pytest.raises(ValueError, match="n"):
        wilson_interval(0, 0)


# Counts (both, only first, only second, neither), p-value, Tango's interval: Bentur 2009 and Cavo
# 2012 as in Fagerland, Lydersen, Laake 2014, and the example of Agresti and Min 2005.
PUBLISHED = [
    ((1, 1, 7, 12), 0.0703, (-0.517, -0.026)),
    ((59, 6, 16, 80), 0.0525, (-0.124, -0.005)),
    ((53, 16, 8, 9), 0.1516, (-0.020, 0.207)),
]


@pytest.mark.parametrize(("counts", "p_value", "interval"), PUBLISHED)
def test_mcnemar_is_the_published(counts, p_value, interval):
    result = mcnemar_exact(*paired(*counts))
    assert (result.both, result.only_first, result.only_second, result.neither) == counts
    assert result.difference == (counts[1] - counts[2]) / sum(counts)
    assert result.p_value == pytest.approx(p_value, abs=5e-5)
    assert result.interval == pytest.approx(interval, abs=5e-4)


def test_mcnemar_counts_worlds_not_orders():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 100)) < [[0.7], [0.5]]
    order = rng.permutation(100)
    assert mcnemar_exact(first[order], second[order]) == mcnemar_exact(first, second)
    swapped = mcnemar_exact(second, first)
    assert swapped.p_value == mcnemar_exact(first, second).p_value
    low, high = mcnemar_exact(first, second).interval
    assert swapped.interval == pytest.approx((-high, -low))


def test_mcnemar_p_value_counts_all_ways_the_coins_can_fall():
    only_first, only_second = 9, 2
    uneven = [
        abs(2 * sum(throws) - 11) >= only_first - only_second
        for throws in product((0, 1), repeat=11)
    ]
    result = mcnemar_exact(*paired(30, only_first, only_second, 5))
    assert result.p_value == pytest.approx(np.mean(uneven))


@pytest.mark.parametrize(("first", "second"), [([1, 0], [1]), ([], []), ([[1]], [[0]])])
def test_unpaired_outcomes_are_refused(first, second):
    with pytest.raises(ValueError, match="same worlds"):
        mcnemar_exact(first, second)


def score(only_first, only_second, worlds, difference):
    """Tango's statistic; the nuisance parameter by maximising the likelihood numerically."""

    def loss(share):
        shares = share + difference, share, 1 - 2 * share - difference
        counts = only_first, only_second, worlds - only_first - only_second
        return -sum(n * np.log(max(p, 1e-300)) for n, p in zip(counts, shares, strict=True))

    bounds = max(0.0, -difference), (1 - difference) / 2
    share = minimize_scalar(loss, bounds, bounds=bounds, options={"xatol": 1e-12}).x
    variance = (2 * share + difference - difference**2) / worlds
    return ((only_first - only_second) / worlds - difference) / np.sqrt(variance)


@pytest.mark.parametrize("counts", [(12, 3, 50), (1, 30, 200), (5, 0, 40), (20, 20, 41)])
def test_the_interval_ends_where_the_score_test_rejects(counts):
    low, high = paired_interval(*counts)
    assert score(*counts, low) == pytest.approx(norm.ppf(0.975), abs=1e-3)
    assert score(*counts, high) == pytest.approx(norm.ppf(0.025), abs=1e-3)


def test_the_interval_keeps_its_width_where_policies_never_differ():
    z = norm.ppf(0.975)
    limit = z * z / (200 + z * z)
    assert paired_interval(0, 0, 200) == pytest.approx((-limit, limit))
    # All worlds to one side: as the interval of a rate of 0 or 1, on a scale from -1 to 1.
    assert paired_interval(200, 0, 200) == pytest.approx((1 - 2 * limit, 1), abs=1e-3)
    assert paired_interval(0, 200, 200) == pytest.approx((-1, 2 * limit - 1), abs=1e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Exactly, over all outcomes of 40 worlds, for two policies with 30% and 10%, independent."""
    only_first, only_second, worlds = 0.3 * 0.9, 0.7 * 0.1, 40
    held = 0.0
    for b in range(worlds + 1):
        for c in range(worlds + 1 - b):
            chance = binom.pmf(b, worlds, only_first) * binom.pmf(
                c, worlds - b, only_second / (1 - only_first)
            )
            if chance > 1e-7:
                low, high = paired_interval(b, c, worlds)
                held += chance * (low <= only_first - only_second <= high)
    assert held == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("level", [0.05, 0.01])
@pytest.mark.parametrize("differing", [0, 3, 6, 7, 24, 101])
def test_the_least_difference_is_the_first_that_the_test_shows(differing, level):
    def p_value(ahead):
        return binomtest((used + ahead) // 2, used).pvalue

    used = next(n for n in range(max(1, differing), 200) if binomtest(n, n).pvalue < level)
    ahead = round(200 * least_difference(differing, 200, level))
    assert (used + ahead) % 2 == 0
    assert p_value(ahead) < level <= p_value(ahead - 2)


def test_holm_on_an_example_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def outcomes(rng, rates, worlds=200):
    """(S, W) outcomes of training seeds with these success rates, worlds all alike."""
    return rng.random((len(rates), worlds)) < np.asarray(rates)[:, None]


def brute_force(groups, num_resamples=4000):
    """Resampled differences by loops, with seeds moved apart as the docstring says."""
    freedom = ttest_ind(*[group.mean(axis=1) for group in groups], equal_var=False).df
    wider = student_t.ppf(0.975, freedom) / norm.ppf(0.975)
    moved = []
    for group in groups:
        size, off = len(group), group.mean(axis=1, keepdims=True) - group.mean()
        moved.append(group - off + wider * np.sqrt(size / (size - 1)) * off)
    rng = np.random.default_rng(7)
    totals = []
    for _ in range(num_resamples):
        worlds = rng.integers(groups[0].shape[1], size=groups[0].shape[1])
        means = [g[rng.integers(len(g), size=len(g))][:, worlds].mean() for g in moved]
        totals.append(means[0] - means[1])
    return np.quantile(totals, [0.025, 0.975])


def test_bootstrap_is_that_of_loops():
    rng = np.random.default_rng(0)
    first, second = outcomes(rng, [0.8, 0.7, 0.9]), outcomes(rng, [0.5, 0.35, 0.6, 0.5])
    result = hierarchical_bootstrap(first, second)
    assert result.mean == pytest.approx(first.mean() - second.mean())
    assert result.interval == pytest.approx(brute_force([first, second]), abs=0.02)


def test_bootstrap_repeats_and_has_no_side():
    rng = np.random.default_rng(1)
    first, second = outcomes(rng, [0.8, 0.7, 0.9]), outcomes(rng, [0.6, 0.5, 0.7])
    result = hierarchical_bootstrap(first, second)
    assert result == hierarchical_bootstrap(first, second)
    low, high = hierarchical_bootstrap(second, first).interval
    assert result.interval == pytest.approx((-high, -low), abs=0.01)
    other = hierarchical_bootstrap(first, second, seed=1).interval
    assert result.interval == pytest.approx(other, abs=0.02)


def test_pairing_by_world_takes_out_how_hard_worlds_are():
    """Both groups fail in the same worlds but for a few: the difference is known far better."""
    rng = np.random.default_rng(2)
    easy = rng.random(200) < 0.5
    first = np.stack([easy | (rng.random(200) < 0.1) for _ in range(5)])
    second = np.stack([easy & (rng.random(200) > 0.02) for _ in range(5)])
    low, high = hierarchical_bootstrap(first, second).interval
    alone = hierarchical_bootstrap(second).interval
    assert 0 < low < high
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_training_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(3)
    alike = hierarchical_bootstrap(outcomes(rng, [0.7] * 3)).interval
    apart = hierarchical_bootstrap(outcomes(rng, [0.5, 0.7, 0.9])).interval
    assert apart[1] - apart[0] > 3 * (alike[1] - alike[0])


def test_three_training_seeds_are_moved_apart_by_what_students_t_asks_for():
    """Of 27 draws of 3 seeds one has the best thrice, so the interval ends at the moved ones."""
    rates = np.array([[0.4], [0.5], [0.6]]) * np.ones(50)
    half = 0.1 * np.sqrt(3 / 2) * 4.3027 / 1.9600
    assert hierarchical_bootstrap(rates).interval == pytest.approx((0.5 - half, 0.5 + half), 1e-4)
    # A group that does not vary adds no degrees of freedom.
    constant = np.full((3, 50), 0.2)
    interval = hierarchical_bootstrap(rates, constant).interval
    assert interval == pytest.approx((0.3 - half, 0.3 + half), 1e-4)


def test_the_truth_is_held_as_often_as_it_says_even_with_three_training_seeds():
    """Seeds' rates vary by 10 points; without moving them apart it is held in 85% of cases."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(300):
        groups = [outcomes(rng, rng.normal(0.6, 0.1, 3), 100) for _ in range(2)]
        low, high = hierarchical_bootstrap(*groups, num_resamples=500).interval
        held += low <= 0 <= high
    assert held >= 0.93 * 300


def test_groups_in_which_nothing_varies_are_not_called_certain():
    ones, zeros = np.ones((3, 200), bool), np.zeros((3, 200), bool)
    assert hierarchical_bootstrap(ones).interval == wilson_interval(200, 200)
    assert hierarchical_bootstrap(zeros).interval == wilson_interval(0, 200)
    for same in (False, True):
        alike = hierarchical_bootstrap(ones, ones, same_policies=same)
        assert (alike.interval, alike.p_value) == (paired_interval(0, 0, 200), 1)
        apart = hierarchical_bootstrap(zeros, ones, same_policies=same)
        assert apart.interval == paired_interval(0, 200, 200)
        assert apart.p_value == mcnemar_exact(zeros[0], ones[0]).p_value


def test_the_p_value_says_what_the_interval_says():
    """It is the level of the interval that ends at 0, at any confidence; a mean alone has none."""
    rng = np.random.default_rng(6)
    below = 0
    for second_rate in np.linspace(0.45, 0.8, 12):
        first = outcomes(rng, rng.normal(0.8, 0.05, 3), 100)
        second = outcomes(rng, rng.normal(second_rate, 0.05, 4), 100)
        result = hierarchical_bootstrap(first, second, num_resamples=2000)
        assert (result.p_value < 0.05) == (result.interval[0] > 0 or result.interval[1] < 0)
        below += result.p_value < 0.05
        if 0.002 < result.p_value < 0.9:
            for sign in (1, -1):
                level = result.p_value * (1 + 0.02 * sign)
                low, high = hierarchical_bootstrap(
                    first, second, num_resamples=2000, confidence=1 - level
                ).interval
                assert (low > 0 or high < 0) == (sign == 1)
    assert 0 < below < 12
    assert hierarchical_bootstrap(first).p_value is None


def test_where_worlds_hardly_matter_the_p_value_is_that_of_the_t_test():
    """So many worlds that only the training seeds are uncertain."""
    rng = np.random.default_rng(9)
    rates = rng.normal(0.72, 0.05, 15), rng.normal(0.7, 0.05, 12)
    first, second = (np.array(r)[:, None] * np.ones(50) for r in rates)
    expected = ttest_ind(*rates, equal_var=False)
    result = hierarchical_bootstrap(first, second)
    assert 0.01 < result.p_value == pytest.approx(expected.pvalue, rel=0.25)
    low, high = expected.confidence_interval()
    assert result.interval == pytest.approx((low, high), abs=0.01)
    paired_test = ttest_1samp(rates[0][:12] - rates[1], 0)
    result = hierarchical_bootstrap(first[:12], second, same_policies=True)
    assert 0.01 < result.p_value == pytest.approx(paired_test.pvalue, rel=0.25)


def test_policies_executed_in_two_ways_are_paired_by_training_seed():
    """Training seeds differ by much, the two ways of executing each by little."""
    rng = np.random.default_rng(8)
    chunked = outcomes(rng, [0.3, 0.6, 0.85])
    ensembled = chunked.copy()
    for row, gained in zip(ensembled, (13, 15, 17), strict=True):
        row[np.flatnonzero(~row)[:gained]] = True
    together = hierarchical_bootstrap(ensembled, chunked, same_policies=True)
    apart = hierarchical_bootstrap(ensembled, chunked)
    assert together.mean == pytest.approx(apart.mean)
    assert together.p_value < 0.05 < apart.p_value
    assert np.diff(together.interval) < 0.5 * np.diff(apart.interval)
    swapped = hierarchical_bootstrap(chunked, ensembled, same_policies=True)
    assert swapped.interval == pytest.approx([-x for x in together.interval[::-1]], abs=0.01)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_without_a_difference_p_values_below_5_percent_are_as_rare_as_that(num_seeds):
    rng = np.random.default_rng(num_seeds)
    below = 0
    for _ in range(300):
        groups = [outcomes(rng, rng.normal(0.7, 0.08, num_seeds).clip(0, 1), 100) for _ in "AB"]
        below += hierarchical_bootstrap(*groups, num_resamples=1000).p_value < 0.05
    assert 1 <= below <= 0.07 * 300


def test_intervals_stay_within_what_rates_can_be():
    rng = np.random.default_rng(5)
    low, high = hierarchical_bootstrap(outcomes(rng, [1, 0.5, 0.97])).interval
    assert 0 <= low < high == 1


@pytest.mark.parametrize("shapes", [[(1, 9)], [(2, 9), (2, 8)], [(2, 9), (1, 9)], [(9,)]])
def test_too_few_seeds_and_other_worlds_are_refused(shapes):
    with pytest.raises(ValueError, match="2 or more training seeds each, in the same worlds"):
        hierarchical_bootstrap(*[np.ones(shape) for shape in shapes])


def test_the_same_policies_are_as_many_in_both_ways():
    with pytest.raises(ValueError, match="cannot be the same policies"):
        hierarchical_bootstrap(np.ones((3, 9)), np.ones((2, 9)), same_policies=True)
    with pytest.raises(ValueError, match="cannot be the same policies"):
        hierarchical_bootstrap(np.ones((3, 9)), same_policies=True)
