import pytest

from mldcn.config import Config, parse
from mldcn.data.describe import describe


def test_a_small_log_by_eye(tmp_path):
    rows = ["a,1,5,0", "a,1,,1", "b,2,7,0", ",2,9,1", "c,3,100,", "a,3,1,1", "zz,3,1,1"]
    (tmp_path / "log.csv").write_text("id,tags,n,click\n" + "\n".join(rows) + "\n")
    raw = {
        "data": {
            "train": [str(tmp_path / "log.csv")],
            "split": {"kind": "order", "valid": 0.14, "test": 0.14},
            "block_rows": 2,
        },
        "schema": {
            "features": [
                {
                    "kind": "categorical",
                    "name": "id",
                    "source": "item",
                    "encoding": {"kind": "vocabulary", "min_count": 2},
                },
                {"kind": "multi", "name": "tags"},
                {"kind": "numeric", "name": "n"},
            ],
            "labels": [{"name": "click"}],
        },
    }
    facts = describe(parse(Config, raw, "x"))
    assert facts.rows == {"train": 5, "valid": 1, "test": 1}
    ids, tags, number = facts.features
    assert (ids.name, ids.kind, ids.source, ids.column) == ("id", "categorical", "item", "id")
    assert ids.coverage == pytest.approx(6 / 7)
    # Training rows: a, a, b, missing, c; only a comes twice. Held out: a and zz.
    assert (ids.distinct, ids.table_rows, ids.top) == (3, 3, (("a", 2),))
    assert (ids.oov_train, ids.oov_held_out) == (0.5, 0.5)
    assert tags.coverage == 1
    assert tags.top == (("1", 2), ("2", 2), ("3", 1))
    assert number.coverage == pytest.approx(6 / 7)
    assert (number.numbers.minimum, number.numbers.maximum) == (1, 100)
    assert number.numbers.mean == pytest.approx(123 / 6)
    assert number.numbers.quantiles[2] == 5
    (click,) = facts.labels
    assert click.known == {"train": 4, "valid": 1, "test": 1}
    assert click.rate == {"train": 0.5, "valid": 1, "test": 1}


def test_split_by_files_counts_every_file(tmp_path):
    for name, rows in (("train", "a,0\nb,1\n"), ("test", "a,1\nc,1\nd,1\n")):
        (tmp_path / f"{name}.csv").write_text("id,click\n" + rows)
    raw = {
        "data": {
            "train": [str(tmp_path / "train.csv")],
            "test": [str(tmp_path / "test.csv")],
            "split": {"kind": "files"},
        },
        "schema": {"features": [{"kind": "categorical", "name": "id"}], "labels": [{"name": "click"}]},
    }
    facts = describe(parse(Config, raw, "x"))
    assert facts.rows == {"train": 2, "test": 3}
    assert facts.features[0].coverage == 1
    assert facts.features[0].oov_held_out == pytest.approx(2 / 3)
    assert facts.labels[0].rate == {"train": 0.5, "test": 1}
