"""Order metrics against scikit-learn and against loops over pairs, sessions and permutations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from mldcn.errors import UserError
from mldcn.metrics import auc, gauc, hit_at_k, pr_auc
from mldcn.metrics.ties import BLOCK, descending_keys, scores_of_keys


def pairs_auc(labels, scores, weights=None):
    weights = np.ones(len(labels)) if weights is None else weights
    won = total = 0.0
    for i, j in itertools.product(range(len(labels)), repeat=2):
        if labels[i] == 1 and labels[j] == 0:
            mass = weights[i] * weights[j]
            total += mass
            won += mass * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return won / total if total else math.nan


def loop_gauc(labels, scores, groups, weights):
    above = below = 0.0
    for group in np.unique(groups):
        rows = groups == group
        value = pairs_auc(labels[rows], scores[rows], weights[rows])
        if not math.isnan(value):
            above += value * weights[rows].sum()
            below += weights[rows].sum()
    return above / below if below else math.nan


def loop_hit(labels, scores, groups, k, share=False):
    """The mean over every order of the rows that agrees with the scores."""
    values = []
    for group in np.unique(groups):
        y, s = labels[groups == group], scores[groups == group]
        counts = []
        for order in itertools.permutations(range(len(y))):
            if all(s[a] >= s[b] for a, b in itertools.pairwise(order)):
                hits = sum(y[i] for i in order[:k])
                counts.append(min(hits, 1) if share else hits)
        values.append(np.mean(counts))
    return np.mean(values)


@st.composite
def logs(draw, max_rows=25):
    """Few distinct scores, so that ties are common; zeros of both signs and infinities among them."""
    n = draw(st.integers(1, max_rows))
    score = st.sampled_from(
        [-math.inf, -1e-40, -3.0, -0.0, 0.0, 1e-40, 0.25, 0.5, 2.0, math.inf]
    ) | st.floats(-10, 10, width=32)
    column = lambda values: draw(st.lists(values, min_size=n, max_size=n))  # noqa: E731
    return (
        np.array(column(st.integers(0, 1))),
        np.array(column(score), draw(st.sampled_from([np.float32, np.float64]))),
        np.array(column(st.integers(0, 4))),
        np.array(column(st.sampled_from([0.0, 0.5, 1.0, 3.0]))),
    )


@given(logs())
@settings(max_examples=150, deadline=None)
def test_auc_and_gauc_are_the_share_of_won_pairs(log):
    labels, scores, groups, weights = log
    one = np.ones(len(labels))
    np.testing.assert_allclose(auc(labels, scores), pairs_auc(labels, scores), rtol=1e-12)
    np.testing.assert_allclose(auc(labels, scores, weights), pairs_auc(labels, scores, weights), rtol=1e-12)
    np.testing.assert_allclose(
        gauc(labels, scores, groups), loop_gauc(labels, scores, groups, one), rtol=1e-12
    )
    np.testing.assert_allclose(
        gauc(labels, scores, groups, weights), loop_gauc(labels, scores, groups, weights), rtol=1e-12
    )


@given(logs(max_rows=6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_hit_at_k_is_the_mean_over_all_orders_of_tied_rows(log, k):
    labels, scores, groups, _ = log
    np.testing.assert_allclose(hit_at_k(labels, scores, groups, k), loop_hit(labels, scores, groups, k))
    np.testing.assert_allclose(
        hit_at_k(labels, scores, groups, k, share=True), loop_hit(labels, scores, groups, k, share=True)
    )


@given(logs())
@settings(max_examples=100, deadline=None)
def test_keys_order_as_scores_do_and_give_them_back(log):
    scores = log[1]
    keys = descending_keys(scores)
    np.testing.assert_array_equal(keys[:, None] < keys, scores[:, None] > scores)
    np.testing.assert_array_equal(scores_of_keys(keys), scores)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [3, 1000, None])
@pytest.mark.parametrize("sign", ["probabilities", "logits"])
@pytest.mark.parametrize("weighted", [False, True])
def test_large_logs_agree_with_scikit_learn(dtype, levels, sign, weighted):
    generator = np.random.default_rng(0)
    n = 2 * BLOCK + 7
    scores = generator.random(n)
    labels = (generator.random(n) < scores).astype(np.float32)
    if levels:
        scores = np.round(scores * levels) / levels
    scores = (scores if sign == "probabilities" else scores - 0.5).astype(dtype)
    weights = generator.random(n).astype(np.float32) if weighted else None
    assert abs(auc(labels, scores, weights) - roc_auc_score(labels, scores, sample_weight=weights)) < 1e-12
    expected = average_precision_score(labels, scores, sample_weight=weights)
    assert abs(pr_auc(labels, scores, weights) - expected) < 1e-12


def test_gauc_over_many_groups_equals_a_loop_with_scikit_learn():
    generator = np.random.default_rng(1)
    n = BLOCK + 5000
    groups = np.minimum(generator.integers(0, 400, n), 350) * 10**12  # one group larger than the others
    scores = np.round(generator.random(n), 2)
    labels = generator.random(n) < scores
    aucs = [roc_auc_score(labels[groups == g], scores[groups == g]) for g in np.unique(groups)]
    sizes = [np.sum(groups == g) for g in np.unique(groups)]
    assert gauc(labels, scores, groups) == pytest.approx(np.average(aucs, weights=sizes), abs=1e-12)


def test_hit_at_3_of_the_homefeed_paper_by_hand():
    labels = [1, 0, 1, 1, 0, 0, 0, 1]
    scores = [9, 8, 7, 6, 5, 4, 3, 2]
    session = [1, 1, 1, 1, 2, 2, 2, 2]
    assert hit_at_k(labels, scores, session, 3) == (2 + 0) / 2
    assert hit_at_k(labels, scores, session, 3, share=True) == 1 / 2
    assert hit_at_k(labels, scores, session, 99) == (3 + 1) / 2
    # A session weighs the mean weight of its rows.
    assert hit_at_k(labels, scores, session, 3, [3, 3, 3, 3, 1, 1, 1, 1]) == 2 * 3 / 4


def test_groups_may_be_names():
    labels, scores = [1, 0, 1, 0], [0.9, 0.1, 0.2, 0.8]
    assert gauc(labels, scores, ["ann", "ann", "bob", "bob"]) == 0.5
    assert hit_at_k(labels, scores, ["ann", "ann", "bob", "bob"], 1) == 0.5


@pytest.mark.parametrize("labels", [[], [1], [0], [1, 1], [0, 0], [math.nan, 1]])
def test_undefined_is_nan(labels):
    scores = np.linspace(0.1, 0.9, len(labels))
    groups = np.zeros(len(labels), int)
    assert math.isnan(auc(labels, scores))
    assert math.isnan(auc(labels, scores, np.ones(len(labels))))
    assert math.isnan(gauc(labels, scores, groups))
    if 1 not in labels:
        assert math.isnan(pr_auc(labels, scores))
    if not len(labels):
        assert math.isnan(hit_at_k(labels, scores, groups, 3))


def test_average_precision_without_negatives_is_one_as_in_scikit_learn():
    assert pr_auc([1, 1], [0.1, 0.2]) == 1.0


def test_a_class_that_weighs_nothing_has_no_auc():
    assert math.isnan(auc([1, 0, 1], [0.1, 0.2, 0.3], [0, 1, 0]))


def test_rows_without_label_do_not_count():
    labels, scores = np.array([1, math.nan, 0, 1]), np.array([0.3, 0.9, 0.5, 0.7])
    kept = ~np.isnan(labels)
    weights, groups = np.array([1.0, 5.0, 2.0, 3.0]), np.array([1, 1, 1, 1])
    assert auc(labels, scores, weights) == auc(labels[kept], scores[kept], weights[kept])
    assert gauc(labels, scores, groups, weights) == auc(labels[kept], scores[kept], weights[kept])
    assert hit_at_k(labels, scores, groups, 1) == 1.0
    assert auc([1, None, 0], [0.3, 0.9, 0.1]) == 1.0


@pytest.mark.parametrize("metric", [auc, pr_auc])
def test_bad_rows_are_counted_and_the_first_is_named(metric):
    with pytest.raises(UserError, match=r"scores: 2 of 4 are NaN, the first at index 1"):
        metric([0, 1, 0, 1], [0.1, math.nan, math.nan, 0.2])
    with pytest.raises(UserError, match=r"labels: 1 of 3 are neither 0 nor 1, the first at index 2 \(2\)"):
        metric([0, 1, 2], [0.1, 0.2, 0.3])
    with pytest.raises(UserError, match=r"weights: 1 of 2 .* the first at index 1 \(-1.0\)"):
        metric([0, 1], [0.1, 0.2], [1, -1])
    with pytest.raises(UserError, match=r"labels have shape \(3,\), scores \(2,\)"):
        metric([0, 1, 1], [0.1, 0.2])
    with pytest.raises(UserError, match="expected one dimension"):
        metric([[0, 1]], [[0.1, 0.2]])
    with pytest.raises(UserError, match="scores: expected numbers"):
        metric([0, 1], ["a", "b"])


def test_groups_and_k_are_checked():
    with pytest.raises(UserError, match=r"groups: expected shape \(2,\)"):
        gauc([0, 1], [0.1, 0.2], [1, 2, 3])
    with pytest.raises(UserError, match="k: expected at least 1, found 0"):
        hit_at_k([0, 1], [0.1, 0.2], [1, 1], 0)


def test_a_weight_of_minus_zero_is_none():
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.9, 0.2], np.float32)
    found = [auc(labels, scores, np.array([1, 2, zero, 3], np.float32)) for zero in (0.0, -0.0)]
    assert found == [1.0, 1.0]


def test_the_order_of_rows_does_not_change_a_weighted_auc():
    draw = np.random.default_rng(5)
    labels, weights = draw.random(5000) < 0.3, draw.random(5000).astype(np.float32)
    scores = draw.integers(0, 20, 5000).astype(np.float32)
    order = draw.permutation(5000)
    assert auc(labels, scores, weights) == auc(labels[order], scores[order], weights[order])
