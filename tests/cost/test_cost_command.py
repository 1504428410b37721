"""``mldcn cost`` and ``mldcn models`` as a shell runs them."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mldcn import cli, interactions
from mldcn.cost import load_target, log_layout, meet, model_cost, plain_schema, scorer_flops, total
from mldcn.cost.target import parse_sizes
from mldcn.errors import UserError


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def config(tmp_path, **parts):
    raw = {
        "schema": {
            "features": [
                {"name": "ad", "kind": "categorical"},
                {"name": "user", "kind": "categorical", "encoding": {"kind": "hash", "rows": 50}},
                {"name": "age", "kind": "bucketised", "method": "boundaries", "boundaries": [1.0, 2.0]},
                {"name": "top", "kind": "categorical", "encoding": {"kind": "vocabulary", "max_size": 7}},
            ],
            "labels": [{"name": "click"}],
        },
        "model": {"interaction": {"name": "dcnv2"}, "embedding": {"dim": 4}},
        **parts,
    }
    path = tmp_path / "log.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_an_architecture_by_its_name(tmp_path):
    file = tmp_path / "cost.json"
    settings = ["--set", "interaction.rank=9", "--set", "model.deep.hidden=[7]"]
    shown = run("cost", "mldcn", "--fields", 5, "--width", 6, "--rows", 40, "--json", file, *settings)
    found = json.loads(file.read_text())
    assert found["x0"] == {"columns": 30, "fields": 5}
    assert found["model"]["interaction"]["rank"] == 9
    assert found["model"]["interaction"]["num_layers"] == 4
    assert found["tables"] == {f"f{i}": 40 for i in range(1, 6)}
    assert found["parameters"]["tables"] == 5 * 40 * 6
    module = interactions.build(found["model"]["interaction"], 30)
    flops = found["flops_per_example"]
    assert flops["interaction"]["gemm"] == module.flops()
    assert flops["deep"]["gemm"] == 2 * 30 * 7
    assert flops["total"]["gemm"] == module.flops() + 2 * 30 * 7 + 2 * 7
    assert found["flops_per_request"]["candidates"] == 500
    assert found["flops_per_request"]["total"]["gemm"] == 500 * flops["total"]["gemm"]
    assert found["bytes_read_per_example"]["1"] > found["bytes_read_per_example"]["4096"] > 5 * 6 * 4
    assert f"{flops['total']['gemm']:,}" in shown
    assert "rank 9" in shown
    assert "40 rows are assumed" in shown
    assert not {"training_memory", "latency"} & set(found)


def test_a_config_and_its_table_sizes(tmp_path):
    sizes = tmp_path / "sizes.yaml"
    sizes.write_text("tables: {ad: 1000}")
    file = tmp_path / "cost.json"
    run("cost", config(tmp_path), "--schema", sizes, "--json", file)
    found = json.loads(file.read_text())
    # Two rows of each table are reserved; two boundaries make three buckets.
    assert found["tables"] == {"ad": 1000, "user": 52, "age": 5, "top": 9}
    assert found["assumed_tables"] == []
    assert found["parameters"]["tables"] == (1000 + 52 + 5 + 9) * 4


def test_a_name_on_the_schema_of_a_config(tmp_path):
    target = load_target("mldcn", schema=config(tmp_path), width=8, rows=300)
    assert (target.x0().width, target.layout.tables["ad"]) == (32, 300)
    assert target.assumed == ("ad",)


def test_memory_and_latency_only_when_asked(tmp_path):
    file = tmp_path / "cost.json"
    small = ["--fields", 3, "--rows", 50, "--set", "training.batch_size=64", "--batch-sizes", "1,8"]
    shown = run("cost", "dnn", *small, "--memory", "--latency", "--json", file)
    found = json.loads(file.read_text())
    memory = found["training_memory"]
    assert memory["batch_size"] == 64
    assert memory["estimated"]["peak"] == pytest.approx(memory["measured"]["peak"], rel=0.1)
    assert [each["batch"] for each in found["latency"]["latencies"]] == [1, 8]
    assert found["latency"]["threads"] == torch.get_num_threads()
    assert "training memory" in shown
    assert "median ms" in shown


@pytest.mark.parametrize(("budget", "number"), [("flops=3e5", 3e5), ("parameters=150000", 1.5e5)])
def test_a_budget_turns_the_width(budget, number, tmp_path):
    file = tmp_path / "cost.json"
    run("cost", "dcnv2_lowrank", "--budget", budget, "--json", file)
    found = json.loads(file.read_text())
    behind = ["interaction", "deep", "heads"]
    if budget.startswith("flops"):
        met = sum(found["flops_per_example"][part]["gemm"] for part in behind)
    else:
        met = sum(found["parameters"][part] for part in behind)
    assert met == pytest.approx(number, rel=0.01)


def test_a_latency_is_a_budget(monkeypatch):
    """The measure is put on: a millisecond for each megaFLOP."""
    target = load_target("dnn")

    def measured(meter, model):
        return meter.batch_size * 1e-9 * scorer_flops(model, target.x0(), ("task1",))

    monkeypatch.setattr("mldcn.cost.latency.LatencyMeter.__call__", measured)
    found = meet(target, "latency@4=6")
    assert scorer_flops(found.model, target.x0(), ("task1",)) == pytest.approx(1.5e6, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mldnc",), "did you mean 'mldcn'"),
        (("mldcn", ["interaction.rnak=3"]), "did you mean 'rank'"),
        (("mldcn", ["data.on_error=skip"]), "data"),
        (("mldcn", ["rank"]), "expected key.path=value"),
        (("missing.yaml",), "cannot be read"),
    ],
)
def test_what_is_not_there_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        target = load_target(*arguments)
        model_cost(target.model, target.schema, target.layout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other: 3", "needs a schema"),
        ("tables: [1]", "must map"),
        ("tables: {ad: many}", "must map"),
        ("tables: {f1: 2}", "'f1' has 2 rows; the least is 3"),
        ("tables: {f77: 20}", "no table is called 'f77'"),
    ],
)
def test_a_wrong_schema_file_is_refused(text, message, tmp_path):
    file = tmp_path / "sizes.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_target("mldcn", schema=file)


@pytest.mark.parametrize("budget", ["2e6", "flops", "flops=-1", "flops=many", "time=3", "latency@0=1"])
def test_a_wrong_budget_is_refused(budget):
    with pytest.raises(UserError, match="expected flops=2e6"):
        meet(load_target("mldcn"), budget)


@pytest.mark.parametrize("text", ["", "a", "1,", "0", "4,-1"])
def test_wrong_batch_sizes_are_refused(text):
    with pytest.raises(UserError, match="expected numbers of rows"):
        parse_sizes(text)


def test_a_run_has_its_own_table_sizes(tmp_path):
    """What training left behind is enough: its config and the layout of its encoded rows."""
    from mldcn.config import dump_config, load_config
    from mldcn.run import RunFolder

    loaded = load_config(config(tmp_path))
    run_folder = RunFolder.create(tmp_path / "run", dump_config(loaded))
    layout, _ = log_layout(loaded.log_schema, {"ad": 77})
    (run_folder.path / "layout.json").write_text(json.dumps(layout.to_json()))
    run_folder.finish()
    target = load_target(str(run_folder.path))
    assert target.layout == layout
    assert target.model == loaded.model
    assert total(model_cost(target.model, target.schema, target.layout).example).gemm > 0


def test_a_plain_log_has_as_many_fields_and_tasks_as_asked():
    schema = plain_schema(4, tasks=2)
    layout, assumed = log_layout(schema, rows=9)
    assert (len(layout.ids), layout.tables["f4"], layout.tasks) == (4, 9, ("task1", "task2"))
    assert assumed == ("f1", "f2", "f3", "f4")


def test_models_lists_every_architecture_with_what_is_known_of_it(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr("mldcn.console.Console", lambda **_: Console(width=400, highlight=False))
    shown = run("models")
    for name in interactions.names():
        known = interactions.info(name)
        line = next(line for line in shown.splitlines() if f" {name} " in line)
        for text in (known.title, known.paper, str(known.year), known.knob or "–", known.order, known.cost):
            assert text in line
