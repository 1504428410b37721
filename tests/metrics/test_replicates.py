"""Intervals over seeds and rows: closed cases, other libraries, and the coverage that they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from mldcn.errors import UserError
from mldcn.metrics import auc, cluster_bootstrap, gauc, hit_at_k, logloss
from mldcn.metrics.replicates import (
    cluster_counts,
    cluster_sums,
    group_codes,
    holm,
    minimum_detectable,
    seeds_and_rows,
    seeds_needed,
    student,
    two_sources,
    with_ranking,
)
from mldcn.metrics.rows import check_rows


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make_log(seed, rows=3000, users=150):
    """Labels with users of their own leaning, and two models that see the truth through noise."""
    generator = np.random.default_rng(seed)
    user = generator.integers(1, users + 1, rows)
    truth = generator.normal(size=rows) - 1 + generator.normal(size=users + 1)[user]
    labels = (generator.random(rows) < sigmoid(truth)).astype(np.float32)
    models = [sigmoid(truth + 0.7 * generator.normal(size=rows)).astype(np.float32) for _ in range(2)]
    return labels, *models, user


def sums_of(labels, scores, groups, weights=None, pieces=1):
    weights = np.ones(len(labels)) if weights is None else weights
    columns = (labels, scores, weights, groups)
    return cluster_sums(lambda: zip(*(np.array_split(column, pieces) for column in columns), strict=True))


def test_holm_is_the_worked_example_and_keeps_the_order_given():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_holm_keeps_the_chance_of_any_false_claim():
    p_values = np.random.default_rng(0).random((4000, 6))
    wrong = np.mean([min(holm(list(p))) < 0.05 for p in p_values])
    assert wrong == pytest.approx(1 - (1 - 0.05 / 6) ** 6, abs=0.01)


def test_student_agrees_with_scipy_on_paired_differences():
    gains = np.array([0.001, 0.0014, 0.0005, 0.0011])
    error = gains.std(ddof=1) / 2
    low, high, p_value = student(float(gains.mean()), float(error), 3)
    expected = stats.ttest_1samp(gains, 0.0)
    assert p_value == pytest.approx(expected.pvalue)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_without_spread_only_a_difference_of_nothing_is_sure():
    assert student(0.0, 0.0, 2) == (0.0, 0.0, 1.0)
    assert student(0.1, 0.0, 2) is None


@pytest.mark.parametrize("free", [1, 2, 2.7, 4, 30])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_the_minimum_detectable_effect_has_the_power_by_numerical_integration(free, level):
    """Over the chi-square law of the estimated variance; SciPy's nct is wrong where nc is large and free small."""
    nc = minimum_detectable(2.0, free, level=level) / 2.0
    critical = stats.t.ppf(1 - level / 2, free)

    def chance(u):
        reach = critical * math.sqrt(u * u / free)  # u is a chi
        return stats.chi.pdf(u, free) * (stats.norm.cdf(nc - reach) + stats.norm.cdf(-nc - reach))

    power, _ = integrate.quad(chance, 0, math.sqrt(free) + 12, limit=200)
    assert power == pytest.approx(0.8, abs=1e-3)


def test_minimum_detectable_effects_of_textbooks():
    """Paired t, 80 % power: 5 pairs find 1.682 standard deviations, 10 pairs 0.996, 30 pairs 0.529."""
    for pairs, effect in ((5, 1.682), (10, 0.996), (30, 0.529)):
        assert minimum_detectable(1 / math.sqrt(pairs), pairs - 1) == pytest.approx(effect, abs=2e-3)


