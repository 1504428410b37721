"""The stream against the plain functions; rows on disk against rows in memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mldcn import metrics
from mldcn.errors import UserError
from mldcn.metrics import METRICS, MetricStream, metric_info
from mldcn.metrics.external_sort import ExternalSort, whole_keys

OPTIONS = {"hit_at": (1, 3), "hit_by": "request", "gauc_by": "user", "calibration_bins": 7}


def make_log(n=20_000, seed=0, dtype=np.float32, levels=200):
    generator = np.random.default_rng(seed)
    scores = np.round(generator.random((n, 2)) * levels) / levels
    labels = (generator.random((n, 2)) < scores).astype(np.float32)
    labels[labels[:, 0] == 0, 1] = np.nan
    groups = {"user": generator.integers(0, 300, n), "request": generator.integers(-900, 2500, n)}
    return labels, scores.astype(dtype), generator.random(n).astype(np.float32), groups


def feed(stream, labels, scores, weights, groups, chunk=1234):
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        stream.update(
            labels[part],
            scores[part],
            None if weights is None else weights[part],
            {name: column[part] for name, column in groups.items()},
        )
    return stream


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for task in expected:
        assert found[task].keys() == expected[task].keys()
        for name, value in expected[task].items():
            assert found[task][name] == pytest.approx(value, rel=1e-12, abs=1e-13, nan_ok=True), (task, name)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_stream_agrees_with_the_functions(weighted):
    labels, scores, weights, groups = make_log()
    found = feed(
        MetricStream(["click", "save"], **OPTIONS), labels, scores, weights if weighted else None, groups
    )
    for t, task in enumerate(["click", "save"]):
        known = {name: column != 0 for name, column in groups.items()}
        w = weights if weighted else None
        y, p = labels[:, t], scores[:, t]

        def within(name, metric, *args, y=y, p=p, w=w, known=known, **options):
            rows = known[name]
            return metric(
                y[rows], p[rows], groups[name][rows], *args, weights=None if w is None else w[rows], **options
            )

        expected = {
            "auc": metrics.auc(y, p, w),
            "logloss": metrics.logloss(y, p, w),
            "ne": metrics.normalised_entropy(y, p, w),
            "rig": metrics.rig(y, p, w),
            "calibration": metrics.calibration_ratio(y, p, w),
            "ece": metrics.expected_calibration_error(y, p, w, 7),
            "pr_auc": metrics.pr_auc(y, p, w),
            "gauc": within("user", metrics.gauc),
        }
        for k in (1, 3):
            expected[f"hit@{k}"] = within("request", metrics.hit_at_k, k)
            expected[f"hit_rate@{k}"] = within("request", metrics.hit_at_k, k, share=True)
        assert_same({task: found.compute()[task]}, {task: expected})
        assert not any(math.isnan(value) for value in expected.values())
        curve = metrics.reliability_curve(y, p, w, 7)
        np.testing.assert_allclose(found.reliability()[task].observed, curve.observed, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [1, 200, 10**9])
def test_rows_on_disk_give_what_rows_in_memory_give(tmp_path, weighted, dtype, levels):
    labels, scores, weights, groups = make_log(dtype=dtype, levels=levels)
    groups["user"][groups["user"] < 150] = 5  # one group larger than what memory may hold
    w = weights if weighted else None
    memory = feed(MetricStream(["click", "save"], **OPTIONS), labels, scores, w, groups)
    with MetricStream(["click", "save"], **OPTIONS, memory_rows=3000, workdir=tmp_path / "new") as disk:
        feed(disk, labels, scores, w, groups)
        assert len(list((tmp_path / "new").rglob("run-*.rows"))) > 10
        assert_same(disk.compute(), memory.compute())
        for task, curve in memory.reliability().items():
            np.testing.assert_allclose(disk.reliability()[task].weight, curve.weight, rtol=1e-12)
        # More chunks may follow, on either way.
        feed(
            disk,
            labels[:500],
            scores[:500],
            None if w is None else w[:500],
            {k: v[:500] for k, v in groups.items()},
        )
        feed(
            memory,
            labels[:500],
            scores[:500],
            None if w is None else w[:500],
            {k: v[:500] for k, v in groups.items()},
        )
        assert_same(disk.compute(), memory.compute())
    assert not list((tmp_path / "new").iterdir())


def test_every_name_that_a_stream_gives_is_described():
    labels, scores, _, groups = make_log(100)
    values = feed(MetricStream(["click", "save"], **OPTIONS), labels, scores, None, groups).compute()["click"]
    stems = {name.replace("@1", "@k").replace("@3", "@k") for name in values}
    assert stems == set(METRICS)
    assert all(metric_info(name).description for name in values)


def test_what_no_group_was_named_for_is_left_out():
    stream = MetricStream(["click"], hit_at=(3,))
    stream.update([[1], [0]], [[0.9], [0.1]])
    assert set(stream.compute()["click"]) == {"auc", "logloss", "ne", "rig", "calibration", "ece", "pr_auc"}


def test_no_rows_and_one_class_give_nan():
    stream = MetricStream(["click"], **OPTIONS)
    assert all(math.isnan(value) for value in stream.compute()["click"].values())
    stream.update([[1.0]], [[0.5]], None, {"user": [1], "request": [1]})
    values = stream.compute()["click"]
    assert math.isnan(values["auc"])
    assert math.isnan(values["gauc"])
    assert values["logloss"] == pytest.approx(math.log(2))
    assert values["hit@1"] == 1.0


def test_the_caller_may_reuse_its_buffers():
    labels, scores, groups = np.array([[1.0], [0.0]]), np.array([[0.9], [0.1]]), np.array([1, 1])
    stream = MetricStream(["click"], gauc_by="user")
    stream.update(labels, scores, None, {"user": groups})
    labels[:], scores[:], groups[:] = 0, 0.5, 9
    assert stream.compute()["click"]["auc"] == 1.0
    assert stream.compute()["click"]["gauc"] == 1.0


def test_bad_chunks_are_refused():
    stream = MetricStream(["click", "save"], gauc_by="user")
    good = np.full((2, 2), 0.5)
    with pytest.raises(UserError, match=r"expected \(n, 2\) of both, a column for each of click, save"):
        stream.update(np.zeros(2), np.zeros(2))
    with pytest.raises(UserError, match="'user' is missing; known: request"):
        stream.update(good > 0.6, good, None, {"request": [1, 2]})
    with pytest.raises(UserError, match="'user' must be 2 integers"):
        stream.update(good > 0.6, good, None, {"user": [0.5, 1.5]})
    with pytest.raises(UserError, match="scores of save: 1 of 2 are NaN, the first at index 1"):
        stream.update(good > 0.6, [[0.1, 0.1], [0.1, math.nan]], None, {"user": [1, 2]})
    stream.update(good > 0.6, good, [1, 1], {"user": [1, 2]})
    with pytest.raises(UserError, match="given for some chunks only"):
        stream.update(good > 0.6, good, None, {"user": [1, 2]})
    with pytest.raises(UserError, match="k: expected at least 1"):
        MetricStream(["click"], hit_at=(0,), hit_by="user")
    with pytest.raises(UserError, match="bins"):
        MetricStream(["click"], calibration_bins=0)


def test_a_refused_chunk_leaves_no_trace():
    stream = MetricStream(["click", "save"])
    with pytest.raises(UserError):
        stream.update([[1, 1]], [[0.5, math.nan]], [1.0])
    stream.update([[1, 0], [0, 1]], [[0.5, 0.5], [0.5, 0.5]])
    assert stream.compute()["click"]["logloss"] == pytest.approx(math.log(2))
    assert stream.compute()["click"]["calibration"] == 1.0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir"):
        ExternalSort(tmp_path / "file" / "x").add(np.zeros(1, [("key", np.int64)]))


@given(st.lists(st.lists(st.integers(0, 9), max_size=3000), max_size=5), st.integers(1, 4000))
@settings(max_examples=40, deadline=None)
def test_a_merge_is_a_sort(tmp_path_factory, runs, rows):
    sort = ExternalSort(tmp_path_factory.mktemp("runs"))
    for number, run in enumerate(runs):
        table = np.zeros(len(run), [("key", np.int64), ("run", np.int8)])
        table["key"], table["run"] = run, number
        sort.add(table)
    blocks = list(sort.blocks(rows))
    keys = np.concatenate([block["key"] for block in blocks]) if blocks else np.array([])
    np.testing.assert_array_equal(keys, sorted(key for run in runs for key in run))
    whole = list(whole_keys(blocks))
    np.testing.assert_array_equal(np.concatenate([b["key"] for b in whole]) if whole else [], keys)
    ends = [(block["key"][0], block["key"][-1]) for block in whole]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))
