"""Models against limits: what is measured, what is within, and what is recommended."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from study_cases import recipe, row

from mldcn.comparison import PredictionWriter
from mldcn.config import dump_config
from mldcn.errors import UserError
from mldcn.run import RunFolder
from mldcn.study.bench import Bench
from mldcn.study.constraints import judge
from mldcn.study.hyperparameters import hyperparameters
from mldcn.study.rows import Facts, Study
from mldcn.study.slowdowns import FILE, Slowdown, measure_slowdowns, ratio_of, read_slowdowns, time_in_turns
from mldcn.study.statistics import summarise

FACTS = Facts("pinads", {}, {}, 3, "click", "click/auc", True, 1, 1, "cpu", "", {}, 0.0)
AUCS = {"dnn": (0.700, 0.702), "mldcn": (0.710, 0.711), "wide": (0.720, 0.722)}
FLOPS = {"dnn": 10_000, "mldcn": 20_000, "wide": 80_000}
MEMORY = {"dnn": 100 << 20, "mldcn": 200 << 20, "wide": 900 << 20}
LIMITS = {"gain": {"auc": 0.001}, "device_memory_gb": 1.0, "memory_percent": 75, "broken_runs": 0}
SAVES = {"dnn": (0.10, 0.12), "mldcn": (0.11, 0.13), "wide": (0.10, 0.10)}


def make_study(out, limits=LIMITS, rows=None, **changes):
    rivals = {name: {"interaction": {"name": "dnn", "hidden": [32]}} for name in AUCS}
    plain = {"rivals": rivals, "baseline": "dnn", "budgets": [], "tuning": None, "seeds": [0, 1]}
    found = [
        row(
            rival=rival,
            point="as it is",
            budget=None,
            seed=seed,
            knob=None,
            residual=None,
            flops={"embedding": 0, "interaction": FLOPS[rival], "deep": 0, "heads": 0},
            test={"auc": AUCS[rival][seed], "logloss": 0.3},
            memory_bytes=MEMORY[rival],
            memory_how="counted",
            latency_ms={1: {"median": 1.0 + FLOPS[rival] / 1e5, "p99": 2.0}},
            run=f"runs/{rival}/{seed}",
            config_hash=f"{rival}{seed}",
        )
        for rival in AUCS
        for seed in (0, 1)
    ]
    study = recipe(**{**plain, "limits": limits, **changes})
    return Study(study, tuple(found if rows is None else rows(found)), out, FACTS)


def judged(study):
    verdicts = judge(study, summarise(study))
    assert verdicts is not None
    return verdicts


def cells(verdicts, rival):
    (found,) = [each for each in verdicts.rows if each.rival == rival]
    return {cell.constraint: cell for cell in found.cells}


def test_without_limits_there_is_no_table(tmp_path):
    study = make_study(tmp_path, limits={})
    assert judge(study, summarise(study)) is None


def test_the_best_model_within_all_limits_is_recommended(tmp_path):
    verdicts = judged(make_study(tmp_path))
    assert cells(verdicts, "wide")["training memory"].ok is False
    assert cells(verdicts, "wide")["training memory"].text == "87.9 % (900 MiB)"
    assert cells(verdicts, "mldcn")["training memory"].ok is True
    assert cells(verdicts, "dnn")["gain of AUC"].ok is False  # the baseline gains nothing on itself
    assert cells(verdicts, "mldcn")["gain of AUC"].text.startswith("+0.00950 [")
    assert verdicts.recommendation == "mldcn"
    assert "of the one model within all limits" in verdicts.reason
    assert "wide scores better (0.72100), but for training memory (87.9 %" in verdicts.reason


def test_a_cheaper_model_that_is_not_shown_to_differ_is_named(tmp_path):
    limits = {"device_memory_gb": 1.0, "memory_percent": 75, "broken_runs": 0}
    verdicts = judged(make_study(tmp_path, limits=limits))
    assert verdicts.recommendation == "mldcn"
    assert "the 2 models within all limits" in verdicts.reason
    assert "fewer FLOPs" not in verdicts.reason  # the baseline is shown to be worse

    def close(rows):
        far = {"mldcn": {0: 0.02, 1: -0.005}}
        return [replace(r, test={"auc": 0.7 + far.get(r.rival, {}).get(r.seed, 0.0)}) for r in rows]

    verdicts = judged(make_study(tmp_path, limits=limits, rows=close))
    assert verdicts.recommendation == "mldcn"
    assert "which is not shown to be a difference" in verdicts.reason
    assert verdicts.reason.endswith("dnn costs 50% fewer FLOPs and is not shown to be different in quality.")


def test_where_none_is_within_the_nearest_is_told(tmp_path):
    verdicts = judged(make_study(tmp_path, limits={**LIMITS, "memory_percent": 5}))
    assert verdicts.recommendation == "none"
    assert "Nearest is wide, but for training memory" in verdicts.reason


def test_a_limit_on_what_was_not_measured_keeps_a_model_out(tmp_path):
    def lacking(rows):
        return [replace(r, memory_bytes=None) if r.rival == "mldcn" else r for r in rows]

    verdicts = judged(make_study(tmp_path, rows=lacking))
    assert cells(verdicts, "mldcn")["training memory"].ok is None
    assert cells(verdicts, "mldcn")["training memory"].limit == "<= 75 %"
    assert verdicts.recommendation == "none"


def test_an_interval_across_the_limit_is_told(tmp_path):
    verdicts = judged(make_study(tmp_path, limits={**LIMITS, "gain": {"auc": 0.009}}))
    assert cells(verdicts, "mldcn")["gain of AUC"].ok is True
    assert cells(verdicts, "mldcn")["gain of AUC"].unsure
    assert any(
        note.startswith("mldcn: gain of AUC is within the limit by its estimate") for note in verdicts.notes
    )


def test_a_loss_has_a_gain_when_it_falls(tmp_path):
    def better(rows):
        return [replace(r, test={**r.test, "logloss": 0.29 if r.rival == "mldcn" else 0.3}) for r in rows]

    limits = {"gain": {"logloss": 0.005}}
    verdicts = judged(make_study(tmp_path, limits=limits, rows=better))
    assert cells(verdicts, "mldcn")["gain of Log loss"].ok is True
    assert cells(verdicts, "wide")["gain of Log loss"].ok is False


def test_hits_of_a_task_called_save_are_read_from_the_runs(tmp_path):
    study = make_study(tmp_path, limits={"gain": {"save/hit@3": 0.005}})
    for each in study.rows:
        folder = tmp_path / each.run
        folder.mkdir(parents=True)
        metrics = {"test": {"click": each.test, "save": {"hit@3": SAVES[each.rival][each.seed]}}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    verdicts = judged(study)
    found = cells(verdicts, "mldcn")["gain of Hit@3 (save)"]
    # Both seeds gain the same: no spread to make an interval of.
    assert (found.ok, found.limit, found.text) == (True, ">= 0.005", "+0.01000, +9.09 %")
    assert cells(verdicts, "wide")["gain of Hit@3 (save)"].text.startswith("-0.01000 [")
    assert cells(verdicts, "wide")["gain of Hit@3 (save)"].ok is False
    assert cells(verdicts, "wide")["deviation of Hit@3 (save)"].text == "0 over 2 seeds"


def test_copies_that_disagree_are_found(tmp_path):
    study = make_study(tmp_path, limits={"deviation": {"auc": 0.001}, "disagreement_percent": 10})
    labels = np.asarray([0, 1, 0, 1], np.float32)[:, None]
    zeros = np.zeros(4, np.int64)
    for each in study.rows:
        apart = 0.1 if each.rival == "mldcn" and each.seed else 0.0
        (tmp_path / each.run).mkdir(parents=True)
        with PredictionWriter(tmp_path / each.run / "predictions.arrow", ("click",)) as writer:
            scores = np.full((4, 1), 0.5 + apart, np.float32)
            writer.write(labels, scores, np.ones(4, np.float32), zeros, zeros)
    verdicts = judged(study)
    assert cells(verdicts, "mldcn")["mean |p_a - p_b|"].text == "0.1, 18.2 % of the mean"
    assert cells(verdicts, "mldcn")["mean |p_a - p_b|"].ok is False
    assert cells(verdicts, "dnn")["mean |p_a - p_b|"].ok is True
    assert cells(verdicts, "mldcn")["deviation of AUC"].ok is True
    assert cells(verdicts, "dnn")["deviation of AUC"].ok is False
    assert cells(verdicts, "dnn")["deviation of AUC"].text == "0.0014 over 2 seeds"


def test_the_gain_in_parts_of_the_test_rows(tmp_path):
    """A model that is better in the first half of the rows and worse in the second."""
    study = make_study(tmp_path, limits={"parts": 2, "part_gain": 0.0})
    labels = np.tile(np.asarray([0, 1], np.float32), 200)
    zeros = np.zeros(400, np.int64)
    generator = np.random.default_rng(0)
    noise = generator.normal(size=400).astype(np.float32)
    for each in study.rows:
        strength = {"dnn": (1, 1), "mldcn": (3, 0), "wide": (3, 3)}[each.rival]
        scores = 1 / (1 + np.exp(-noise - np.repeat(strength, 200) * labels))
        (tmp_path / each.run).mkdir(parents=True)
        with PredictionWriter(tmp_path / each.run / "predictions.arrow", ("click",)) as writer:
            writer.write(
                labels[:, None], scores[:, None].astype(np.float32), np.ones(400, np.float32), zeros, zeros
            )
    verdicts = judged(study)
    title = "AUC gain in 2 parts of the test rows"
    first, second = map(float, cells(verdicts, "mldcn")[title].text.split(", "))
    assert first > 0.1 > -0.1 > second
    assert cells(verdicts, "mldcn")[title].ok is False
    assert cells(verdicts, "wide")[title].ok is True
    assert cells(verdicts, "dnn")[title].text == "the baseline"


def test_runs_that_broke_down_count_and_hard_budgets_have_no_row(tmp_path):
    budgets = [{"name": "plain"}, {"name": "lr x10", "config": {"training": {"optimiser": {"lr": 0.01}}}}]
    limits = {"broken_runs": 0, "roll_backs": 1, "stress": ["lr x10"], "stress_broken_runs": 0}

    def at_both(rows):
        plain = [replace(r, point="plain", troubles=2 if r.rival == "wide" else 0) for r in rows]
        hard = [replace(r, point="lr x10", test={**r.test, "auc": r.test["auc"] - 0.01}) for r in rows]
        lost = [
            replace(r, diverged=True, test=None, valid={}) if r.rival == "mldcn" and r.seed else r
            for r in hard
        ]
        return plain + lost

    study = make_study(tmp_path, limits=limits, rows=at_both, match="none", budgets=budgets)
    verdicts = judged(study)
    assert {each.point for each in verdicts.rows} == {"plain"}
    assert cells(verdicts, "mldcn")["runs that broke down"].text == "0 of 2"
    assert cells(verdicts, "mldcn")["under stress"].ok is False
    assert cells(verdicts, "mldcn")["under stress"].text.startswith("lr x10: 1 of 2 broke down, AUC -0.01")
    assert cells(verdicts, "dnn")["under stress"].text == "lr x10: 0 of 2 broke down, AUC -0.0100"
    assert cells(verdicts, "wide")["roll-backs"].ok is False
    assert cells(verdicts, "wide")["roll-backs"].text == "4"
    assert verdicts.recommendation == "dnn at plain"
    assert "it is the baseline" in verdicts.reason


def test_a_rival_that_broke_down_altogether_is_in_the_table(tmp_path):
    def broken(rows):
        return [replace(r, diverged=True, test=None, valid={}) if r.rival == "wide" else r for r in rows]

    verdicts = judged(make_study(tmp_path, rows=broken))
    assert cells(verdicts, "wide")["runs that broke down"].text == "2 of 2"
    assert cells(verdicts, "wide")["gain of AUC"].text == "every run broke down"
    assert cells(verdicts, "wide")["gain of AUC"].ok is False


def test_latency_without_turns_has_no_interval_and_with_turns_has_one(tmp_path):
    study = make_study(tmp_path, limits={"latency_percent": 20}, latency_batches=[1])
    before = cells(judged(study), "wide")["latency, one row"]
    assert (before.text, before.ok) == ("+63.6 % (1.8 ms)", False)
    timed = Slowdown("wide", "as it is", ("dnn0", "wide0"), 1, 1.15, 1.1, 1.3, (1.0, 1.15), 40, "cpu", 1)
    (tmp_path / FILE).write_text(json.dumps([asdict(timed)]))
    after = cells(judged(study), "wide")["latency, one row"]
    assert (after.text, after.ok, after.unsure) == ("+15.0 % [+10.0, +30.0] (1.15 ms)", True, True)
    # Of models that have changed since, nothing is known.
    (tmp_path / FILE).write_text(json.dumps([asdict(replace(timed, hashes=("dnn0", "another")))]))
    assert cells(judged(study), "wide")["latency, one row"] == before


def test_hyper_parameters_are_those_set_tuned_varied_or_turned():
    expert = {"name": "mldcn", "rank": 8}
    study = recipe(
        rivals={
            "dnn": {"interaction": {"name": "dnn", "hidden": [32]}},
            "mmoe": {"interaction": {"name": "mmoe", "expert": expert}, "deep": {"hidden": [64]}},
        },
        tuning={
            "trials": 2,
            "space": {"training.optimiser.lr": {"low": 0.0005, "high": 0.01}},
            "own": {"mmoe": {"model.interaction.num_experts": [2, 3]}},
        },
    )
    trained = {"name": "mmoe", "num_experts": 2, "expert": {**expert, "mask": "full"}}
    found = hyperparameters(study, row(rival="mmoe", knob="width=11", interaction=trained))
    assert found.chosen == (
        "interaction.expert.rank",
        "deep.hidden",
        "interaction.num_experts",
        "interaction.width",
    )
    assert found.exposed == ("interaction.num_experts", "interaction.expert.rank", "interaction.expert.mask")
    assert hyperparameters(study, row(rival="dnn", knob="hidden=7")).chosen == ("interaction.hidden",)
    varied = recipe(
        budgets=[], tuning=None, vary={"model.interaction.rank": [8, 16], "model.deep.hidden": [[8]]}
    )
    assert hyperparameters(varied, row(rival="mldcn", knob=None)).chosen == (
        "interaction.num_layers",
        "interaction.rank",
        "deep.hidden",
    )


def test_options_of_parts_in_lists_count_each():
    layers = [[{"name": "dcnv2", "num_layers": 1}], [{"name": "dnn", "hidden": [8, 8]}]]
    study = recipe(rivals={"dnn": {"interaction": {"name": "dhen", "layers": layers}}}, tuning=None)
    found = hyperparameters(study, row(interaction={"name": "dhen", "layers": layers}, knob=None))
    assert found.exposed == ("interaction.layers.0.0.num_layers", "interaction.layers.1.0.hidden")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"memory_percent": 75}, "goes with device_memory_gb"),
        ({"memory_percnt": 75}, "limits.memory_percnt: no such key; did you mean 'memory_percent'"),
        ({"stress": ["lr x3"]}, "limits.stress 'lr x3' is none of the budgets"),
        ({"stress_broken_runs": 0}, "goes with stress"),
        ({"part_gain": 0.0}, "goes with parts"),
        ({"device_memory_gb": -1}, "limits.device_memory_gb"),
    ],
)
def test_wrong_limits_are_refused(limits, message):
    with pytest.raises(UserError, match=message):
        recipe(limits=limits)


def test_ratios_hold_on_a_machine_that_slows_down():
    generator = np.random.default_rng(1)
    drift = np.linspace(1.0, 3.0, 40)
    a = drift * np.exp(0.05 * generator.normal(size=40))
    b = 1.5 * drift * np.exp(0.05 * generator.normal(size=40))
    ratio, low, high = ratio_of(a, b)
    assert 1.45 < low < ratio < high < 1.55


def test_intervals_of_ratios_cover_the_truth():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        noise = np.exp(0.1 * generator.normal(size=(2, 40)))
        _, low, high = ratio_of(noise[0], 1.2 * noise[1])
        covered += low <= 1.2 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_both_are_called_in_every_round():
    calls = []
    first, second = time_in_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=4, seconds=0.0)
    assert len(first) == len(second) == 4
    assert "".join(calls) == "abab" + "ab" + "ba" + "ab" + "ba"
    assert all(math.isfinite(each) and each >= 0 for each in (*first, *second))


def test_models_are_timed_in_turns_with_the_baseline_once(folder):
    """Without training: a model's config is all that is timed."""
    small = recipe(tuning=None, limits={"latency_percent": 50})
    bench = Bench.open(small, None, folder)
    rows = []
    for rival in small.rivals:
        for job in bench.planner.final(rival, -1, {}):
            RunFolder.create(folder / job.folder, dump_config(job.config))
            names = {"rival": job.rival, "point": job.point.name, "run": job.folder}
            rows.append(row(**names, config_hash=job.config_hash))
    study = Study(small, tuple(rows), folder, FACTS)
    told = []
    found = measure_slowdowns(study, told.append)
    assert {(s.rival, s.point) for s in found} == {(r, p) for r in ("dnn", "mldcn") for p in ("20k", "40k")}
    assert told[0] == "dnn at 20k against the baseline"
    for each in found:
        assert 0 < each.low <= each.ratio <= each.high
        assert each.batch == 1
    assert read_slowdowns(study) == found
    again = []
    assert measure_slowdowns(study, again.append) == found
    assert not again
