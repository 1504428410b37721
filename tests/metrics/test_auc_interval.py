"""The interval from sorted rows on disk is that of the test in memory."""

import math

import numpy as np
import pytest

from mldcn.metrics import auc_intervals, delong


def against_nothing(labels, scores, weights):
    difference = delong(labels, np.zeros_like(scores), scores, weights)
    return difference.a + difference.low, difference.a + difference.high


@pytest.mark.parametrize("digits", [1, 2, 7], ids=["many ties", "ties", "hardly any"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("memory_rows", [1500, 10**6], ids=["on disk", "at once"])
def test_it_equals_delong(tmp_path, digits, weighted, memory_rows):
    rng = np.random.default_rng(0)
    labels = (rng.random((9000, 2)) < [0.1, 0.6]).astype(np.float32)
    scores = np.clip(rng.normal(0.4 + 0.1 * labels, 0.2), 0, 1).round(digits).astype(np.float32)
    labels[rng.random(9000) < 0.2, 1] = np.nan
    weights = (rng.exponential(size=9000) if weighted else np.ones(9000)).astype(np.float32)
    chunks = [
        (labels[start : start + 700], scores[start : start + 700], weights[start : start + 700])
        for start in range(0, 9000, 700)
    ]
    found = auc_intervals(chunks, ("click", "save"), tmp_path, memory_rows=memory_rows)
    assert list(found) == ["click", "save"]
    for t, task in enumerate(found):
        expected = against_nothing(labels[:, t], scores[:, t], weights)
        np.testing.assert_allclose(found[task], expected, rtol=0, atol=1e-12)
        assert 0.5 < expected[0] < expected[1] < 1


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([1, 1, 1], [0.1, 0.2, 0.3], math.nan),
        ([1, 0], [0.9, 0.1], math.nan),
        ([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], math.nan),
        ([1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], 0.5),
        ([], [], math.nan),
    ],
    ids=["one class", "one row each", "separated", "constant", "no rows"],
)
def test_what_is_undefined_is_nan(tmp_path, labels, scores, expected):
    chunk = (np.array(labels, float)[:, None], np.array(scores, float)[:, None], np.ones(len(labels)))
    found = auc_intervals([chunk], ("click",), tmp_path)["click"]
    np.testing.assert_equal(found, (expected, expected))
