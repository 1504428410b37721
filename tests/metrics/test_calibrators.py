"""Calibrators against scikit-learn, and what they promise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from mldcn.errors import UserError
from mldcn.metrics import Isotonic, Platt, auc, calibrator_from_json, expected_calibration_error, logloss


def make_log(n=3000, seed=0):
    """Scores whose logits are twice too large and shifted."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=n) - 1
    labels = (generator.random(n) < 1 / (1 + np.exp(-truth))).astype(float)
    return 1 / (1 + np.exp(-(2 * truth + 1))), labels, generator.random(n) + 0.5


@pytest.mark.parametrize("weighted", [False, True])
def test_platt_is_the_logistic_regression_on_platts_targets(weighted):
    scores, labels, weights = make_log()
    weights = weights if weighted else np.ones(len(labels))
    found = Platt.fit(scores, labels, weights if weighted else None)
    positive, negative = weights[labels == 1].sum(), weights[labels == 0].sum()
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    logits = np.log(scores / (1 - scores))[:, None]
    regression = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
        np.concatenate([logits, logits]),
        np.repeat([1, 0], len(labels)),
        np.concatenate([weights * target, weights * (1 - target)]),
    )
    assert found.slope == pytest.approx(regression.coef_[0, 0], rel=1e-4)
    assert found.intercept == pytest.approx(regression.intercept_[0], rel=1e-4)
    assert found.slope == pytest.approx(0.5, abs=0.05)
    assert found.intercept == pytest.approx(-0.5, abs=0.1)
    # Stationary: predicted and target mass agree, as the intercept's gradient is 0.
    assert weights @ found.transform(scores) == pytest.approx(weights @ target, rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("digits", [1, 12])
def test_isotonic_is_scikit_learns_but_for_certainty(weighted, digits):
    scores, labels, weights = make_log()
    scores = np.round(scores, digits)
    weights = weights if weighted else None
    found = Isotonic.fit(scores, labels, weights)
    reference = IsotonicRegression(out_of_bounds="clip").fit(scores, labels, weights)
    grid = np.linspace(0, 1, 777)
    margin = 1 / (len(labels) + 2)
    np.testing.assert_allclose(
        found.transform(scores), np.clip(reference.predict(scores), margin, 1 - margin), atol=1e-9
    )
    between = (found.values > margin).all() and (found.values < 1 - margin).all()
    if between:  # else the reference slopes to 0 and 1 where ours stops short
        np.testing.assert_allclose(found.transform(grid), reference.predict(grid), atol=1e-9)
    assert np.all(np.diff(found.transform(grid)) >= 0)
    assert found.transform(grid).min() > 0
    assert found.transform(grid).max() < 1


@pytest.mark.parametrize("kind", [Platt, Isotonic])
def test_a_calibrator_mends_calibration_on_rows_it_has_not_seen(kind):
    calibrator = kind.fit(*make_log(20_000)[:2])
    scores, labels, _ = make_log(20_000, seed=1)
    mended = calibrator.transform(scores)
    assert expected_calibration_error(labels, scores) > 0.05
    assert expected_calibration_error(labels, mended) < 0.02
    assert logloss(labels, mended) < logloss(labels, scores)
    assert auc(labels, mended) == pytest.approx(auc(labels, scores), abs=2e-3)


@pytest.mark.parametrize("kind", [Platt, Isotonic])
def test_json_keeps_every_bit(kind):
    scores, labels, weights = make_log()
    calibrator = kind.fit(scores.astype(np.float32), labels, weights)
    again = calibrator_from_json(json.loads(json.dumps(calibrator.to_json())))
    assert type(again) is kind
    grid = np.linspace(0, 1, 100).reshape(50, 2)
    assert calibrator.transform(grid).shape == (50, 2)
    np.testing.assert_array_equal(again.transform(grid), calibrator.transform(grid))
    np.testing.assert_array_equal(calibrator.transform(grid.astype(np.float32)).dtype, np.float64)


@pytest.mark.parametrize("kind", [Platt, Isotonic])
def test_separable_constant_and_edge_scores_stay_finite(kind):
    labels = np.array([0, 0, 0, 1, 1, 1])
    for scores in ([0.0, 0.1, 0.2, 0.8, 0.9, 1.0], [0.5] * 6, [0, 1, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0]):
        found = kind.fit(np.array(scores, float), labels).transform(np.array([0.0, 0.3, 0.5, 1.0]))
        assert np.all((found > 0) & (found < 1))
    constant = kind.fit(np.full(6, 0.9), [0, 0, 0, 0, 1, 1]).transform([0.9])
    assert constant == pytest.approx([1 / 3], abs=0.07)


@pytest.mark.parametrize("kind", [Platt, Isotonic])
def test_one_class_is_refused(kind):
    for scores, labels in (([0.1, 0.2], [1, 1]), ([0.1, 0.2], [0, math.nan]), ([], [])):
        with pytest.raises(UserError, match="rows of both classes"):
            kind.fit(scores, labels)
    with pytest.raises(UserError, match="scores: 1 of 2 are NaN"):
        kind.fit([0.1, math.nan], [0, 1])


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"kind": "beta"},
        {"kind": "platt"},
        {"kind": "isotonic", "scores": [0.1], "values": []},
        {"kind": "platt", "slope": "x", "intercept": 0},
    ],
)
def test_what_is_no_calibrator_is_refused(raw):
    with pytest.raises(UserError, match="not a calibrator"):
        calibrator_from_json(raw)
