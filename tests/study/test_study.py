"""What a study trains, and what it does not train again; the training itself is a stand-in here."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from study_cases import RECIPE, in_turns, recipe, row

from mldcn.errors import UserError
from mldcn.files import locked
from mldcn.study import engine, load_study, plan, run_study
from mldcn.study.engine import Watcher
from mldcn.study.rows import read_rows
from mldcn.study.running import Measured, Train

TRIAL = "mldcn at 20k, trial 1"


class Killed(Exception):
    pass


class Trainer:
    """Makes up the rows of runs, of each config the same; notes what it was asked for."""

    def __init__(self):
        self.runs = []
        self.dies_at = None

    def __call__(self, *settings):
        self.train = Train(*settings)
        return self.run

    def run(self, job):
        if len(self.runs) == self.dies_at:
            raise Killed
        self.runs.append(str(job))
        auc = 0.5 + int(hashlib.md5(job.config_hash.encode()).hexdigest()[:4], 16) / 2**18
        return self.row(job, auc)

    def row(self, job, auc):
        return row(
            rival=job.rival,
            point=job.point.name,
            budget=job.point.budget,
            axis=job.point.axis,
            stage=job.stage,
            trial=job.trial,
            seed=job.seed,
            settings=job.settings,
            residual=job.residual,
            knob=job.knob,
            test={"auc": auc} if job.stage == "final" else None,
            curve=((13, auc),),
            run=job.folder,
            config_hash=job.config_hash,
        )


@pytest.fixture
def trainer(monkeypatch):
    trainer = Trainer()
    monkeypatch.setattr(engine, "run_ready", in_turns)
    monkeypatch.setattr(engine, "Train", trainer)
    measured = Measured(1000, "made up", {1: {"median": 1.0, "p99": 2.0}})
    monkeypatch.setattr(engine, "Measure", lambda batches: lambda job: measured)
    monkeypatch.setattr(plan, "step_seconds", lambda job, layout: 0.01)
    return trainer


def identities(rows):
    return {(row.rival, row.point, row.stage, row.trial, row.seed, row.config_hash) for row in rows}


def study(folder, changes=None, **options):
    return run_study(recipe(**(changes or {})), None, folder, **{"jobs": 1, **options})


def test_every_rival_is_tuned_once_and_trained_at_every_budget(folder, trainer):
    found = study(folder)
    assert len(trainer.runs) == len(set(trainer.runs)) == 2 * 2 + 2 * 2
    effort = found.effort()
    assert {(e.trials, e.final_runs) for e in effort.values()} == {(2, 2)}
    for rival in ("dnn", "mldcn"):
        trials = [row for row in found.rows if row.rival == rival and row.stage == "tune"]
        assert {row.point for row in trials} == {"20k"}
        assert trials[0].settings["training.optimiser.lr"] == 0.001  # the config as it stands
        best = max(trials, key=lambda row: row.curve)
        final = [row for row in found.final if row.rival == rival]
        assert {row.point for row in final} == {"20k", "40k"}
        assert all(row.settings == best.settings and row.trial == best.trial for row in final)
        assert all(abs(row.residual) < 0.01 for row in final)
    assert "model.interaction.num_layers" in found.at("mldcn", "20k")[0].settings
    assert found.baseline() == found.at("dnn", "20k")
    assert all(row.latency_ms == {1: {"median": 1.0, "p99": 2.0}} for row in found.final)
    assert load_study(folder).rows == found.rows
    assert load_study(folder).recipe == found.recipe


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_study_killed_after_any_run_goes_on_there(folder, trainer, after, tmp_path):
    trainer.dies_at = after
    with pytest.raises(Killed):
        study(folder)
    assert len(read_rows(folder / "rows.jsonl")) == after
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"rival": "dn')  # the kill came while a line was written
    trainer.dies_at = None
    resumed = study(folder)
    assert len(trainer.runs) == len(set(trainer.runs)) == 8
    (folder / "rows.jsonl").unlink()
    assert identities(resumed.rows) == identities(study(folder).rows)


def test_rows_do_not_depend_on_how_many_run_at_the_same_time(folder, trainer):
    one = study(folder, jobs=1)
    (folder / "rows.jsonl").unlink()
    three = study(folder, jobs=3)
    assert identities(one.rows) == identities(three.rows)
    assert {row.config_hash: row.test for row in one.final} == {r.config_hash: r.test for r in three.final}


WIDER = {"flops": 80_000}
THIRD = {"fm": {"interaction": {"name": "fm"}}}


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({}, 0),
        ({"seeds": [0, 1]}, 4),
        ({"rivals": {**RECIPE["rivals"], **THIRD}}, 2 + 2),
        ({"budgets": [*RECIPE["budgets"], WIDER], "tuning": {**RECIPE["tuning"], "budget": "20k"}}, 2),
        ({"title": "other words", "margin": 0.002}, 0),
    ],
)
def test_a_recipe_that_grows_trains_what_is_new(folder, trainer, changes, new):
    before = study(folder)
    trainer.runs.clear()
    after = study(folder, changes)
    assert len(trainer.runs) == new
    assert identities(before.rows) <= identities(after.rows)
    assert len(after.rows) == len(before.rows) + new


def test_more_trials_are_added_and_final_runs_repeated_only_for_better_settings(folder, trainer):
    before = study(folder)
    trainer.runs.clear()
    after = study(folder, {"tuning": {**RECIPE["tuning"], "trials": 6}})
    trials = [run for run in trainer.runs if "trial" in run]
    assert len(trials) == 2 * 4
    moved = [
        rival
        for rival in ("dnn", "mldcn")
        if after.at(rival, "20k")[0].trial != before.at(rival, "20k")[0].trial
    ]
    assert len(trainer.runs) == 2 * 4 + 2 * len(moved)
    assert len(after.final) == 4  # those of settings that lost do not count
    fewer = study(folder)
    assert identities(fewer.rows) == identities(before.rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {**RECIPE["config"], "evaluation": {"hit_at": [5]}}}, "trial 0 was of another recipe"),
        (
            {"rivals": {**RECIPE["rivals"], "dnn": {"interaction": {"name": "dnn", "hidden": [8, 8]}}}},
            "another",
        ),
        ({"budgets": [{"flops": 21_000, "name": "20k"}, RECIPE["budgets"][1]]}, "another recipe"),
        (
            {"tuning": {**RECIPE["tuning"], "space": {"training.optimiser.lr": [0.001, 0.002]}}},
            "trial 1 was of other settings than tuning.space has",
        ),
        ({"task": "save"}, r"of another log or task \(task was 'click' and is 'save'\)"),
    ],
)
def test_rows_of_another_recipe_are_refused(folder, trainer, changes, message):
    study(folder)
    trainer.runs.clear()
    with pytest.raises(UserError, match=message) as error:
        study(folder, changes)
    assert "another with --out" in str(error.value) or "another folder with --out" in str(error.value)
    assert not trainer.runs


def test_only_some_rivals_or_budgets_are_trained(folder, trainer):
    study(folder, only=["mldcn@40k"])
    assert trainer.runs == ["mldcn at 20k, trial 0", TRIAL, "mldcn at 40k, seed 0"]
    study(folder, only=["mldcn"])
    assert trainer.runs[3:] == ["mldcn at 20k, seed 0"]
    with pytest.raises(UserError, match="--only fm: the recipe has dnn, mldcn"):
        study(folder, only=["fm"])
    with pytest.raises(UserError, match="--only dnn@9k: the recipe has dnn@20k, dnn@40k"):
        study(folder, only=["dnn@9k"])


def test_a_study_killed_while_it_measures_goes_on_there(folder, trainer, monkeypatch):
    measure = engine.Measure

    def dies(batches):
        def run(job):
            raise Killed

        return run

    monkeypatch.setattr(engine, "Measure", dies)
    with pytest.raises(Killed):
        study(folder)
    monkeypatch.setattr(engine, "Measure", measure)
    found = study(folder, only=["mldcn"])
    assert {row.rival for row in found.final if row.latency_ms is not None} == {"mldcn"}
    assert all(row.latency_ms is not None for row in study(folder).final)
    assert len(trainer.runs) == 8


def test_variants_that_are_one_model_are_trained_once(folder, trainer):
    vary = {"model.interaction.num_layers": [1, 2], "model.interaction.rank": [24, 12]}
    found = study(folder, {"budgets": [], "tuning": None, "vary": vary})
    assert sorted(trainer.runs) == [
        "dnn at as it is, seed 0",
        "mldcn at num_layers=1, seed 0",
        "mldcn at num_layers=2, seed 0",
        "mldcn at rank=12, seed 0",
    ]
    assert [row.axis for row in found.at("mldcn", "rank=24")] == [24.0]
    assert found.at("mldcn", "rank=24")[0].test == found.at("mldcn", "num_layers=1")[0].test
    study(folder, {"budgets": [], "tuning": None, "vary": vary})
    assert len(trainer.runs) == 4


def test_trials_that_broke_down_count_and_are_not_chosen(folder, trainer, monkeypatch):
    def broken_row(job, auc):
        found = Trainer.row(trainer, job, auc)
        broken = job.stage == "tune" and job.trial == 0
        return replace(found, diverged=True, valid={}, curve=()) if broken else found

    monkeypatch.setattr(trainer, "row", broken_row)
    found = study(folder)
    assert {(e.trials, e.diverged) for e in found.effort().values()} == {(2, 1)}
    assert {row.trial for row in found.final} == {1}


def test_a_rival_whose_trials_all_broke_down_is_named(folder, trainer, monkeypatch):
    monkeypatch.setattr(
        trainer, "row", lambda job, auc: replace(Trainer.row(trainer, job, auc), diverged=True, curve=())
    )
    with pytest.raises(UserError, match="rival dnn: every trial broke down"):
        study(folder)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"space": {"model.interaction.num_layers": [1, 2]}}, "no config key 'model.interaction.num_layers'"),
        ({"own": {"mldcn": {"model.interaction.mask_ratio": [300.0]}}}, "none of 20 draws from tuning.own"),
    ],
)
def test_a_space_that_cannot_be_is_refused(folder, trainer, space, message):
    with pytest.raises(UserError, match=message):
        study(folder, {"tuning": {"trials": 2, **space}})


def test_draws_that_fit_no_budget_give_way_to_draws_at_random(folder, trainer, monkeypatch):
    """What was tried may draw on the same unfit choice for ever."""

    def propose(space, done, seed, *, higher):
        return {**real(space, done, seed, higher=higher), **({ratio: 300.0} if done else {ratio: 0.5})}

    real, ratio = plan.propose, "model.interaction.mask_ratio"
    monkeypatch.setattr(plan, "propose", propose)
    found = study(folder, {"tuning": {"trials": 3, "own": {"mldcn": {ratio: [0.5, 300.0]}}}})
    assert [r.settings.get(ratio) for r in found.rows if r.rival == "mldcn" and r.stage == "tune"][-1] == 0.5


def test_the_plan_shows_the_widths_and_trains_nothing(folder, trainer):
    class Plan(Watcher):
        def planned(self, lines, standing):
            self.lines, self.standing = lines, standing

    watcher = Plan()
    found = study(folder, dry_run=True, watcher=watcher)
    assert not trainer.runs
    assert not found.rows
    assert not (folder / "rows.jsonl").exists()
    lines = {(line.rival, line.point): line for line in watcher.lines}
    assert len(lines) == 4
    for (_, point), line in lines.items():
        assert line.cost == pytest.approx({"20k": 20_000, "40k": 40_000}[point] * (1 + line.residual))
        assert abs(line.residual) < 0.01
    assert "rank" in lines["mldcn", "20k"].knob
    assert [(line.trials, line.runs) for line in watcher.lines] == [(2, 1), (0, 1)] * 2
    assert watcher.standing.left == 8
    # Two epochs of thirteen steps of a hundredth of a second each.
    assert watcher.standing.seconds == pytest.approx(8 * 2 * 13 * 0.01)
    watcher = Plan()
    study(folder)
    study(folder, {"seeds": [0, 1]}, dry_run=True, watcher=watcher)
    assert watcher.standing.seconds == pytest.approx(4 * 1.0)  # as long as the finished runs took


def test_a_run_s_folder_is_named_after_what_it_is(folder, trainer):
    runs = {row.run for row in study(folder).rows}
    assert "runs/mldcn/tuning/trial-01" in runs
    assert any(run.startswith("runs/dnn/40k/trial-0") and run.endswith("-seed-0") for run in runs)


def test_seconds_of_all_sessions_are_added_up(folder, trainer):
    study(folder)
    facts = json.loads((folder / "study.json").read_text())
    del facts["crc32"]
    (folder / "study.json").write_text(json.dumps({**facts, "seconds": 1000.0}))
    assert 1000 < study(folder, {"seeds": [0, 1]}).facts.seconds < 1100


@pytest.mark.parametrize("damaged", [lambda text: text[:100], lambda text: text.replace('": 1', '": 2', 1)])
def test_damaged_facts_are_refused(folder, trainer, damaged):
    study(folder)
    text = (folder / "study.json").read_text()
    (folder / "study.json").write_text(damaged(text))
    assert (folder / "study.json").read_text() != text
    for read in (study, load_study):
        with pytest.raises(UserError, match=r"study\.json: damaged .* remove the file"):
            read(folder)
    (folder / "study.json").unlink()
    assert study(folder).facts.rows


def test_a_damaged_row_is_refused(folder, trainer):
    study(folder)
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(["{}", *rows]) + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        study(folder)


def test_a_study_in_use_is_refused(folder):
    with ThreadPoolExecutor(1) as other, locked(folder):
        running = other.submit(study, folder)
        with pytest.raises(UserError, match=f"out: in use by process {os.getpid()}"):
            running.result()
