import numpy as np
import pytest

from mldcn.comparison import PredictionWriter, compare_predictions, read_predictions
from mldcn.errors import UserError

RNG = np.random.default_rng(0)
ROWS = 400


def written(path, scores, labels, user, weight=None):
    """A run's predictions of one task, as ``mldcn compare`` reads them."""
    weight = np.ones(ROWS, np.float32) if weight is None else weight
    nobody = np.zeros(ROWS, np.int64)
    with PredictionWriter(path, ("click",)) as writer:
        for half in (slice(None, 150), slice(150, None)):
            part = (labels[half, None], scores[half, None], weight[half], user[half], nobody[half])
            writer.write(*(np.ascontiguousarray(column) for column in part))
    return read_predictions(path)


def rows(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random(ROWS) < 0.3).astype(np.float32)
    a, b = (np.clip(0.3 * labels + 0.7 * rng.random(ROWS), 0.01, 0.99).astype(np.float32) for _ in range(2))
    return labels, a, b


def bootstrap(comparison, metric="logloss"):
    return next(d for _, m, d in comparison.differences if m == metric and d.method != "DeLong")


def test_rows_of_unknown_users_are_not_one_user(tmp_path):
    labels, a, b = rows(0)
    alone, unknown = np.arange(1, ROWS + 1), np.arange(1, ROWS + 1)
    unknown[100:] = 0
    found = {}
    for name, user in (("alone", alone), ("unknown", unknown)):
        tables = [written(tmp_path / f"{name}{i}", s, labels, user) for i, s in enumerate((a, b))]
        found[name] = bootstrap(compare_predictions(*tables, ("a", "b"), repeats=300))
    assert found["unknown"].method == "bootstrap by user"
    widths = {name: d.high - d.low for name, d in found.items()}
    assert widths["unknown"] == pytest.approx(widths["alone"], rel=0.25)


def test_weighted_rows_have_no_delong_test_and_a_task_of_one_class_is_left_out(tmp_path):
    labels, a, b = rows(1)
    user = np.zeros(ROWS, np.int64)
    weight = RNG.integers(1, 3, ROWS).astype(np.float32)
    tables = [written(tmp_path / f"w{i}", s, labels, user, weight) for i, s in enumerate((a, b))]
    methods = {d.method for _, _, d in compare_predictions(*tables, ("a", "b"), repeats=20).differences}
    assert methods == {"bootstrap by row"}
    for name, value in (("none", 0.0), ("null", np.nan)):
        same = np.full(ROWS, value, np.float32)
        tables = [written(tmp_path / f"{name}{i}", s, same, user) for i, s in enumerate((a, b))]
        assert compare_predictions(*tables, ("a", "b"), repeats=20).differences == ()


def test_other_rows_and_damage_are_refused(tmp_path):
    labels, a, b = rows(2)
    user = np.zeros(ROWS, np.int64)
    mine, theirs = written(tmp_path / "a", a, labels, user), written(tmp_path / "b", b, labels[::-1], user)
    with pytest.raises(UserError, match="not tested on the same rows"):
        compare_predictions(mine, theirs, ("a", "b"))
    weighed = written(tmp_path / "w", b, labels, user, np.full(ROWS, 2, np.float32))
    with pytest.raises(UserError, match=r"a and b weigh the rows differently; .* schema.weight"):
        compare_predictions(mine, weighed, ("a", "b"))
    other = mine.rename_columns([name.replace("click", "save") for name in mine.column_names])
    with pytest.raises(UserError, match="a and b have no task in common"):
        compare_predictions(mine, other, ("a", "b"))
    (tmp_path / "a").write_bytes(b"junk")
    with pytest.raises(UserError, match="damaged"):
        read_predictions(tmp_path / "a")
    with pytest.raises(UserError, match="no test rows to compare on"):
        read_predictions(tmp_path / "none")
