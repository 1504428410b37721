"""Tests of differences: against brute force, in the right direction, and at the level they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score

from mldcn.errors import UserError
from mldcn.metrics import (
    Difference,
    auc,
    cluster_bootstrap,
    delong,
    gauc,
    non_inferior,
    paired_logloss_test,
    paired_t,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make_log(seed, n=600, noise=(0.5, 0.5), users=None, tie=True):
    """Two models that see the truth through noise of their own."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=n) - 1
    user = generator.integers(0, users or n, n)
    if users:
        truth = truth + generator.normal(size=users)[user]
    labels = (generator.random(n) < sigmoid(truth)).astype(float)
    a, b = (sigmoid(truth + scale * generator.normal(size=n)) for scale in noise)
    return labels, *((np.round(p, 2) if tie else p) for p in (a, b)), user


def brute_delong(labels, a, b):
    """DeLong et al. 1988, eqs. 3 to 6, over all pairs."""
    gains = []
    for scores in (a, b):
        x, y = scores[labels == 1][:, None], scores[labels == 0]
        gains.append((x > y) + 0.5 * (x == y))
    m, n = gains[0].shape
    v10 = np.array([psi.mean(1) for psi in gains])
    v01 = np.array([psi.mean(0) for psi in gains])
    covariance = np.cov(v10) / m + np.cov(v01) / n
    delta = gains[1].mean() - gains[0].mean()
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return delta, error, 2 * stats.norm.sf(abs(delta) / error)