def test_the_minimum_detectable_effect_is_found_in_80_per_cent_of_simulated_studies():
    seeds, deviation = 4, 0.3
    effect = minimum_detectable(deviation / math.sqrt(seeds), seeds - 1)
    gains = np.random.default_rng(1).normal(effect, deviation, (4000, seeds))
    found = stats.ttest_1samp(gains, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_seeds_needed_is_the_first_number_that_does():
    needed = seeds_needed(0.001, 0.001)
    for seeds, enough in ((needed, True), (needed - 1, False)):
        assert (minimum_detectable(0.001 / math.sqrt(seeds), seeds - 1) <= 0.001) == enough
    assert seeds_needed(0.001, 0.001, rows_error=0.0002) > needed
    assert seeds_needed(0.001, 0.001, rows_error=0.0005) is None  # no number of seeds makes up for the rows


def test_two_sources_are_either_alone_and_reach_as_far_as_both_together():
    assert two_sources(4.0, 2, 0.0, 99) == pytest.approx((2.0, 2.0))
    assert two_sources(0.0, 2, 4.0, 99) == pytest.approx((2.0, 99.0))
    error, free = two_sources(2.0, 2, 3.0, 100)
    assert error == pytest.approx(math.sqrt(5.0))
    low, _, _ = student(0.0, error, free)
    assert -low == pytest.approx(
        math.sqrt(2.0 * stats.t.ppf(0.975, 2) ** 2 + 3.0 * stats.t.ppf(0.975, 100) ** 2)
    )
    assert two_sources(0.0, 2, 0.0, 99)[0] == 0.0


def test_sums_over_clusters_have_the_metrics_and_do_not_depend_on_the_pieces():
    labels, scores, _, user = make_log(0)
    labels[:7] = np.nan
    weights = np.random.default_rng(1).random(len(labels)) + 0.2
    found = sums_of(labels, scores, group_codes(user), weights)
    known = ~np.isnan(labels)
    expected = auc(labels[known], scores[known], weights[known])
    assert found.value["auc"] == pytest.approx(expected, abs=1e-5)  # scores are binned
    assert found.value["logloss"] == pytest.approx(
        logloss(labels[known], scores[known], weights[known]), rel=1e-6
    )
    cut = sums_of(labels, scores, group_codes(user), weights, pieces=7)
    for metric in found.value:
        np.testing.assert_allclose(cut.above[metric], found.above[metric], atol=1e-12)
    ones = np.ones((1, len(found.below["auc"])))
    drawn = found.drawn(ones)
    for metric in found.value:
        assert drawn[metric][0] == pytest.approx(found.value[metric], abs=1e-9)


def test_ties_count_half_and_the_ends_of_the_scale_have_bins():
    scores = np.array([0.0, 0.5, 0.5, 1.0], np.float32)
    labels = np.array([0.0, 0.0, 1.0, 1.0])
    assert sums_of(labels, scores, np.arange(4)).value["auc"] == pytest.approx((1 + 1 + 1 + 0.5) / 4)


def test_rows_of_one_class_have_no_sums_and_other_numbers_are_refused():
    assert sums_of(np.zeros(3), np.full(3, 0.5), np.arange(3)) is None
    with pytest.raises(UserError, match="no probabilities"):
        sums_of(np.array([0.0, 1.0]), np.array([0.5, 1.5]), np.arange(2))


@pytest.mark.parametrize("metric", ["auc", "logloss"])
def test_draws_of_the_sums_spread_as_the_exact_cluster_bootstrap(metric):
    labels, a, b, user = make_log(2)
    exact = cluster_bootstrap(metric, labels, a, b, user, repeats=1500, seed=1)
    found = [sums_of(labels, scores, user, weights=None) for scores in (a, b)]
    counts = cluster_counts(found[0].below["auc"] > 0, 1500)
    deltas = found[1].drawn(counts)[metric] - found[0].drawn(counts)[metric]
    low, high = np.quantile(deltas, [0.025, 0.975])
    width = exact.high - exact.low
    assert deltas.mean() == pytest.approx(exact.delta, abs=0.05 * width)
    assert low == pytest.approx(exact.low, abs=0.1 * width)
    assert high == pytest.approx(exact.high, abs=0.1 * width)


@pytest.mark.parametrize("metric", ["gauc", "hit@2"])
def test_metrics_by_group_have_sums_too(metric):
    labels, a, b, user = make_log(4)
    user[:40] = 0  # nobody knows whose these are
    labels[40:60] = np.nan
    request = np.where(user == 0, 0, 10 * user + np.arange(len(user)) % 3)
    ids = user if metric == "gauc" else request
    weights = np.random.default_rng(0).random(len(user)).astype(np.float32) + 0.5
    found = []
    for scores in (a, b):
        rows = check_rows(labels, scores, weights)
        found.append(with_ranking(sums_of(labels, scores, user, weights), metric, rows, ids, user))
        known = ids != 0
        columns = (labels[known], scores[known], ids[known])
        whole = gauc(*columns, weights[known]) if metric == "gauc" else hit_at_k(*columns, 2, weights[known])
        assert found[-1].value[metric] == pytest.approx(whole, rel=1e-6)
    if metric == "gauc":
        named = [column[ids != 0] for column in (labels, a, b, user, weights)]
        exact = cluster_bootstrap("gauc", *named, repeats=1500, seed=1)
        counts = cluster_counts(found[0].below["auc"] > 0, 1500)
        deltas = found[1].drawn(counts)[metric] - found[0].drawn(counts)[metric]
        assert np.quantile(deltas, 0.975) - np.quantile(deltas, 0.025) == pytest.approx(
            exact.high - exact.low, rel=0.12
        )


def test_a_metric_by_group_without_groups_is_left_out():
    labels, a, _, user = make_log(0, rows=200)
    sums = sums_of(labels, a, user)
    assert with_ranking(sums, "gauc", check_rows(labels, a), np.zeros(200, np.int64), user) is sums


def test_many_clusters_in_few_groups_spread_alike():
    """A group is a sum of independent clusters: the variance stays what it is."""
    labels, a, b, _ = make_log(3, rows=20_000)
    spreads = []
    for groups in (group_codes(np.arange(20_000), 512), np.arange(20_000) % 4096):
        found = [sums_of(labels, scores, groups) for scores in (a, b)]
        counts = cluster_counts(found[0].below["auc"] > 0, 1000)
        spreads.append(float(np.std(found[1].drawn(counts)["auc"] - found[0].drawn(counts)["auc"])))
    assert spreads[0] == pytest.approx(spreads[1], rel=0.12)


def test_counts_draw_only_groups_with_rows_and_as_many_as_there_are():
    used = np.array([True, False, True, True])
    counts = cluster_counts(used, 50)
    assert (counts.sum(axis=1) == 3).all()
    assert not counts[:, 1].any()
    assert (counts == cluster_counts(used, 50)).all()


def test_hashed_clusters_are_spread_evenly_whatever_their_numbers():
    for ids in (np.arange(40_000), 4096 * np.arange(40_000), -1 - np.arange(40_000)):
        counts = np.bincount(group_codes(ids), minlength=4096)
        assert counts.std() == pytest.approx(math.sqrt(40_000 / 4096), rel=0.1)


def simulate(generator, seeds, clusters, spread):
    """Gains by seed and cluster with effects of seeds, of clusters, and of both together; the truth is 0."""
    of_seeds, of_clusters, of_both = spread
    return (
        of_seeds * generator.normal(size=seeds)[:, None]
        + of_clusters * generator.normal(size=clusters)
        + of_both * generator.normal(size=(seeds, clusters))
    )


SPREADS = {
    "seeds": (1.0, 0.0, 0.0),
    "mostly seeds": (1.0, 2.0, 0.0),
    "rows": (0.0, 10.0, 0.0),
    "all": (0.7, 7.0, 7.0),
    "both": (0.0, 0.0, 10.0),
}


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("name", SPREADS)
def test_intervals_over_seeds_and_rows_cover_the_truth(name, seeds):
    generator = np.random.default_rng(seeds)
    clusters, studies, covered = 100, 400, 0
    counts = cluster_counts(np.ones(clusters, np.bool_), 200)
    for _ in range(studies):
        gains = simulate(generator, seeds, clusters, SPREADS[name])
        draws = counts @ gains.T / clusters
        error, free = seeds_and_rows(gains.mean(axis=1), draws, clusters)
        low, high, _ = student(float(gains.mean()), error, free)
        covered += low <= 0 <= high
    # 95 %, less 2.5 standard errors of 400 studies; where several sources meet, errors are on the safe side.
    assert covered / studies >= 0.923
    if name in ("seeds", "rows"):
        assert covered / studies <= 0.98


def test_the_standard_error_is_that_of_other_studies():
    """Neither source counted twice: over many studies, the mean variance is the variance of the mean gains."""
    generator = np.random.default_rng(7)
    counts = cluster_counts(np.ones(80, np.bool_), 150)
    means, variances = [], []
    for _ in range(600):
        gains = simulate(generator, 4, 80, (0.5, 5.0, 8.0))
        error, _ = seeds_and_rows(gains.mean(axis=1), counts @ gains.T / 80, 80)
        means.append(float(gains.mean()))
        variances.append(error**2)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.2)


