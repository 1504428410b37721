"""Log loss and calibration against scikit-learn and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from mldcn.errors import UserError
from mldcn.metrics import (
    METRICS,
    calibration_ratio,
    expected_calibration_error,
    logloss,
    metric_info,
    normalised_entropy,
    reliability_curve,
    rig,
)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.floats(0, 1), st.sampled_from([0.5, 1.0, 4.0])),
        min_size=1,
        max_size=70,
    )
)
@settings(max_examples=150, deadline=None)
def test_logloss_is_scikit_learns_at_the_edges_too(rows):
    labels, scores, weights = (np.array(column) for column in zip(*rows, strict=True))
    np.testing.assert_allclose(
        logloss(labels, scores), log_loss(labels, scores, labels=[0, 1]), rtol=1e-12, atol=1e-15
    )
    expected = log_loss(labels, scores, labels=[0, 1], sample_weight=weights)
    np.testing.assert_allclose(logloss(labels, scores, weights), expected, rtol=1e-12, atol=1e-15)


def test_certain_and_wrong_costs_the_epsilon_of_the_type():
    assert logloss(np.ones(64), np.zeros(64)) == pytest.approx(52 * math.log(2))
    assert logloss(np.ones(64), np.zeros(64, np.float32)) == pytest.approx(23 * math.log(2))


def test_float32_scores_lose_nothing_in_the_sum():
    generator = np.random.default_rng(0)
    scores = generator.random(200_001).astype(np.float32) * np.float32(0.1)
    labels = generator.random(200_001) < scores
    assert abs(logloss(labels, scores) - log_loss(labels, scores.astype(np.float64))) < 1e-12


def test_normalised_entropy_by_hand():
    labels, scores = [1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert normalised_entropy(labels, scores) == pytest.approx(math.log(2) / entropy)
    assert rig(labels, scores) == pytest.approx(1 - math.log(2) / entropy)
    assert normalised_entropy(labels, [0.25] * 4) == pytest.approx(1)
    # A weight is a number of rows here.
    assert normalised_entropy([1, 0], [0.5, 0.5], [1, 3]) == pytest.approx(math.log(2) / entropy)


def test_calibration_ratio_by_hand():
    assert calibration_ratio([1, 0, 1], [0.5, 0.25, 0.25]) == 0.5
    assert calibration_ratio([1, 0, math.nan], [0.5, 0.25, 0.25], [1, 2, 9]) == 1.0


def test_undefined_is_nan():
    for metric in (logloss, normalised_entropy, rig, calibration_ratio, expected_calibration_error):
        assert math.isnan(metric([], []))
        assert math.isnan(metric([math.nan], [0.5]))
        assert math.isnan(metric([1, 0], [0.5, 0.5], [0, 0]))
    assert math.isnan(normalised_entropy([1, 1], [0.5, 0.5]))
    assert math.isnan(calibration_ratio([0, 0], [0.5, 0.5]))
    assert logloss([1], [0.5]) == pytest.approx(math.log(2))


def loop_curve(labels, scores, weights, bins):
    """A bin of each distinct score: where the middle of its mass, counted from above, falls."""
    total, seen, members = weights.sum(), 0.0, {}
    for score in np.unique(scores)[::-1]:
        rows = scores == score
        mass = weights[rows].sum()
        members.setdefault(min(int((seen + mass / 2) * bins / total), bins - 1), []).append(rows)
        seen += mass
    curve = []
    for bin_ in sorted(members, reverse=True):
        rows = np.any(members[bin_], axis=0)
        mass = weights[rows].sum()
        curve.append((scores[rows] @ weights[rows] / mass, labels[rows] @ weights[rows] / mass, mass))
    return np.array(curve).T


@pytest.mark.parametrize("distinct", [4, 30, 5000])
@pytest.mark.parametrize("weighted", [False, True])
def test_reliability_curve_equals_a_loop(distinct, weighted):
    generator = np.random.default_rng(distinct)
    scores = np.round(generator.random(5000) * distinct) / distinct
    labels = (generator.random(5000) < scores**2).astype(float)
    weights = generator.integers(1, 4, 5000).astype(float) if weighted else np.ones(5000)
    curve = reliability_curve(labels, scores, weights if weighted else None, 10)
    expected = loop_curve(labels, scores, weights, 10)
    np.testing.assert_allclose([curve.predicted, curve.observed, curve.weight], expected, rtol=1e-12)
    assert np.all(np.diff(curve.predicted) > 0)
    error = np.average(np.abs(expected[0] - expected[1]), weights=expected[2])
    assert expected_calibration_error(labels, scores, weights if weighted else None, 10) == pytest.approx(
        error
    )


def test_bins_have_equal_mass_where_scores_differ():
    scores = np.random.default_rng(0).permutation(1000) / 1000
    assert set(reliability_curve(scores > 0.5, scores, bins=20).weight) == {50.0}


def test_the_truth_is_calibrated_and_a_shift_is_measured():
    generator = np.random.default_rng(0)
    scores = generator.random(200_000) * 0.5
    labels = generator.random(200_000) < scores
    assert expected_calibration_error(labels, scores) < 0.005
    assert expected_calibration_error(labels, scores + 0.1) == pytest.approx(0.1, abs=0.005)


def test_logits_are_refused():
    with pytest.raises(UserError, match=r"1 of 3 lie outside \[0, 1\], the first at index 2 \(1.5\).*logits"):
        logloss([0, 1, 1], [0.0, 1.0, 1.5])
    with pytest.raises(UserError, match="bins: expected at least 1"):
        reliability_curve([0, 1], [0.1, 0.2], bins=0)


def test_every_metric_says_which_way_is_better():
    assert metric_info("auc").higher_is_better is True
    assert metric_info("logloss").higher_is_better is False
    assert metric_info("calibration").higher_is_better is None
    assert metric_info("hit@3") is METRICS["hit@k"]
    for name in ("acu", "hit@k", "hit@0", "hit@", "auc@3"):
        with pytest.raises(UserError, match="no metric is called"):
            metric_info(name)