@given(st.integers(0, 10_000), st.integers(20, 80))
@settings(max_examples=60, deadline=None)
def test_delong_equals_the_sum_over_all_pairs(seed, n):
    labels, a, b, _ = make_log(seed, n, noise=(0.3, 2.0))
    labels[:4] = [0, 0, 1, 1]
    found = delong(labels, a, b)
    delta, error, p_value = brute_delong(labels, a, b)
    assert found.a == pytest.approx(roc_auc_score(labels, a), abs=1e-12)
    assert found.b == pytest.approx(roc_auc_score(labels, b), abs=1e-12)
    assert found.delta == pytest.approx(delta, abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(stats.norm.ppf(0.975) * error, rel=1e-9)
    assert (found.high + found.low) / 2 == pytest.approx(delta, abs=1e-12)
    assert found.p_value == pytest.approx(p_value, rel=1e-8)


def test_weighted_delong_has_the_weighted_aucs_and_the_scale_of_weights_is_free():
    labels, a, b, _ = make_log(3)
    weights = np.random.default_rng(0).random(len(labels)) + 0.1
    found = delong(labels, a, b, weights)
    assert found.a == pytest.approx(auc(labels, a, weights), abs=1e-12)
    assert found.b == pytest.approx(auc(labels, b, weights), abs=1e-12)
    scaled = delong(labels, a, b, 7 * weights)
    assert scaled.p_value == pytest.approx(found.p_value, rel=1e-9)
    assert delong(labels, a, b, np.full(len(labels), 3.0)).low == pytest.approx(
        delong(labels, a, b).low, abs=1e-12
    )


def test_weighted_delong_has_the_spread_of_the_weighted_difference():
    """Over many logs the standard error must be the standard deviation of the difference."""
    deltas, errors = [], []
    for seed in range(300):
        labels, a, b, _ = make_log(seed, 400)
        weights = np.where(np.random.default_rng(seed).random(400) < 0.3, 5.0, 1.0)
        found = delong(labels, a, b, weights)
        deltas.append(found.delta)
        errors.append((found.high - found.low) / 2 / stats.norm.ppf(0.975))
    assert np.mean(errors) == pytest.approx(np.std(deltas), rel=0.12)


COMPARISONS = {
    "delong": lambda y, a, b, users: delong(y, a, b),
    "logloss": lambda y, a, b, users: paired_logloss_test(y, a, b),
    "logloss by user": lambda y, a, b, users: paired_logloss_test(y, a, b, clusters=users),
    "bootstrap auc": lambda y, a, b, users: cluster_bootstrap("auc", y, a, b, users, repeats=200),
    "bootstrap gauc": lambda y, a, b, users: cluster_bootstrap("gauc", y, a, b, users, repeats=200),
    "bootstrap logloss": lambda y, a, b, users: cluster_bootstrap("logloss", y, a, b, users, repeats=200),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_better_model_wins_from_either_side(name):
    """A clear win must give a small p-value, never one near 1, and name the winner."""
    labels, bad, good, users = make_log(1, 4000, noise=(2.0, 0.1), users=200)
    compare = COMPARISONS[name]
    forth, back = compare(labels, bad, good, users), compare(labels, good, bad, users)
    assert forth.better == "b"
    assert back.better == "a"
    assert forth.p_value < 0.01
    assert back.p_value < 0.01
    assert (forth.delta > 0) == forth.higher_is_better == ("logloss" not in name)
    assert forth.delta == pytest.approx(-back.delta, abs=1e-12)
    assert forth.low * forth.high > 0
    assert forth.low <= forth.delta <= forth.high


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_model_does_not_differ_from_itself(name):
    labels, a, _, users = make_log(1, 500, users=50)
    found = COMPARISONS[name](labels, a, a, users)
    assert (found.delta, found.low, found.high, found.p_value, found.better) == (0, 0, 0, 1, None)


def rejections(compare, repeats, **options):
    return np.mean([compare(*make_log(seed, **options)).p_value < 0.05 for seed in range(repeats)])


def test_delong_and_the_paired_test_reject_one_a_a_test_in_twenty():
    # 400 repeats: two standard errors of a share of 5 % are 2.2 %.
    assert rejections(lambda y, a, b, u: delong(y, a, b), 400) == pytest.approx(0.05, abs=0.025)
    assert rejections(lambda y, a, b, u: paired_logloss_test(y, a, b), 400) == pytest.approx(0.05, abs=0.025)


def make_user_log(seed, users=80, rows=20):
    """Models that err by user, not by row: rows of a user carry one draw of luck."""
    generator = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows)
    truth = generator.normal(size=users * rows) + generator.normal(size=users)[user]
    labels = (generator.random(len(truth)) < sigmoid(truth)).astype(float)
    a, b = (sigmoid(truth + generator.normal(size=users)[user]) for _ in range(2))
    return labels, a, b, user


def test_the_clustered_tests_hold_their_level_where_rows_of_a_user_err_together():
    repeats = 200  # two standard errors of a share of 5 %: 3.1 %
    rejected = dict.fromkeys(("delong", "auc", "logloss", "robust"), 0)
    for seed in range(repeats):
        labels, a, b, user = make_user_log(seed)
        rejected["delong"] += delong(labels, a, b).p_value < 0.05
        rejected["robust"] += paired_logloss_test(labels, a, b, clusters=user).p_value < 0.05
        for metric in ("auc", "logloss"):
            found = cluster_bootstrap(metric, labels, a, b, user, repeats=200, seed=seed)
            rejected[metric] += found.p_value < 0.05
    shares = {name: count / repeats for name, count in rejected.items()}
    for name in ("auc", "logloss", "robust"):
        assert 0.01 <= shares[name] <= 0.095, shares
    assert shares["delong"] > 0.12, "these logs are no test of clustering if DeLong holds its level too"


def test_intervals_cover_the_true_difference():
    """Coverage of 95 % intervals, the truth taken from one log as large as 500 of the others."""
    truth = delong(*make_log(10**6, 300_000, noise=(1.5, 0.3), tie=False)[:3]).delta
    covered = 0
    for seed in range(300):
        found = delong(*make_log(seed, 600, noise=(1.5, 0.3), tie=False)[:3])
        covered += found.low < truth < found.high
    assert covered / 300 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("metric", ["auc", "logloss", "gauc"])
def test_the_bootstrap_equals_copying_the_drawn_clusters(metric, weighted):
    labels, a, b, user = make_log(5, 300, users=25)
    user = user * 1000 + 17
    weights = np.random.default_rng(0).random(300) if weighted else None
    found = cluster_bootstrap(metric, labels, a, b, user, weights, repeats=50, seed=9)
    generator, names = np.random.default_rng(9), np.unique(user)
    deltas = []
    for _ in range(50):
        drawn = names[generator.integers(len(names), size=len(names))]
        rows = np.concatenate([np.flatnonzero(user == name) for name in drawn])
        # Copies of a user are users of their own.
        copy = np.concatenate([np.full(np.sum(user == name), i) for i, name in enumerate(drawn)])
        w = None if weights is None else weights[rows]
        values = [
            gauc(labels[rows], p[rows], copy, w)
            if metric == "gauc"
            else auc(labels[rows], p[rows], w)
            if metric == "auc"
            else log_loss(labels[rows], p[rows], sample_weight=w)
            for p in (a, b)
        ]
        deltas.append(values[1] - values[0])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(deltas, [0.025, 0.975])), abs=1e-12)
    side = min(np.sum(np.array(deltas) <= 0), np.sum(np.array(deltas) >= 0))
    assert found.p_value == pytest.approx(min(1, 2 * (side + 1) / 51))


