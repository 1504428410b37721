"""What a study's rows and predictions show: closed cases, unfinished studies, and no more than there is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from study_cases import recipe, row

from mldcn.comparison import PredictionWriter, read_predictions
from mldcn.errors import UserError
from mldcn.metrics import auc, delong, gauc, logloss, paired_t
from mldcn.metrics.replicates import holm
from mldcn.study.contrasts import read_tested
from mldcn.study.rows import Facts, Study
from mldcn.study.scaling import interpolation, pareto, saturation, slope_factors
from mldcn.study.statistics import spread, summarise

FACTS = Facts("pinads", {}, {}, 3, "click", "click/auc", True, 1, 1, "cpu", "", {}, 0.0)
POINTS = {"20k": 20_000, "40k": 40_000}
# How much of the truth a rival does not see, by point.
NOISE = {"dnn": (1.0, 0.95), "mldcn": (0.6, 0.4), "twin": (1.0, 0.95)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def write_run(folder, labels, scores, user, request=None):
    folder.mkdir(parents=True)
    with PredictionWriter(folder / "predictions.arrow", ("click",)) as writer:
        for part in np.array_split(np.arange(len(labels)), 3):
            columns = (labels[part][:, None], scores[part][:, None])
            ids = np.zeros(len(labels), np.int64) if request is None else request
            writer.write(*columns, np.ones(len(part), np.float32), user[part], ids[part])


def make_study(out, rivals=tuple(NOISE), seeds=(0, 1, 2), rows=3000, users=300, **changes):
    """Rivals that see a truth through noise; each seed has noise of its own."""
    generator = np.random.default_rng(0)
    user = generator.integers(1, users + 1, rows)
    truth = generator.normal(size=rows) + generator.normal(size=users + 1)[user]
    labels = (generator.random(rows) < sigmoid(truth)).astype(np.float32)
    common = generator.normal(size=rows)
    found = []
    for rival in rivals:
        for k, (point, flops) in enumerate(POINTS.items()):
            for seed in seeds:
                noise = 0.9 * common + 0.5 * np.random.default_rng([seed, k, len(rival)]).normal(size=rows)
                scores = sigmoid(truth + NOISE[rival][k] * noise).astype(np.float32)
                run = f"runs/{rival}/{point}/seed-{seed}"
                write_run(out / run, labels, scores, user)
                metrics = {"auc": auc(labels, scores), "logloss": logloss(labels, scores)}
                found.append(
                    row(
                        rival=rival,
                        point=point,
                        budget=flops,
                        seed=seed,
                        flops={"embedding": 7, "interaction": flops, "deep": 0, "heads": 0},
                        parameters={"dense": flops // 2, "embedding": 1},
                        test=metrics,
                        run=run,
                    )
                )
    return Study(small(rivals, seeds, **changes), tuple(found), out, FACTS)


def small(rivals=("dnn", "mldcn"), seeds=(0, 1, 2), **changes):
    named = {name: {"interaction": {"name": "dnn", "hidden": [8]}} for name in rivals}
    plain = {"rivals": named, "seeds": list(seeds), "tuning": None}
    return recipe(**{**plain, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def summary(study):
    return summarise(study)


def values(study, rival, point, metric="auc"):
    return [each.test[metric] for each in study.at(rival, point)]


def test_gains_are_paired_over_seeds_as_the_t_test_says(study, summary):
    gain = summary.gain("mldcn", "40k")
    expected = paired_t(values(study, "dnn", "20k"), values(study, "mldcn", "40k"))
    assert summary.baseline == ("dnn", "20k")
    assert gain.seeds == (0, 1, 2)
    assert gain.over_seeds.value == pytest.approx(expected.delta)
    assert gain.over_seeds.low == pytest.approx(expected.low)
    assert gain.over_seeds.high == pytest.approx(expected.high)
    assert gain.over_seeds.p_value == pytest.approx(expected.p_value)
    assert gain.over_seeds.free == 2
    assert len(summary.gains) == 2 * 5  # two metrics, all cells but the baseline


def test_over_rows_too_there_is_more_noise_and_users_are_drawn(summary):
    gain = summary.gain("mldcn", "40k")
    assert summary.unit == "user"
    assert gain.over_both.known
    assert gain.over_both.error > gain.over_seeds.error
    assert gain.over_both.value == gain.over_seeds.value
    assert gain.verdict == "better"
    assert gain.estimate is gain.over_both


def test_a_gain_of_log_loss_is_its_drop(study, summary):
    gain = summary.gain("mldcn", "40k", "logloss")
    drop = np.mean(values(study, "dnn", "20k", "logloss")) - np.mean(values(study, "mldcn", "40k", "logloss"))
    assert drop > 0
    assert gain.over_both.value == pytest.approx(drop)
    assert gain.verdict == "better"


def test_the_baseline_itself_has_no_gain_and_others_at_its_point_are_pairs(summary):
    assert summary.gain("dnn", "20k") is None
    at = {(gain.a[0], gain.b[0]) for gain in summary.pairs if gain.metric == "auc" and gain.point == "20k"}
    assert at == {("dnn", "mldcn"), ("dnn", "twin"), ("mldcn", "twin")}
    assert all(gain.a[1] == gain.b[1] for gain in summary.pairs)


def test_p_values_are_corrected_within_a_family(summary):
    for metric in ("auc", "logloss"):
        family = [gain for gain in summary.gains if gain.metric == metric]
        expected = holm([gain.estimate.p_value for gain in family])
        assert [gain.p_holm for gain in family] == pytest.approx(expected)
        at = [gain for gain in summary.pairs if (gain.metric, gain.point) == (metric, "40k")]
        assert [gain.p_holm for gain in at] == pytest.approx(holm([gain.estimate.p_value for gain in at]))
        assert len(at) == 3


def test_equal_rivals_differ_by_nothing_for_sure(study):
    twins = [replace(each, rival="twin") for each in study.rows if each.rival == "dnn"]
    rows = [each for each in study.rows if each.rival != "twin"] + twins
    gain = summarise(replace(study, rows=tuple(rows))).gain("twin", "20k")
    assert (gain.estimate.low, gain.estimate.high, gain.p_holm) == (0.0, 0.0, 1.0)
    assert gain.verdict == "no worse"


def test_delong_is_of_the_best_two_rivals_on_the_first_seed(study, summary):
    found = {each.point: each for each in summary.one_seed}
    assert set(found) == set(POINTS)
    assert found["40k"].b == "mldcn"
    assert found["40k"].seed == 0
    with_labels = [columns_of(study, rival, "40k") for rival in (found["40k"].a, "mldcn")]
    expected = delong(with_labels[0][0], with_labels[0][1], with_labels[1][1])
    assert found["40k"].difference == expected


def columns_of(study, rival, point, seed=0):
    table = read_predictions(study.out / study.at(rival, point)[seed].run / "predictions.arrow")
    return table["y_click"].to_numpy(), table["p_click"].to_numpy()


def test_power_is_of_the_pooled_spread_and_says_whether_the_margin_could_be_seen(study, summary):
    power = summary.power[0]
    gains = [np.var(gain.by_seed, ddof=1) for gain in summary.gains if gain.metric == "auc"]
    assert power.deviation == pytest.approx(math.sqrt(np.mean(gains)))
    assert power.corrected > power.over_both
    assert power.seen is False
    assert "0.001 could not have seen" not in power.sentence
    assert "a gain of 0.001 could not have been seen" in power.sentence
    seen = summarise(replace(study, recipe=small(tuple(NOISE), margin=0.5))).power[0]
    assert seen.seen
    assert "a gain of 0.5 could have been seen" in seen.sentence
    assert summary.power[1].seen is None  # the margin is of the first metric


def test_a_front_holds_what_nothing_cheaper_beats(summary):
    fronts = {front.cost: front.members for front in summary.fronts}
    assert set(fronts) == {"flops", "parameters"}
    assert fronts["flops"] == (("mldcn", "20k"), ("mldcn", "40k"))


def test_everything_is_the_same_the_second_time(study, summary):
    assert summarise(study) == summary


def test_one_seed_has_gains_but_no_intervals_and_says_so(study):
    rows = tuple(each for each in study.rows if each.seed == 1)
    found = summarise(replace(study, rows=rows, recipe=small(tuple(NOISE), seeds=(1,))))
    gain = found.gain("mldcn", "40k")
    assert gain.estimate.value > 0
    assert gain.estimate.low is None
    assert "one seed" in gain.estimate.why
    assert (gain.p_holm, gain.verdict) == (None, "unknown")
    assert any("One seed a model" in note for note in found.notes)
    assert "fewer than two seeds" in found.power[0].sentence
    assert found.scaling[0].saturation is None
    assert "one seed" in found.scaling[0].why
    assert found.standing("dnn", "20k").test["auc"].deviation is None


def test_no_rows_are_a_summary_too(study):
    found = summarise(replace(study, rows=()))
    assert [found.gains, found.pairs, found.scaling, found.fronts, found.matched] == [()] * 5
    assert len(found.standings) == 6
    assert found.standing("dnn", "20k").missing == (0, 1, 2)
    assert any("baseline" in note for note in found.notes)


def test_what_is_missing_or_broke_down_is_named_and_seeds_in_common_are_paired(study):
    rows = [each for each in study.rows if (each.rival, each.point, each.seed) != ("mldcn", "40k", 2)]
    rows = [
        replace(each, diverged=True, test=None)
        if (each.rival, each.point, each.seed) == ("dnn", "20k", 0)
        else each
        for each in rows
    ]
    found = summarise(replace(study, rows=tuple(rows)))
    assert found.gain("mldcn", "40k").seeds == (1,)
    assert found.gain("mldcn", "20k").seeds == (1, 2)
    assert found.standing("dnn", "20k").diverged == (0,)
    assert found.standing("mldcn", "40k").missing == (2,)
    assert any("mldcn at 40k: 1 of 3 runs are not finished (seeds 2)" in note for note in found.notes)
    assert any("dnn at 20k: broke down with seeds 0" in note for note in found.notes)


def test_trials_of_the_tuning_count_for_nothing(study, summary):
    trial = replace(study.rows[0], stage="tune", trial=3, seed=1000, test=None)
    assert summarise(replace(study, rows=(*study.rows, trial))) == summary


def test_without_predictions_intervals_are_over_seeds_alone(study, tmp_path):
    found = summarise(replace(study, out=tmp_path))
    gain = found.gain("mldcn", "40k")
    assert not gain.over_both.known
    assert "not at hand" in gain.over_both.why
    assert gain.estimate is gain.over_seeds
    assert gain.p_holm is not None
    assert found.unit is None
    assert found.one_seed == ()
    assert "on these very test rows" in found.power[0].sentence
    kind = "intervals on the baseline hold the chance of seeds only: predictions are not at hand"
    assert found.notes == (f"10 of 10 {kind} (runs/dnn/40k/seed-0).",)


def test_runs_on_other_rows_have_no_interval_over_rows(tmp_path):
    study = make_study(tmp_path, ("dnn", "mldcn"))
    rows = list(study.rows)
    for i, each in enumerate(rows):
        if each.rival == "mldcn" and each.point == "40k":
            labels, scores = columns_of(study, "dnn", "20k")
            keep = np.arange(len(labels)) > 100
            run = f"{each.run}-other"
            write_run(tmp_path / run, labels[keep], scores[keep], np.ones(keep.sum(), np.int64))
            test = {"auc": auc(labels[keep], scores[keep]), "logloss": logloss(labels[keep], scores[keep])}
            rows[i] = replace(each, run=run, test=test)
    found = summarise(replace(study, rows=tuple(rows)))
    assert "not tested on the same rows" in found.gain("mldcn", "40k").over_both.why
    assert found.gain("mldcn", "20k").over_both.known
    assert "40k" not in {each.point for each in found.one_seed}


def test_predictions_that_are_not_the_rows_are_not_used(study):
    rows = tuple(replace(each, test={**each.test, "auc": each.test["auc"] - 0.01}) for each in study.rows)
    found = summarise(replace(study, rows=rows))
    assert "another auc than their row" in found.gain("mldcn", "40k").over_both.why
    assert found.gain("mldcn", "40k", "logloss").over_both.known


def test_metrics_by_group_are_bootstrapped_others_are_not(study):
    rows = []
    for each in study.rows:
        labels, scores = columns_of(study, each.rival, each.point, each.seed)
        user = read_predictions(study.out / each.run / "predictions.arrow")["user"].to_numpy()
        more = {
            "calibration": 1.0,
            "gauc": gauc(labels, scores, user),
            "pr_auc": each.test["auc"],
            "hit@3": 1.0,
        }
        rows.append(replace(each, test={**each.test, **more}))
    changed = small(tuple(NOISE), metrics=["auc", "calibration", "gauc", "pr_auc", "hit@3"])
    found = summarise(replace(study, rows=tuple(rows), recipe=changed))
    assert {gain.metric for gain in found.gains} == {
        "auc",
        "gauc",
        "pr_auc",
        "hit@3",
    }  # calibration has no side
    assert found.gain("mldcn", "40k", "gauc").over_both.known
    for metric in ("pr_auc", "hit@3"):  # the log names no request
        gain = found.gain("mldcn", "40k", metric)
        assert "is not known" in gain.over_both.why


def test_a_metric_that_one_run_lacks_leaves_out_that_seed(study):
    rows = list(study.rows)
    rows[0] = replace(rows[0], test={"auc": math.nan, "logloss": 0.3})
    found = summarise(replace(study, rows=tuple(rows)))
    assert found.gain("mldcn", "40k").seeds == (1, 2)
    assert "auc" not in found.standing("dnn", "20k").test


def line(rival, metrics, flops=(1000, 10_000, 100_000, 1_000_000), latency=None, **more):
    """Rows of one rival whose AUC by seed is given at points that cost ten times more each."""
    found = []
    for k, by_seed in enumerate(metrics):
        for seed, value in enumerate(by_seed):
            found.append(
                row(
                    rival=rival,
                    point=f"p{k}",
                    seed=seed,
                    flops={"embedding": 0, "interaction": flops[k], "deep": 0, "heads": 0},
                    test={"auc": value, "logloss": 1 - value},
                    latency_ms={1: {"median": latency[k], "p99": 9.0}} if latency else None,
                    run=f"runs/{rival}/{k}/{seed}",
                    **more,
                )
            )
    return found


def lined(tmp_path, *lines, points=4):
    budgets = [{"flops": 10 ** (3 + k), "name": f"p{k}"} for k in range(points)]
    rows = tuple(each for rows in lines for each in rows)
    names = tuple(dict.fromkeys(each.rival for each in rows))
    return Study(small(names, seeds=range(3), baseline=names[0], budgets=budgets), rows, tmp_path, FACTS)


def test_a_slope_is_gain_per_decade_by_seed(tmp_path):
    slopes, starts = (0.010, 0.012, 0.011), (0.700, 0.702, 0.698)
    metrics = [[a + b * k for a, b in zip(starts, slopes, strict=True)] for k in range(4)]
    scaling = summarise(lined(tmp_path, line("dnn", metrics))).scaling[0]
    expected = stats.ttest_1samp(slopes, 0.0)
    assert scaling.slope.value == pytest.approx(0.011)
    assert (scaling.slope.low, scaling.slope.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert scaling.per_doubling == pytest.approx(0.011 * math.log10(2))
    assert scaling.points == ("p0", "p1", "p2", "p3")
    assert scaling.saturation == "p3"
    assert not scaling.saturates
    assert all(step.shown and not step.flat for step in scaling.steps)


def test_saturation_is_the_first_point_that_none_behind_it_beats(tmp_path):
    seeds = np.array([0.0, 0.002, -0.002])
    wobble = np.array([[0, 0, 0], [1, -1, 0], [-1, 0, 1], [0, 1, -1]]) * 1e-5
    levels = np.array([0.70, 0.71, 0.72, 0.72001])
    found = summarise(lined(tmp_path, line("dnn", levels[:, None] + seeds + wobble))).scaling[0]
    assert (found.saturation, found.saturates, found.sure) == ("p2", True, True)
    assert [step.shown for step in found.steps] == [True, True, False]
    noisy = summarise(lined(tmp_path, line("dnn", levels[:, None] + 1500 * wobble))).scaling[0]
    assert (noisy.saturation, noisy.sure) == ("p0", False)  # nothing shown, nothing ruled out


def test_a_late_gain_is_not_saturation(tmp_path):
    assert saturation(4, {(0, 1), (1, 3)}) == 2
    assert saturation(4, {(0, 3), (1, 3), (2, 3)}) == 3
    assert saturation(3, set()) == 0


def test_slices_of_the_log_have_no_slope(tmp_path):
    rows = line("dnn", [[0.7, 0.71]] * 2, flops=(1000, 1010))
    assert summarise(lined(tmp_path, rows, points=2)).scaling == ()


def test_gains_at_equal_latency_lie_between_points(tmp_path):
    base = line("dnn", [[0.70, 0.701, 0.702]] * 2, latency=(1.0, 10.0))
    other = line(
        "mldcn", [[0.71, 0.712, 0.713], [0.73, 0.731, 0.732]], latency=(1.0 / math.sqrt(10), math.sqrt(10))
    )
    found = [
        each
        for each in summarise(lined(tmp_path, base, other, points=2)).matched
        if each.column == "latency@1"
    ]
    assert len(found) == 1  # nothing of mldcn is as slow as dnn at p1
    assert (found[0].rival, found[0].at, found[0].between) == ("mldcn", "p0", ("p0", "p1"))
    by_seed = np.array([0.02, 0.0205, 0.0205])
    assert found[0].over_seeds.value == pytest.approx(by_seed.mean())
    assert found[0].over_seeds.error == pytest.approx(by_seed.std(ddof=1) / math.sqrt(3))


def test_values_of_a_key_are_points_of_a_line(tmp_path):
    changed = small(
        ("dnn", "mldcn"),
        budgets=[],
        vary={"model.interaction.rank": [64, 16, 32], "model.embedding.dropout": [0.1, 0.2]},
    )
    rows = [
        row(rival="dnn", point="as it is", seed=s, test={"auc": 0.7 + s / 1000, "logloss": 0.6})
        for s in range(3)
    ]
    for name, axis, level in (("rank=16", 16.0, 0.71), ("rank=32", 32.0, 0.72), ("rank=64", 64.0, 0.72)):
        flops = {"embedding": 0, "interaction": int(1000 * axis), "deep": 0, "heads": 0}
        for s, wobble in enumerate({16.0: (0, 0, 0), 32.0: (1, -1, 0), 64.0: (-1, 0, 1)}[axis]):
            test = {"auc": level + s / 1000 + 1e-5 * wobble, "logloss": 0.6}
            rows.append(row(rival="mldcn", point=name, axis=axis, seed=s, flops=flops, test=test))
    found = summarise(Study(changed, tuple(rows), tmp_path, FACTS))
    assert [s.key for s in found.scaling] == ["model.interaction.rank"]  # one dropout alone is no line
    assert found.scaling[0].points == ("rank=16", "rank=32", "rank=64")
    assert found.scaling[0].saturation == "rank=32"
    assert found.baseline == ("dnn", "as it is")
    assert found.gain("mldcn", "rank=16").over_seeds.value == pytest.approx(0.01, abs=1e-4)


def test_the_share_of_what_can_be_attained_is_above_chance(tmp_path):
    rows = line("dnn", [[0.7, 0.8, 0.75]], attainable={"auc": 0.9})
    found = summarise(lined(tmp_path, rows, points=1)).standing("dnn", "p0")
    assert found.attainable == pytest.approx(0.25 / 0.4)
    assert found.test["auc"] == spread([0.7, 0.8, 0.75])
    assert found.test["auc"].deviation == pytest.approx(0.05)


def test_pareto_keeps_ties_and_leaves_out_what_costs_more_for_no_more():
    assert pareto([3, 1, 2, 2], [5, 1, 4, 4]) == [1, 2, 3, 0]
    assert pareto([1, 2], [5, 5]) == [0]
    assert pareto([1, 1], [4, 5]) == [1]
    assert pareto([], []) == []


def test_interpolation_is_linear_in_the_logarithm_and_never_beyond():
    assert interpolation({"a": 1.0, "b": 1000.0, "c": 10.0}, 100.0) == pytest.approx({"c": 0.5, "b": 0.5})
    assert interpolation({"a": 1.0, "b": 10.0}, 10.0) == {"b": 1.0}
    assert interpolation({"a": 1.0, "b": 10.0}, 0.5) is None
    assert interpolation({}, 1.0) is None


def test_slope_factors_are_least_squares():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 7))
    assert np.dot(slope_factors(list(x)), y) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_rows_whose_user_is_not_known_stand_alone_and_requests_are_drawn_without_users(tmp_path):
    generator = np.random.default_rng(0)
    labels, scores = (generator.random((2, 300)) > 0.5).astype(np.float32)
    scores = (0.25 + 0.5 * scores).astype(np.float32)
    none = np.zeros(300, np.int64)
    groups = {}
    for name, user, request in (
        ("user", np.repeat([0, 7], 150), none),
        ("request", none, np.repeat(np.arange(1, 11), 30)),
        ("row", none, none),
    ):
        write_run(tmp_path / name, labels, scores, user, request)
        found = read_tested(tmp_path / name / "predictions.arrow", "click")
        assert found.unit == name
        groups[name] = np.count_nonzero(found.sums.below["auc"])
    assert groups["request"] == 10
    assert 140 < groups["user"] <= 151  # two ids may have one hash
    assert 280 < groups["row"] <= 300
    assert read_tested(tmp_path / "row" / "predictions.arrow", "save") is None
    assert read_tested(tmp_path / "nothing", "click") is None


def test_damaged_predictions_are_an_error_that_names_the_file(tmp_path):
    study = make_study(tmp_path, ("dnn", "mldcn"), seeds=(0, 1), rows=300)
    (tmp_path / study.rows[0].run / "predictions.arrow").write_bytes(b"no arrow")
    with pytest.raises(UserError, match="damaged"):
        summarise(study)
