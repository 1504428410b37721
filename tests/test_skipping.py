"""`data.on_error: skip` from the log to the model: what is left is as if the bad rows had never been there."""

import csv
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mldcn.config import Config, parse
from mldcn.data.prepare import prepare
from mldcn.data.rejects import RejectsFile
from mldcn.errors import UserError
from mldcn.predict import Predictor, predict_file
from mldcn.run import RunFolder
from mldcn.training.fit import fit
from mldcn.workflow import compare, evaluate_log

HEADER = "part,time,ad,n,click"
BAD = [
    "train,1,a1,oops,0",
    "train,1,a1,1,2",
    "val,2,a2",
    "test,soon,a3,1,1",
    "test,3,a\xe9,1,1",
    "val,,a4,1,0,9",
]


def rows():
    rng = np.random.default_rng(0)
    parts = rng.choice(["train", "val", "test"], 900, p=[0.6, 0.2, 0.2])
    return [
        f"{part},{i},a{rng.integers(30)},{rng.normal():.4f},{rng.integers(2)}" for i, part in enumerate(parts)
    ]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder with the same log without and with bad rows, the latter in two files."""
    folder, clean = tmp_path_factory.mktemp("logs"), rows()
    (folder / "clean.csv").write_text("\n".join([HEADER, *clean]) + "\n")
    dirty = list(clean)
    for number in range(120):
        dirty.insert(7 * number + number % 5, BAD[number % len(BAD)])
    for name, part in (("dirty-1.csv", dirty[:500]), ("dirty-2.csv", dirty[500:])):
        (folder / name).write_bytes("\n".join([HEADER, *part]).encode("latin-1"))
    return folder


def config(files, split, **data) -> Config:
    raw = {
        "data": {"train": [str(file) for file in files], "split": split, "block_rows": 64, **data},
        "schema": {
            "features": [
                {"name": "ad", "kind": "categorical"},
                {"name": "n", "kind": "numeric", "transform": "quantile"},
            ],
            "labels": [{"name": "click"}],
            "time": "time",
        },
        "model": {
            "embedding": {"dim": 2},
            "interaction": {"rank": 2, "num_layers": 1},
            "deep": {"hidden": [4]},
        },
        "training": {"threads": 1, "epochs": 1},
    }
    return parse(Config, raw, "test")


SPLITS = [
    {"kind": "column", "column": "part"},
    {"kind": "hash", "columns": ["time"], "valid": 0.2, "test": 0.2},
]


@pytest.mark.parametrize("split", SPLITS)
def test_good_rows_are_encoded_as_if_the_bad_ones_were_not_there(logs, tmp_path, split):
    dirty_files = sorted(logs.glob("dirty-*"))
    clean = prepare(config([logs / "clean.csv"], split), tmp_path / "clean")
    dirty = prepare(config(dirty_files, split, on_error="skip"), tmp_path / "dirty")
    assert clean.rejected == 0
    assert not (tmp_path / "clean" / "rejects.csv").exists()
    assert dirty.rejected == 120
    for part in ("train", "valid", "test"):
        one, other = getattr(clean, part), getattr(dirty, part)
        for name in ("ids", "dense", "labels", "time"):
            np.testing.assert_array_equal(one.column(name), other.column(name))
    with (tmp_path / "dirty" / "rejects.csv").open(newline="") as file:
        rejects = list(csv.DictReader(file))
    assert len(rejects) == 120
    for reject in rejects:
        line = Path(reject["file"]).read_bytes().split(b"\n")[int(reject["row"])].decode("latin-1")
        assert line in BAD
    with pytest.raises(UserError, match=r"dirty-1.csv: row \d+"):
        prepare(config(dirty_files, split), tmp_path / "fail")


@pytest.fixture(scope="module")
def run(logs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    skipping = config([logs / "clean.csv"], SPLITS[0], on_error="skip")
    trained = RunFolder.create(folder / "run")
    fit(skipping, trained, prepare(skipping, folder / "encoded"))
    return trained


def test_predict_leaves_bad_rows_out_and_names_them_beside(logs, run, tmp_path):
    predictor = Predictor.load(run.path, "cpu")
    clean = predict_file(predictor, [logs / "clean.csv"], tmp_path / "clean.csv", ["part"])
    assert (clean.rows, clean.rejected, clean.rejects) == (900, 0, None)
    target, beside = tmp_path / "dirty.csv", tmp_path / "dirty.rejects.csv"
    dirty = predict_file(predictor, sorted(logs.glob("dirty-*")), target, ["part"])
    # Labels and times are not read here, and a wrong one is no matter.
    good = dirty.rows - 900
    assert (dirty.rejected, dirty.rejects, good) == (80, beside, 40)
    assert len(beside.read_text().splitlines()) == 81
    assert len(pl.read_csv(target)) == 940
    assert predict_file(predictor, [logs / "clean.csv"], target).rejects is None
    assert not beside.exists()


def test_evaluate_and_compare_leave_bad_rows_out(logs, run, tmp_path):
    files = [str(path) for path in sorted(logs.glob("dirty-*"))]
    clean = evaluate_log(run, [str(logs / "clean.csv")])
    with RejectsFile(tmp_path / "rejects.csv") as rejects:
        dirty = evaluate_log(run, files, None, rejects)
    assert dirty.metrics == clean.metrics
    assert rejects.count == 120
    assert len((tmp_path / "rejects.csv").read_text().splitlines()) == 121
    counted = RejectsFile(None)
    assert compare(run.path, run.path, files, repeats=10, rejects=counted).rows == 900
    assert counted.count == 120


@pytest.mark.parametrize("what", ["prepare", "predict", "evaluate"])
def test_a_log_of_bad_rows_alone_is_refused(run, tmp_path, what):
    log = tmp_path / "log.csv"
    log.write_text(f"{HEADER}\n1,2\n{BAD[0]}\n")
    with pytest.raises(UserError, match=r"all 2 rows are bad.*log.csv: row 1 has 2 columns, expected 5"):
        if what == "prepare":
            prepare(config([log], SPLITS[0], on_error="skip"), tmp_path / "encoded")
        elif what == "predict":
            predict_file(Predictor.load(run.path, "cpu"), [log], tmp_path / "scores.csv")
        else:
            evaluate_log(run, [str(log)])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["log.csv"]