def test_the_bootstrap_is_seeded_and_agrees_with_delong_on_independent_rows():
    labels, a, b, _ = make_log(2, 1500, noise=(1.0, 0.3))
    found = cluster_bootstrap("auc", labels, a, b, np.arange(1500), repeats=400, seed=4)
    assert found == cluster_bootstrap("auc", labels, a, b, np.arange(1500), repeats=400, seed=4)
    assert found != cluster_bootstrap("auc", labels, a, b, np.arange(1500), repeats=400, seed=5)
    exact = delong(labels, a, b)
    assert found.delta == pytest.approx(exact.delta, abs=1e-12)
    assert found.high - found.low == pytest.approx(exact.high - exact.low, rel=0.15)


def test_gauc_by_request_is_drawn_by_user_but_no_request_may_span_users():
    labels, a, b, user = make_log(5, 300, users=20)
    request = user * 3 + np.arange(300) % 3
    found = cluster_bootstrap("gauc", labels, a, b, user, groups=request, repeats=50)
    assert found.a == pytest.approx(gauc(labels, a, request), abs=1e-12)
    assert found.b == pytest.approx(gauc(labels, b, request), abs=1e-12)
    with pytest.raises(UserError, match="rows lie in a group that spans clusters"):
        cluster_bootstrap("gauc", labels, a, b, user, groups=np.zeros(300), repeats=50)


def test_rows_without_label_do_not_count():
    labels, a, b, user = make_log(5, 300, users=20)
    labels[::7] = math.nan
    kept = ~np.isnan(labels)
    for compare in COMPARISONS.values():
        assert compare(labels, a, b, user) == compare(labels[kept], a[kept], b[kept], user[kept])


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("labels", [[], [1], [1, 1], [math.nan, 0]])
def test_one_class_or_no_rows_give_nan_and_no_winner(name, labels):
    n = len(labels)
    found = COMPARISONS[name](labels, np.linspace(0.2, 0.8, n), np.linspace(0.8, 0.3, n), np.arange(n))
    if "logloss" in name and n > 1:
        assert not math.isnan(found.delta)
    else:
        assert math.isnan(found.p_value)
        assert found.better is None


def test_perfect_separation_gives_no_p_value():
    found = delong([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], [0.1, 0.2, 0.8, 0.9])
    assert (found.a, found.b, found.delta) == (1.0, 0.0, -1.0)
    assert math.isnan(found.p_value)
    assert found.better is None
    assert not non_inferior(found, 2.0)


def test_bad_scores_are_named_by_model():
    with pytest.raises(UserError, match="scores_b: 1 of 2 are NaN, the first at index 0"):
        delong([0, 1], [0.1, 0.2], [math.nan, 0.1])
    with pytest.raises(UserError, match=r"scores_a: .* outside \[0, 1\]"):
        paired_logloss_test([0, 1], [0.1, 2], [0.1, 0.1])
    with pytest.raises(UserError, match="clusters: expected shape"):
        cluster_bootstrap("auc", [0, 1], [0.1, 0.2], [0.1, 0.1], [1])
    with pytest.raises(UserError, match="'acu' has no bootstrap"):
        cluster_bootstrap("acu", [0, 1], [0.1, 0.2], [0.1, 0.1], [1, 2])
    with pytest.raises(UserError, match="repeats"):
        cluster_bootstrap("auc", [0, 1], [0.1, 0.2], [0.1, 0.1], [1, 2], repeats=0)


def test_paired_t_is_scipys():
    a, b = [0.80, 0.81, 0.79, 0.80, 0.82], [0.81, 0.82, 0.81, 0.80, 0.83]
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    found = paired_t(a, b)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.delta == pytest.approx(0.01)
    assert found.better == "b"
    assert paired_t(a, b, higher_is_better=False).better == "a"
    assert paired_t(b, a).better == "a"


def test_paired_t_where_it_says_nothing():
    assert math.isnan(paired_t([0.8], [0.9]).p_value)
    assert math.isnan(paired_t([0.8, 0.81], [0.9, 0.91]).p_value)
    assert paired_t([0.8, 0.81], [0.8, 0.81]).p_value == 1.0
    with pytest.raises(UserError, match="as many values of A as of B"):
        paired_t([0.8, 0.81], [0.9])


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "expected"),
    [
        (-0.0005, 0.002, True, True),
        (-0.0015, 0.002, True, False),
        (-0.0015, 0.0005, False, True),
        (-0.0005, 0.0015, False, False),
        (math.nan, math.nan, True, False),
        (math.nan, math.nan, False, False),
    ],
)
def test_non_inferior_looks_at_the_worse_end(low, high, higher_is_better, expected):
    found = Difference(0.8, 0.8, 0.0, low, high, 0.9, "x", higher_is_better)
    assert non_inferior(found, 0.001) is expected
    with pytest.raises(UserError, match="margin"):
        non_inferior(found, 0.0)