def test_intervals_of_an_auc_gain_cover_that_of_all_rows_and_seeds():
    """The whole path at once: labels, seeds of noisy models, users drawn; the truth is a large sample's."""
    generator = np.random.default_rng(5)
    covered, studies = 0, 120
    noise = (1.0, 1.2)  # B is worse

    def study(rows, users, seeds):
        user = generator.integers(0, users, rows)
        truth = generator.normal(size=rows) + generator.normal(size=users)[user]
        labels = (generator.random(rows) < sigmoid(truth)).astype(np.float64)
        found = []
        for _ in range(seeds):
            tilt = 0.3 * generator.normal(size=2)  # a seed's own luck
            models = (
                truth + (n + 0.2 * t) * generator.normal(size=rows) for n, t in zip(noise, tilt, strict=True)
            )
            found.append([sums_of(labels, sigmoid(m).astype(np.float32), user) for m in models])
        return found

    true = np.mean([b.value["auc"] - a.value["auc"] for a, b in study(20_000, 2000, 30)])
    counts = None
    for _ in range(studies):
        found = study(400, 60, 3)
        counts = cluster_counts(found[0][0].below["auc"] > 0, 100)
        gains = [b.value["auc"] - a.value["auc"] for a, b in found]
        draws = np.stack([b.drawn(counts)["auc"] - a.drawn(counts)["auc"] for a, b in found], axis=1)
        error, free = seeds_and_rows(gains, draws, 60)
        low, high, _ = student(float(np.mean(gains)), error, free)
        covered += low <= true <= high
    assert 0.89 <= covered / studies <= 1.0
