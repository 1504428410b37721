"""Every recipe that is shipped: its models can be built, its budgets met, its quotations have a place."""

from mldcn import datasets
from mldcn.config import Config, parse, read_yaml
from mldcn.cost import log_layout, scorer_parameters, x0_layout
from mldcn.cost.flops import meta
from mldcn.datasets.ads import CRITEO_COLUMNS
from mldcn.datasets.pinads import PinadsConfig, pinads_config
from mldcn.model import Ranker
from mldcn.study.plan import Planner
from mldcn.study.quoted import read_quoted
from mldcn.study.recipe import load_recipe, overlay

MOVIELENS = {
    "users.dat": "1::F::1::10::48067\n",
    "movies.dat": "1::Toy Story (1995)::Animation|Comedy\n",
    "interactions.csv": "user_id,movie_id,label,split\n1,1,1,train\n",
}


def pytest_generate_tests(metafunc):
    if "file" in metafunc.fixturenames:
        folder = metafunc.config.rootpath / "recipes"
        files = [f for f in sorted(folder.rglob("*.yaml")) if "kind" not in read_yaml(f)]
        assert len(files) > 15
        metafunc.parametrize("file", files, ids=[str(f.relative_to(folder).with_suffix("")) for f in files])


def base_config(name, folder):
    """A log's config without the log."""
    if name == "pinads":
        return pinads_config(folder)
    if name == "movielens-1m":
        for file, text in MOVIELENS.items():
            (folder / file).write_text(text)
        return datasets.prepare(name, folder, folder / "log")[1]
    assert name == "criteo-kaggle"
    (folder / "train.txt").write_text("\t".join("0" for _ in CRITEO_COLUMNS) + "\n")
    return datasets.prepare(name, folder / "train.txt", folder)[1]


def planned(file, folder):
    """A recipe's planner and all its final runs with the first seed."""
    recipe = load_recipe(file)
    raw = overlay(base_config(recipe.dataset, folder), recipe.config)
    raw = overlay(raw, {"training": {}})
    layout, _ = log_layout(parse(Config, raw, str(file)).log_schema, rows=50)
    planner = Planner(recipe, raw, layout, folder)
    jobs = [job for rival in recipe.rivals for job in planner.final(rival, -1, {})]
    return planner, [job for job in jobs if job.seed == recipe.seeds[0]]


def test_models_can_be_built_and_budgets_met(file, tmp_path):
    planner, jobs = planned(file, tmp_path)
    recipe = planner.recipe
    assert {(j.rival, j.point.name) for j in jobs} == {
        (r, p.name) for r in recipe.rivals for p in recipe.points(r)
    }
    with meta():
        for job in jobs:
            Ranker(job.config.model, job.config.log_schema, planner.layout)
    off = {str(job): job.residual for job in jobs if job.residual is not None and abs(job.residual) > 0.01}
    assert not off
    if recipe.tuning is not None:
        for rival in recipe.rivals:
            planner.as_it_is(rival, recipe.tuning.of(rival))


def test_what_the_log_is_made_with_and_what_is_compared_is_known(file, tmp_path):
    recipe = load_recipe(file)
    options = {key: value for key, value in recipe.log.items() if key != "rows"}
    if recipe.dataset == "pinads":
        parse(PinadsConfig, options, str(file))
    else:
        assert not recipe.log
    schema = parse(Config, base_config(recipe.dataset, tmp_path), str(file)).log_schema
    assert recipe.task is None or recipe.task in schema.tasks


def test_figures_are_quoted_for_what_is_trained(file):
    recipe = load_recipe(file)
    cells = [(rival, point.name) for rival in recipe.rivals for point in recipe.points(rival)]
    known = {name for rival, point in cells for name in (rival, point, f"{rival}@{point}")}
    for column in read_quoted(recipe.quoted):
        assert set(column.values) <= known
        assert column.source != "the paper"


def test_the_depths_of_figure_5a_are_compared_at_equal_size(request, tmp_path):
    planner, jobs = planned(request.config.rootpath / "recipes/ablations/dcnv2_depth.yaml", tmp_path)
    sizes = {}
    for job in jobs:
        layout = x0_layout(job.config.model, job.config.log_schema, planner.layout)
        sizes[job.rival, job.point.name] = scorer_parameters(job.config.model, layout, planner.layout.tasks)
    for depth in range(1, 6):
        assert sizes[f"dnn_{depth}", "as it is"] == sizes["cross", f"num_layers={depth}"]


def test_the_rows_of_table_4_take_away_one_thing_at_a_time(request):
    rivals = load_recipe(request.config.rootpath / "recipes/ablations/mldcn_mask_parts.yaml").rivals
    rows = [rivals[name]["interaction"] for name in ("no_mask_no_norm", "no_mask", "linear", "relu", "full")]
    assert [(row.get("norm", "branch"), row["mask"]) for row in rows] == [
        ("none", "none"),
        ("branch", "none"),
        ("branch", "linear"),
        ("branch", "relu"),
        ("branch", "full"),
    ]
    assert len({(row["name"], row["num_layers"], row["rank"]) for row in rows}) == 1
