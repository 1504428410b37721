"""Damaged files are refused, made anew or harmless; and the check itself would notice if they were not."""

import numpy as np
import pytest
from common import write_small_log, write_small_study
from corrupt import BAD, Artefact, check, damage, judge

from mldcn.errors import UserError
from mldcn.study.recipe import load_recipe


@pytest.mark.parametrize("raw", [b"x", b'{"a": [1, 2.5, null], "b": "c"}\n', bytes(range(256)) * 20])
def test_damage_changes_something_and_is_the_same_for_a_seed(raw):
    kinds = set()
    for seed in range(200):
        new, how = damage(raw, np.random.default_rng(seed))
        assert new != raw
        assert (new, how) == damage(raw, np.random.default_rng(seed))
        kinds.add(how.split()[0])
    assert kinds >= {"bit", "byte", "cut", "longer"}
    assert ("value" in kinds) == raw.startswith(b"{")


def raising(error):
    def read(folder, facts):
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda folder, facts: "same", "same"),
        (lambda folder, facts: "different", "different"),
        (raising(UserError("/tmp/copy/rows.arrow: damaged; encode the log again")), "refused"),
        (raising(UserError("something is wrong")), "unclear"),
        (raising(KeyError("format")), "exception"),
    ],
)
def test_what_came_of_a_copy_is_judged(tmp_path, read, outcome):
    artefact = Artefact("copy", {}, tmp_path, read)
    found, message = judge(artefact, tmp_path / "copy", {})
    assert found == outcome
    assert ("KeyError" in message) == (outcome == "exception")


def test_the_small_study_is_one(tmp_path):
    write_small_study(write_small_log(tmp_path, 200), tmp_path / "study.yaml")
    assert load_recipe(tmp_path / "study.yaml").baseline == "mldcn"


def test_no_damaged_file_is_taken_for_whole(tmp_path):
    logs = [f"raw-log.{kind}" for kind in ("csv", "csv.gz", "csv.zst", "parquet")]
    counts, violations = check(tmp_path, copies=12, rows=800, seed=1, skip=["study", "interrupted", *logs])
    assert not violations, "\n".join(violations)
    assert {name for name, _ in counts} == {"encoded", "partial", "checkpoint", "run"}
    assert not any(counter[outcome] for counter in counts.values() for outcome in BAD)
    assert all(counter.total() for counter in counts.values())
