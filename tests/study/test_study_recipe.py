import copy

import pytest
import yaml
from study_cases import RECIPE, recipe

from mldcn import interactions
from mldcn.config import read_yaml
from mldcn.errors import UserError
from mldcn.study import load_recipe
from mldcn.study.recipe import AS_IS, nested, overlay

VARY = {
    "budgets": [],
    "tuning": None,
    "vary": {"model.interaction.rank": [8, 16], "model.deep.hidden": [[], [8, 4]]},
}


def test_points_are_budgets():
    points = recipe().points("dnn")
    assert [(p.name, p.budget) for p in points] == [("20k", 20_000), ("40k", 40_000)]
    assert points[1].config == {"model": {"embedding": {"dim": 6}}}
    assert recipe().tuning_point("dnn") == points[0]  # the middle one, the lower of two
    assert recipe().baseline_point() == points[0]
    assert recipe(baseline_budget="40k").baseline_point() == points[1]
    three = recipe(budgets=[{"flops": 3e6}, {"flops": 1.5e6}, {"flops": 2e9, "name": "large"}])
    assert [p.name for p in three.points("dnn")] == ["3M", "1.5M", "large"]
    assert three.tuning_point("dnn").name == "3M"
    assert three.baseline_point().name == "1.5M"


def test_without_budgets_every_rival_is_as_it_is():
    assert [p.name for p in recipe(budgets=[], tuning=None).points("dnn")] == [AS_IS]


def test_variants_change_one_key_of_one_rival():
    points = recipe(**VARY).points("mldcn")
    assert [p.name for p in points] == ["rank=8", "rank=16", "hidden=", "hidden=8-4"]
    assert [p.axis for p in points] == [8.0, 16.0, None, None]
    assert points[1].config == {"model": {"interaction": {"rank": 16}}}
    assert points[1].key == "model.interaction.rank"
    assert [p.name for p in recipe(**VARY).points("dnn")] == [AS_IS]
    # Where the baseline itself is varied, gains are over it as it is.
    alone = recipe(**VARY, rivals={"mldcn": RECIPE["rivals"]["mldcn"]}, baseline="mldcn")
    assert [p.name for p in alone.points("mldcn")][:2] == [AS_IS, "rank=8"]


def test_settings_of_a_name_stand_for_slices_of_a_log():
    days = [{"name": day, "config": {"data": {"train": [f"{day}.csv"]}}} for day in ("monday", "tuesday")]
    assert [p.name for p in recipe(match="none", budgets=days).points("dnn")] == ["monday", "tuesday"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "wukong"}, r"baseline 'wukong' is none of the rivals \(dnn, mldcn\)"),
        ({"seed": 1}, "did you mean 'seeds'"),
        ({"seeds": [1, 1]}, "one is named twice"),
        ({"budgets": [{"parameters": 5}]}, "with match: flops each needs flops"),
        ({"match": "none"}, "with match: none each needs no amount"),
        ({"match": "none", "budgets": [{}]}, "each needs a name"),
        ({"budgets": [{"flops": 1}, {"flops": 1}]}, "two have one name"),
        ({"baseline_budget": "1M"}, r"baseline_budget '1M' is none of the budgets \(20k, 40k\)"),
        ({"vary": {"a": [1]}}, "vary and budgets"),
        ({"varied": "dnn"}, "there is nothing in vary"),
        ({**VARY, "rivals": {**RECIPE["rivals"], "fm": {}}}, "name the rival to vary"),
        ({"tuning": {"trials": 1, "own": {"fm": {}}}}, "'fm' is none of the rivals"),
        ({"tuning": {"trials": 1, "seed": 0}}, "one of the final seeds, whose luck would be chosen"),
        ({"tuning": {"trials": 1, "budget": "9k"}}, "tuning.budget '9k' is none of the budgets"),
        ({"tuning": {"trials": 1, "space": {"a": {"low": 2, "high": 1}}}}, "low 2.0 is above high 1.0"),
        ({"tuning": {"trials": 1, "space": {"a": {"low": 0, "high": 1, "log": True}}}}, "begins above 0"),
        (
            {**VARY, "tuning": {"trials": 1, "space": {"model.deep.hidden": [[1]]}}},
            "both varied and tuned",
        ),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, changes, message):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, **changes}))
    with pytest.raises(UserError, match=message):
        load_recipe(file)


def test_shipped_recipes_load_and_their_rivals_can_be_built(request):
    found = [f for f in (request.config.rootpath / "recipes").glob("*.yaml") if "kind" not in read_yaml(f)]
    assert found
    for file in found:
        for rival in load_recipe(file).rivals.values():
            interactions.parse(rival["interaction"])


def test_a_recipe_says_what_it_said_before_it_was_written(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe().model_dump(mode="json", by_alias=True)))
    assert load_recipe(file) == recipe()


def test_overlay_and_nested():
    assert nested({"a.b": 1, "a.c": 2}) == {"a": {"b": 1, "c": 2}}
    assert overlay({"a": {"b": 1}, "d": [1]}, {"a": {"c": 2}, "d": [2]}) == {"a": {"b": 1, "c": 2}, "d": [2]}
    base = {"split": {"kind": "hash", "columns": ["a"]}, "interaction": {"name": "dnn", "hidden": [4]}}
    before = copy.deepcopy(base)
    assert overlay(base, {"split": {"kind": "time"}})["split"] == {"kind": "time"}
    assert overlay(base, {"split": {"seed": 1}})["split"] == {"kind": "hash", "columns": ["a"], "seed": 1}
    assert overlay(base, {"interaction": {"name": "fm"}})["interaction"] == {"name": "fm"}
    assert base == before
