import json
import math

import pytest
from study_cases import recipe, row

from mldcn.errors import UserError
from mldcn.study.rows import RunRow, append_row, chosen_trial, counted, load_study, read_rows, write_rows

MEASURED = row(
    memory_bytes=5,
    memory_how="counted",
    latency_ms={1: {"median": 0.1, "p99": 0.2}},
    valid={"auc": math.nan},
    curve=((10, math.nan), (20, 0.6)),
)


def test_rows_go_through_the_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_row(file, row())
    append_row(file, MEASURED)
    first, second = read_rows(file)
    assert first == row()
    assert math.isnan(second.valid["auc"])
    assert math.isnan(second.curve[0][1])
    assert second.latency_ms == {1: {"median": 0.1, "p99": 0.2}}
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
    write_rows(file, [first])
    assert read_rows(file) == [first]


def test_a_changed_digit_is_noticed_and_a_line_without_a_checksum_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_row(file, MEASURED)
    line = file.read_text()
    file.write_text(line.replace("0.6", "0.7", 1))
    with pytest.raises(UserError, match=r"rows\.jsonl: line 1 is damaged .*checksum"):
        read_rows(file)
    plain = json.loads(line)
    del plain["crc32"]
    file.write_text(json.dumps(plain) + "\n")
    assert read_rows(file)[0].latency_ms == MEASURED.latency_ms


@pytest.mark.parametrize("kept", [1, 20, 200])
def test_a_line_that_a_kill_tore_is_passed_over_and_written_over(tmp_path, kept):
    file = tmp_path / "rows.jsonl"
    append_row(file, row())
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:kept])
    assert read_rows(file) == [row()]
    append_row(file, row(seed=1))
    assert read_rows(file) == [row(), row(seed=1)]


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize("damage", ["{", "[]", '{"rival": "dnn"}'])
def test_a_damaged_line_is_named(tmp_path, damage):
    file = tmp_path / "rows.jsonl"
    append_row(file, row())
    file.write_text(f"{damage}\n{file.read_text()}")
    with pytest.raises(UserError, match=r"rows\.jsonl: line 1 is damaged .* remove the file"):
        read_rows(file)


def test_a_row_of_other_keys_is_none():
    plain = row().to_json()
    with pytest.raises(ValueError, match="new"):
        RunRow.from_json({**plain, "new": 1})


def test_flops_that_are_matched_are_those_behind_the_embeddings():
    assert row().model_flops == 20_000


def trial(number, best, **changes):
    return row(stage="tune", trial=number, seed=1000, test=None, curve=((10, 0.5), (20, best)), **changes)


def test_the_chosen_trial_is_the_best_that_came_to_its_end():
    trials = [trial(0, 0.6), trial(1, 0.7, pruned=True), trial(2, 0.7, diverged=True), trial(3, 0.65)]
    trials.append(trial(4, 0.65))  # as good and later
    assert chosen_trial(trials, "dnn", higher=True).trial == 3
    assert chosen_trial([trial(0, 0.3), trial(1, 0.2)], "dnn", higher=False).trial == 1
    assert chosen_trial(trials[1:3], "dnn", higher=True) is None
    assert chosen_trial(trials, "mldcn", higher=True) is None


def test_final_runs_of_settings_that_lost_do_not_count():
    tuned = [trial(0, 0.6), trial(1, 0.7)]
    final = [row(trial=0), row(trial=1), row(trial=1, seed=5), row(trial=1, point="9k"), row(rival="fm")]
    assert counted(recipe(), [*tuned, *final], higher=True) == [*tuned, final[1]]
    once = recipe(tuning={**recipe().tuning.model_dump(), "trials": 1})
    assert counted(once, [*tuned, *final], higher=True) == [tuned[0], final[0]]


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        load_study(tmp_path)
