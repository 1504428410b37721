import json
from pathlib import Path

import pytest
import torch
import yaml

from mldcn.errors import UserError
from mldcn.study import polynomials
from mldcn.study.least_squares import fit_least_squares
from mldcn.study.polynomial_models import Predictor, Rival
from mldcn.study.polynomial_targets import TARGETS, Target
from mldcn.study.polynomials import (
    Fit,
    PolynomialRecipe,
    fit_model,
    load_polynomials,
    plan,
    run_polynomials,
)

SMALL = {
    "kind": "polynomials",
    "title": "small",
    "seeds": [0, 1],
    "tables": {
        "second": {
            "title": "f2",
            "targets": ["f2"],
            "optimiser": {"lbfgs": {"rows": 200, "iterations": 120}, "starts": 2},
            "dtype": "float64",
            "rivals": {
                "dcn": {"title": "DCN", "interaction": {}, "cross": "rank_one", "paper": {"f2": [0.1]}},
                "dcnv2": {"title": "DCN-V2", "interaction": {"name": "dcnv2"}},
            },
        },
        "third": {
            "title": "order 3",
            "targets": ["order3"],
            "layers": [1, 2],
            "optimiser": {"adam": {"steps": 3, "batch_size": 8, "lr": 0.01}},
            "dtype": "float32",
            "rivals": {
                "dcnv2": {"title": "DCN-V2", "interaction": {"name": "dcnv2"}},
                "dnn": {
                    "title": "DNN",
                    "interaction": {"name": "dnn", "hidden": [1]},
                    "depth": "hidden",
                    "match": "hidden",
                },
            },
        },
    },
}


def recipe(tmp_path, content=SMALL):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_polynomials(path)


def target(name, seed=0):
    return TARGETS[name](torch.Generator().manual_seed(seed))


def here(todo, run, jobs, say):
    """``run_jobs`` without processes, which take seconds to start."""
    for fit in todo:
        say(run(fit, 1))


def rival(**options):
    return Rival(title="x", interaction={}, **options)


