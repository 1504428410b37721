"""What the memory check measures, and what it would call a violation."""

import sys
from dataclasses import replace

import pytest
from memory import Measured, same_result, violations, watched, write_distinct


def test_the_peak_of_a_process_is_seen(tmp_path):
    code = "import time; a = bytearray(b'x') * (200 << 20); time.sleep(0.3)"
    peak = watched([sys.executable, "-c", code], tmp_path)
    assert 200 < peak.anonymous < 300
    assert peak.resident >= peak.anonymous
    with pytest.raises(RuntimeError, match="exit code 3"):
        watched([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_growth_and_a_broken_bound_are_violations():
    short = Measured("data encode", "csv", 1000, 10.0, 256, 200.0, 500.0, 1.0)
    assert violations([short, replace(short, rows=2000, above=210.0)]) == []
    assert "250 for 2,000" in violations([short, replace(short, rows=2000, above=250.0)])[0]
    assert "over 256" in violations([replace(short, above=300.0)])[0]
    # Training and prediction have no bound of their own, but must not grow.
    assert violations([replace(short, command="fit", above=300.0)]) == []


def test_the_bound_does_not_change_the_result(tmp_path):
    assert same_result(tmp_path, 3000, (256, 4096))


def test_no_id_comes_twice(tmp_path):
    write_distinct(tmp_path / "ids.csv", 5000)
    lines = (tmp_path / "ids.csv").read_text().splitlines()
    assert lines[0] == "click,id"
    assert len({line.split(",")[1] for line in lines[1:]}) == 5000
