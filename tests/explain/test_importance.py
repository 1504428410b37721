"""Permutation importance against metrics computed anew, and its intervals by simulation."""

import numpy as np
import pytest

from mldcn.data.batch import DenseSlot, EncodedLayout, IdSlot
from mldcn.explain.importance import Columns, feature_columns, permutation_importance
from mldcn.explain.sample import Sample
from mldcn.metrics import auc, logloss


def sample(dense, labels, clusters=None, weight=None):
    rows = len(labels)
    return Sample(
        numbers=np.arange(rows),
        total=rows,
        ids=np.zeros((rows, 1), np.int32),
        dense=dense.astype(np.float32),
        labels=labels.reshape(rows, -1).astype(np.float32),
        weight=np.ones(rows, np.float32) if weight is None else weight,
        position=np.zeros(rows, np.int32),
        clusters=np.arange(rows) if clusters is None else clusters,
        unit="row",
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def score(ids, dense):
    """The model: column 0 matters, column 1 does not."""
    return sigmoid(1.5 * dense[:, :1])


def column(i):
    return Columns(np.zeros(0, np.intp), np.array([i]))


def draw(rng, rows=400, per_cluster=1):
    shared = rng.normal(size=(rows // per_cluster, 2))
    dense = np.repeat(shared, per_cluster, axis=0)
    clusters = np.repeat(np.arange(len(shared)), per_cluster)
    labels = (rng.random(rows) < sigmoid(1.5 * dense[:, 0])).astype(float)
    return sample(dense, labels, clusters)


def test_drops_are_differences_of_the_metrics_of_permuted_rows():
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 4, 300).astype(np.float32)
    rows = sample(np.round(rng.normal(size=(300, 2)), 1), (rng.random(300) < 0.4).astype(float), None, weight)
    rows.labels[::17] = np.nan
    metrics, found = permutation_importance(
        score, rows, {"x": column(0), "none": column(1)}, ["click"], repeats=2, seed=3
    )
    y, base = rows.labels[:, 0], score(rows.ids, rows.dense)[:, 0]
    assert metrics["click"]["auc"] == pytest.approx(auc(y, base, weight))
    assert metrics["click"]["logloss"] == pytest.approx(logloss(y, base, weight), rel=1e-6)
    by_name = {(i.feature, i.metric): i for i in found}
    for repeat in range(2):
        order = np.random.default_rng([3, 0, repeat]).permutation(300)
        permuted = score(rows.ids, rows.dense[order])[:, 0]
        lost = auc(y, base, weight) - auc(y, permuted, weight)
        gained = logloss(y, permuted, weight) - logloss(y, base, weight)
        assert by_name["x", "auc"].repeats[repeat] == pytest.approx(lost)
        assert by_name["x", "logloss"].repeats[repeat] == pytest.approx(gained, rel=1e-5)
    nothing = by_name["none", "auc"]
    assert (nothing.drop, nothing.low, nothing.high) == (0, 0, 0)


def test_a_task_of_one_class_is_left_out():
    rng = np.random.default_rng(0)
    rows = sample(rng.normal(size=(50, 2)), np.stack([rng.random(50) < 0.5, np.ones(50)], axis=1))
    double = lambda ids, dense: np.repeat(score(ids, dense), 2, axis=1)  # noqa: E731
    metrics, found = permutation_importance(double, rows, {"x": column(0)}, ["a", "b"], repeats=2, seed=0)
    assert list(metrics) == ["a"]
    assert {i.task for i in found} == {"a"}


@pytest.mark.parametrize("per_cluster", [1, 8])
@pytest.mark.parametrize("metric", ["auc", "logloss"])
def test_intervals_cover_the_drop_of_the_log_that_the_rows_come_from(per_cluster, metric):
    """A cluster's rows share their values: taken as independent, they would make the intervals too narrow."""
    rng = np.random.default_rng(1)
    true = drop_of(draw(rng, 200_000), metric).drop
    covered = [(i := drop_of(draw(rng, 400, per_cluster), metric)).low <= true <= i.high for _ in range(150)]
    assert 0.89 <= np.mean(covered) <= 0.99


def drop_of(rows, metric):
    _, found = permutation_importance(score, rows, {"x": column(0)}, ["click"], repeats=3, seed=0)
    return next(i for i in found if i.metric == metric)


def test_clusters_widen_the_interval():
    rows = draw(np.random.default_rng(2), 800, per_cluster=8)
    apart = sample(rows.dense, rows.labels)
    wide, narrow = (drop_of(s, "auc") for s in (rows, apart))
    assert wide.drop == narrow.drop
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_a_features_columns_are_all_its_own():
    layout = EncodedLayout(
        ids=(
            IdSlot("user", "user", "user", 0, 1, hashes=2),
            IdSlot("history", "pin", "user", 2, 3, kind="sequence"),
            IdSlot("history", "action", "user", 5, 3, kind="sequence", role="actions"),
        ),
        dense=(DenseSlot("price", "item", 0, 1), DenseSlot("history", "user", 1, 3, kind="sequence")),
        tables={"user": 5, "pin": 5, "action": 5},
        tasks=("click",),
    )
    found = {name: (c.ids.tolist(), c.dense.tolist()) for name, c in feature_columns(layout).items()}
    assert found == {
        "user": ([0, 1], []),
        "history": ([2, 3, 4, 5, 6, 7], [1, 2, 3]),
        "price": ([], [0]),
    }