def test_a_study_reports_runs_once_and_goes_on(tmp_path, monkeypatch):
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(polynomials, "run_jobs", here)
        cells = run_polynomials(recipe(tmp_path), tmp_path / "out", say=said.append)
    assert said[0] == "12 runs, 0 finished before"
    dcn, dcnv2 = cells[:2]
    assert dcnv2["mean_rmse"] < 1e-13  # a full W fits any quadratic form
    assert dcn["mean_rmse"] > 0.1  # the form has rank 3, and 1 w^T gives rank 2 at most
    assert (dcn["parameters"], dcnv2["parameters"], dcn["paper"]) == (9, 15, 0.1)  # the paper's sizes
    assert dcn["rmse"][0] != dcn["rmse"][1]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "DCN-V2" in text
    assert "2 layers" in text
    assert (tmp_path / "out" / "results.html").exists()
    first = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(first) == cells

    lost = tmp_path / "out" / "runs" / "third" / "order3" / "dnn" / "2-1.json"
    lost.unlink()
    again = []
    run_polynomials(recipe(tmp_path), tmp_path / "out", say=again.append)
    assert again[0] == "12 runs, 11 finished before"
    assert len(again) == 2  # this one in a process of its own
    assert (tmp_path / "out" / "results.json").read_text() == first  # the same numbers by the same seeds

    changed = json.loads(json.dumps(SMALL))
    changed["tables"]["third"]["optimiser"]["adam"]["lr"] = 0.02
    with pytest.raises(UserError, match="of another recipe"):
        run_polynomials(recipe(tmp_path, changed), tmp_path / "out")
    monkeypatch.setattr(polynomials, "PROTOCOL", polynomials.PROTOCOL + 1)
    with pytest.raises(UserError, match="another version"):
        run_polynomials(recipe(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tilte": "x"}, "tilte"),
        ({"tables": {}}, "tables"),
        ({"tables": {"a": {**SMALL["tables"]["second"], "reference": "mldcn"}}}, "none of the rivals"),
        ({"tables": {"a": {**SMALL["tables"]["second"], "targets": ["f9"]}}}, "targets"),
        (
            {"tables": {"a": {**SMALL["tables"]["second"], "optimiser": {}}}},
            "needs adam, least_squares or lbfgs",
        ),
        (
            {"tables": {"a": {**SMALL["tables"]["third"], "optimiser": {"adam": {}, "starts": 2}}}},
            "starts are compared on the rows of least_squares or lbfgs",
        ),
    ],
)
def test_a_recipe_is_strict(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        recipe(tmp_path, {**SMALL, **change})


def test_recipes_of_other_kinds_are_left_to_others(tmp_path):
    assert recipe(tmp_path, {"title": "x", "dataset": "pinads"}) is None


def test_targets_by_hand():
    x = torch.tensor([[0.5, -1.0, 0.25]])
    assert target("f2").function(x).item() == pytest.approx(0.25 - 0.05 - 0.25 + 0.00625)
    x = torch.tensor([[0.5, -1.0, 0.25, 1.0]])
    assert target("f1").function(x).item() == pytest.approx(0.5 * 0.75)
    f3 = target("f3")
    x = torch.rand(5, 100, dtype=torch.float64)
    torch.testing.assert_close(f3.function(3 * x), 9 * f3.function(x))  # homogeneous of order 2
    assert not torch.equal(f3.function(x), target("f3", seed=1).function(x))
    for order in (3, 4):
        polynomial = target(f"order{order}").function
        x = torch.rand(5, 50, dtype=torch.float64)
        torch.testing.assert_close(polynomial(2 * x), 2**order * polynomial(x))
    # The same rows again, so that what differs is the noise.
    combined = target("combined")
    x, y = combined.draw(50_000, torch.Generator().manual_seed(1), torch.float64)
    assert (y - combined.function(x)).std().item() == pytest.approx(0.01, rel=0.02)


def test_cross_layers_taken_apart():
    x = torch.rand(4, 3, dtype=torch.float64)
    for kind, size in (("bare", 2 * 9 + 3), ("bias", 2 * 9 + 2 * 3 + 3), ("rank_one", 2 * 3 + 2 * 3 + 3)):
        model = Predictor(rival(cross=kind), 3, 2).double()
        assert model.size == size
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.rand_like(parameter) * parameter.requires_grad
            out = x
            for linear, bias in zip(model.interaction.linears, model.interaction.biases, strict=True):
                weight = linear.weight.expand(3, 3)
                crossed = x * (out @ weight.T + bias)
                out = crossed + out if kind == "rank_one" else crossed
            torch.testing.assert_close(model(x), out @ model.head.weight[0])
        if kind == "bare":  # homogeneous: two layers are of order 3
            torch.testing.assert_close(model(2 * x), 8 * model(x))


def test_widths_are_matched_to_the_reference(tmp_path):
    study = recipe(tmp_path)
    fits = plan(study, "third", study.tables["third"], tmp_path)
    hidden = {fit.layers: fit.rival.interaction["hidden"] for fit in fits if fit.name == "dnn"}
    assert hidden == {1: [50], 2: [50]}  # a DNN as wide as the input is as large as DCN-V2
    for layers in (1, 2):
        one, other = (fit for fit in fits if fit.layers == layers and fit.seed == 0)
        assert Predictor(one.rival, 50, layers).size == Predictor(other.rival, 50, layers).size


def test_mldcn_fits_order_three_with_one_layer(tmp_path, monkeypatch):
    """Its mask multiplies its projection, so that one layer is a cubic; one layer of DCN-V2 is a quadratic."""
    monkeypatch.setitem(TARGETS, "cubic", lambda generator: Target(4, lambda x: x[:, 0] * x[:, 1] * x[:, 2]))
    table = PolynomialRecipe.model_validate_json(json.dumps(SMALL)).tables["second"]
    options = polynomials.Optimiser(lbfgs=polynomials.Lbfgs(rows=300, iterations=150), starts=3)
    table = table.model_copy(update={"optimiser": options})
    errors = {}
    for name, interaction in (
        ("mldcn", {"name": "mldcn", "norm": "none", "activation": "identity", "rank": 1, "mask_ratio": 1.0}),
        ("dcnv2", {"name": "dcnv2"}),
    ):
        fit = Fit("cubic", 1, 0, name, Rival(title=name, interaction=interaction), table, tmp_path / "none")
        errors[name] = fit_model(fit)["rmse"]
    assert errors["mldcn"] < 1e-6
    assert errors["dcnv2"] > 0.05


def test_the_repository_s_recipe_is_valid():
    study = load_polynomials(Path(__file__).parents[2] / "recipes" / "dcnv2_section6.yaml")
    assert study is not None
    for key, table in study.tables.items():
        shallow = table.model_copy(update={"layers": table.layers[:1], "targets": table.targets[:1]})
        assert len(plan(study, key, shallow, Path("nowhere"))) == len(table.rivals) * len(study.seeds)


def test_heads_start_at_signs():
    torch.manual_seed(0)
    head = Predictor(rival(cross="bare"), 64, 1, head=2.0).head.weight
    assert set(head.flatten().tolist()) == {-2.0, 2.0}


def test_adam_comes_before_lbfgs(tmp_path):
    """Adam alone stays far from the minimum that L-BFGS then reaches, and the two draw different rows."""
    second = PolynomialRecipe.model_validate_json(json.dumps(SMALL)).tables["second"]
    adam = polynomials.Adam(steps=20, batch_size=32, lr=0.01)
    errors = []
    for lbfgs in (None, polynomials.Lbfgs(rows=200, iterations=100)):
        table = second.model_copy(update={"optimiser": polynomials.Optimiser(adam=adam, lbfgs=lbfgs)})
        model = Rival(title="x", interaction={"name": "dcnv2"})
        errors.append(fit_model(Fit("f2", 1, 0, "dcnv2", model, table, tmp_path / "none"))["rmse"])
    assert errors[0] > 1e-2
    assert errors[1] < 1e-12


def test_the_best_of_several_starts_of_least_squares_counts(tmp_path, monkeypatch):
    """The start that fits its rows best, not the last one."""
    second = PolynomialRecipe.model_validate_json(json.dumps(SMALL)).tables["second"]
    steps, asked = iter((1, 40, 1)), []

    def fit(model, x, y, iterations, *, damping):
        asked.append((len(x), iterations))
        return fit_least_squares(model, x, y, next(steps), damping=damping)

    monkeypatch.setattr(polynomials, "fit_least_squares", fit)
    monkeypatch.setattr(polynomials, "EXACT", 0.0)  # else the second start would be the last
    stage = polynomials.LeastSquares(rows=200, iterations=40)
    options = polynomials.Optimiser(least_squares=(stage,), starts=3)
    table = second.model_copy(update={"optimiser": options})
    model = Rival(title="x", interaction={"name": "dcnv2"})
    found = fit_model(Fit("f2", 1, 0, "dcnv2", model, table, tmp_path / "none"))["rmse"]
    assert asked == [(200, 40)] * 3
    assert found < 1e-6


def test_the_best_start_alone_goes_on_to_the_last_stage(tmp_path, monkeypatch):
    second = PolynomialRecipe.model_validate_json(json.dumps(SMALL)).tables["second"]
    steps, fitted = iter((1, 40, 1, 0)), []

    def fit(model, x, y, iterations, *, damping):
        fitted.append((model, len(x), damping))
        return fit_least_squares(model, x, y, next(steps), damping=damping) + len(fitted)

    monkeypatch.setattr(polynomials, "fit_least_squares", fit)
    monkeypatch.setattr(polynomials, "EXACT", 0.0)
    stages = tuple(polynomials.LeastSquares(rows=rows, iterations=40) for rows in (200, 500))
    table = second.model_copy(update={"optimiser": polynomials.Optimiser(least_squares=stages, starts=3)})
    model = Rival(title="x", interaction={"name": "dcnv2"})
    fit_model(Fit("f2", 1, 0, "dcnv2", model, table, tmp_path / "none"))
    assert [rows for _, rows, _ in fitted] == [200, 200, 200, 500]
    last, _, damping = fitted[-1]
    assert last is fitted[1][0]
    assert 2 <= damping < 3  # that of its own first stage


def test_a_study_stopped_midway_reports_what_it_has(tmp_path, monkeypatch):
    def some(todo, run, jobs, say):
        here(todo[:3], run, jobs, say)
        raise KeyboardInterrupt

    monkeypatch.setattr(polynomials, "run_jobs", some)
    with pytest.raises(KeyboardInterrupt):
        run_polynomials(recipe(tmp_path), tmp_path / "out")
    cells = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [len(cell["rmse"]) for cell in cells] == [1, 1, 1]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "Not finished: 3 of 12 runs" in text
    assert "| DCN-V2 |" in text
    assert "hidden" not in text  # no run of the DNN is there, and no row invents one
