"""Going on from a finished run: what is taken over, and what is refused."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from mldcn.config import Config, load_config, parse
from mldcn.data.prepare import prepare
from mldcn.errors import UserError
from mldcn.files import checksum
from mldcn.model import Ranker
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.training import warm_start
from mldcn.training.fit import Trainer, fit
from mldcn.training.warm_start import STATE, WarmStart

ROWS = 1500
FEATURES = [
    {"name": "ad", "kind": "categorical", "source": "item"},
    {"name": "place", "kind": "categorical", "encoding": {"kind": "hash", "rows": 20, "hashes": 2}},
    {
        "name": "recent",
        "kind": "sequence",
        "share": "ad",
        "actions": "acts",
        "max_length": 3,
        "source": "user",
    },
    {"name": "age", "kind": "bucketised", "buckets": 4, "source": "user"},
    {"name": "price", "kind": "numeric", "transform": "log"},
    {"name": "user", "kind": "categorical", "source": "user"},
]


def write_day(path, day, ads):
    """A day's log; ads are drawn from the given ones."""
    rng = np.random.default_rng(day)
    ad = rng.choice(ads, ROWS)
    click = rng.random(ROWS) < 1 / (1 + np.exp(-(0.5 * (ad % 7) - 2)))
    pl.DataFrame(
        {
            "ad": ad,
            "place": rng.integers(0, 50, ROWS),
            "recent": ["|".join(map(str, rng.choice(ads, 2))) for _ in range(ROWS)],
            "acts": ["|".join(rng.choice(["click", "save", f"act{day}"], 2)) for _ in range(ROWS)],
            "age": rng.exponential(20 * day, ROWS),
            "price": rng.exponential(day, ROWS),
            "user": rng.integers(0, 30 * day, ROWS),
            "position": rng.integers(1, 4, ROWS),
            "click": click.astype(int),
        }
    ).write_parquet(path)


def raw_config(log, features=FEATURES, **training):
    training = {"threads": 1, "epochs": 2, "batch_size": 256, "optimiser": {"lr": 0.01}, **training}
    return {
        "data": {"train": [str(log)], "split": {"kind": "hash", "valid": 0.2, "test": 0.2}},
        "schema": {
            "features": features,
            "labels": [{"name": "click"}],
            "position": "position",
            "max_position": 3,
        },
        "model": {
            "embedding": {"dim": 4},
            "interaction": {"rank": 4, "num_layers": 1},
            "deep": {"hidden": [8], "batch_norm": True},
        },
        "training": training,
        "evaluation": {"calibration": "platt"},
    }


def config(log, **training):
    return parse(Config, raw_config(log, **training), "test")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two days' logs, and a run on the first with an average and its optimisers' state."""
    home = tmp_path_factory.mktemp("warm")
    write_day(home / "1.parquet", 1, np.arange(10))
    write_day(home / "2.parquet", 2, np.arange(5, 25))
    wanted = config(home / "1.parquet", ema=0.95, keep_optimiser=True)
    fit(wanted, RunFolder.create(home / "run"), prepare(wanted, home / "encoded-1"))
    return home


def warm_trainer(home, folder, day, *, statistics="keep", optimiser="keep", **training):
    """A trainer that starts from the run on one of the days, and its data."""
    start = WarmStart.open(home / "run", statistics, optimiser)
    wanted = start.adapt(config(home / f"{day}.parquet", **training))
    data = prepare(wanted, folder / "encoded", base=start.encoder(), statistics=statistics)
    return Trainer(wanted, RunFolder.create(folder / "new"), data, [], start), data


def logits(model, data):
    model.eval()
    batch = next(iter(data.train.batches(256)))
    with torch.no_grad():
        return model(batch.ids, batch.dense, batch.position)


@pytest.mark.parametrize("optimiser", ["keep", "restart"])
def test_without_new_ids_and_steps_the_predictions_are_the_runs(home, tmp_path, optimiser):
    trainer, data = warm_trainer(home, tmp_path, 1, optimiser=optimiser, ema=0.95)
    expected = logits(Predictor.load(home / "run").model, data)
    with trainer.average.applied():
        assert torch.equal(logits(trainer.model, data), expected)
    bare, data = warm_trainer(home, tmp_path / "bare", 1, optimiser=optimiser)
    assert torch.equal(logits(bare.model, data), expected)


def test_old_rows_stay_and_new_ones_are_a_fresh_tables(home, tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "_ROWS", 3)  # so that tables are copied in several pieces
    trainer, data = warm_trainer(home, tmp_path, 2)
    old, layout = Predictor.load(home / "run"), data.encoder.layout
    torch.manual_seed(0)  # the config's seed
    fresh = Ranker(trainer.config.model, trainer.config.log_schema, layout)
    grown = {name: rows - old.encoder.layout.tables[name] for name, rows in layout.tables.items()}
    assert grown["ad"] == 15
    assert grown["user"] > 0
    assert grown["place"] == 0
    for name, rows in old.encoder.layout.tables.items():
        now = trainer.model.embedder.table(name)
        assert torch.equal(now[:rows], old.model.embedder.table(name))
        assert torch.equal(now[rows:], fresh.embedder.table(name)[rows:])
        values = getattr(data.encoder.tables[name], "values", None)
        if values is not None:
            assert values[: rows - 2].equals(old.encoder.tables[name].values)
    for name, weights in trainer.model.scorer.state_dict().items():
        assert torch.equal(weights, old.model.scorer.state_dict()[name])
    assert data.encoder.numerics == old.encoder.numerics


def test_rows_with_old_ids_are_scored_as_before_though_the_tables_grew(home, tmp_path):
    trainer, data = warm_trainer(home, tmp_path, 2)
    old = Predictor.load(home / "run")
    raw = pl.read_parquet(home / "1.parquet").to_arrow()
    grown = Predictor.load(home / "run")
    grown.model, grown.encoder = trainer.model.eval(), data.encoder
    assert np.array_equal(grown.predict_table(raw), old.predict_table(raw))


def test_statistics_are_refreshed_where_asked(home, tmp_path):
    _, data = warm_trainer(home, tmp_path, 2, statistics="refresh")
    old = Predictor.load(home / "run").encoder
    assert data.encoder.numerics["price"].shift > old.numerics["price"].shift
    assert data.encoder.boundaries["age"][-1] > old.boundaries["age"][-1]


@pytest.mark.parametrize("table", ["lazy_adam", "rowwise_adagrad"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_with_the_state_kept_the_next_step_is_the_one_the_run_would_have_made(home, tmp_path, table, ema):
    # Without validation rows the run keeps its last weights.
    raw = raw_config(home / "1.parquet", ema=ema, keep_optimiser=True)
    raw["training"]["optimiser"]["table"] = table
    raw["data"]["split"].update(valid=0.0, test=0.0)
    raw["evaluation"] = {}
    wanted = parse(Config, raw, "test")
    data = prepare(wanted, tmp_path / "encoded")
    run = RunFolder.create(tmp_path / "run")
    first = Trainer(wanted, run, data, [])
    first.fit(resume=False)
    if ema:  # it ends with the average in the model; the weights that were averaged are in the state
        first.model.load_state_dict(
            {n[4:]: t for n, t in load_file(run.path / STATE).items() if n.startswith("raw/")}, strict=False
        )
    second = Trainer(
        wanted, RunFolder.create(tmp_path / "new"), data, [], WarmStart.open(run.path, "keep", "keep")
    )
    batch = next(iter(data.train.batches(256)))
    second.position.step = first.position.step
    for trainer in (first, second):
        trainer._step(batch)
    for name, weights in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weights), name
    if ema:
        with first.average.applied(), second.average.applied():
            for name, weights in first.model.state_dict().items():
                torch.testing.assert_close(second.model.state_dict()[name], weights)


def test_the_tables_state_goes_where_the_rows_went(home, tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "_ROWS", 3)
    trainer, _ = warm_trainer(home, tmp_path, 2)
    old, saved = Predictor.load(home / "run").model.embedder, load_file(home / "run" / STATE)
    ((name, table),) = trainer.model.embedder.tables().items()
    moments = trainer.optimisers[1].state[table]["moments"]
    before, after = old.spans()[name], trainer.model.embedder.spans()[name]
    theirs = saved[f"state/embedder.{name}/moments"]
    assert theirs.abs().sum() > 0
    for one, rows in before.items():
        count = rows.stop - rows.start
        here = moments[after[one]]
        assert torch.equal(here[:count], theirs[rows])
        assert not here[count:].any()
    assert int(trainer.optimisers[1].state[table]["step"]) == int(saved[f"state/embedder.{name}/step"])


def test_a_run_keeps_the_state_of_the_weights_it_keeps(home):
    info = RunFolder.open(home / "run").info()
    state = load_file(home / "run" / STATE)
    steps = {int(value) for key, value in state.items() if key.endswith("/step") and key.startswith("state/")}
    assert steps == {info["best_step"]}
    assert int(state["average/step"]) == info["best_step"]
    assert STATE in json.loads((home / "run" / "manifest.json").read_text())["crc32"]


def test_the_new_run_is_whole_and_says_what_it_began_with_and_the_old_is_untouched(home, tmp_path):
    before = {p: checksum(p) for p in (home / "run").rglob("*") if p.is_file()}
    trainer, data = warm_trainer(home, tmp_path, 2)
    trainer.fit(resume=False)
    assert {p: checksum(p) for p in (home / "run").rglob("*") if p.is_file()} == before
    info = RunFolder.open(tmp_path / "new").info()["warm_start"]
    assert info["run"] == str((home / "run").resolve())
    assert info["crc32"] == checksum(home / "run" / "manifest.json")
    assert info["tables"]["ad"] == {"had": 12, "has": data.encoder.layout.tables["ad"]}
    history = (tmp_path / "new" / "history.jsonl").read_text().splitlines()
    assert json.loads(history[0])["step"] == 0


def test_what_no_step_betters_is_kept(home, tmp_path):
    trainer, data = warm_trainer(home, tmp_path, 1, min_delta=0.5)
    expected = logits(Predictor.load(home / "run").model, data)
    summary = trainer.fit(resume=False)
    assert summary.best_step == 0
    assert summary.steps > 0
    assert torch.equal(logits(Predictor.load(tmp_path / "new").model, data), expected)


def test_auto_widths_are_the_runs(home, tmp_path):
    raw = raw_config(home / "1.parquet", epochs=1)
    raw["model"]["embedding"] = {"dim": "auto", "dims": {"user": 3}}
    first = parse(Config, raw, "test")
    fit(first, RunFolder.create(tmp_path / "run"), prepare(first, tmp_path / "encoded"))
    raw["data"]["train"] = [str(home / "2.parquet")]
    start = WarmStart.open(tmp_path / "run")
    adapted = start.adapt(parse(Config, raw, "test"))
    assert adapted.model.embedding.dims == {"user": 3, "ad": 11, "place": 13, "age": 9}
    data = prepare(adapted, tmp_path / "encoded-2", base=start.encoder())
    fit(adapted, RunFolder.create(tmp_path / "new"), data, warm_start=start)
    # A third generation finds the widths in the second's config, and they agree with what is asked for.
    again = WarmStart.open(tmp_path / "new").adapt(parse(Config, raw, "test"))
    assert again.model.embedding.dims == adapted.model.embedding.dims


def changed(raw, **parts):
    for path, value in parts.items():
        *parents, last = path.split("__")
        node = raw
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        node[int(last) if last.isdigit() else last] = value
    return raw


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"schema__features": FEATURES[1:2]}, "its feature 'ad' is missing from the schema"),
        ({"schema__features": [*FEATURES, {"name": "new", "kind": "numeric"}]}, "feature 'new' is none of its"),
        ({"schema__features": FEATURES[::-1]}, "another order: ad, place"),
        ({"schema__features__4__transform": "identity"}, "feature 'price': transform is 'identity' here"),
        ({"schema__features__1__encoding__rows": 21}, "is 21 here and 20 there .a hashed table cannot"),
        ({"schema__labels": [{"name": "click"}, {"name": "position2"}]}, "tasks are click, not click, position2"),
        ({"schema__labels__0__at_least": 1.0}, "label 'click': at_least is 1.0 here and None"),
        ({"schema__max_position": 5}, "its positions go to 3, here to 5"),
        ({"model__interaction__rank": 5}, "model.interaction.rank is 5 here and 4 there"),
        ({"model__embedding__dims": {"user": 8}}, "model.embedding.dims.user is 8 here and 4 there"),
        ({"model__deep__hidden": [9]}, r"model.deep.hidden is \[9\] here and \[8\] there"),
        ({"training__optimiser__table": "rowwise_adagrad"}, "rowwise_adagrad here and lazy_adam there"),
    ],
)  # fmt: skip
def test_another_schema_or_model_is_refused_by_name(home, parts, message):
    raw = changed(json.loads(json.dumps(raw_config(home / "2.parquet"))), **json.loads(json.dumps(parts)))
    with pytest.raises(UserError, match=message):
        WarmStart.open(home / "run", "keep", "keep").adapt(parse(Config, raw, "test"))


def test_rarity_of_ids_and_training_are_free_to_change(home):
    raw = raw_config(home / "2.parquet", batch_size=64, ema=None)
    raw["schema"]["features"] = [
        {**FEATURES[0], "encoding": {"kind": "vocabulary", "min_count": 3}},
        *FEATURES[1:],
    ]
    raw["schema"]["labels"] = [{"name": "click", "weight": 0.5}]
    WarmStart.open(home / "run", "refresh", "keep").adapt(parse(Config, raw, "test"))


def test_a_resumed_run_wants_the_run_that_it_began_with(home, tmp_path):
    note = WarmStart.open(home / "run", "refresh", "keep").note()
    assert WarmStart.reopen(note).note() == note
    with pytest.raises(UserError, match=r"that this one was started from: .*gone: is no run's folder"):
        WarmStart.reopen({**note, "run": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="is not the run any more"):
        WarmStart.reopen({**note, "crc32": "00000000"})


def test_an_unfinished_damaged_or_stateless_run_is_refused(home, tmp_path):
    for name in ("unfinished", "damaged", "stateless"):
        shutil.copytree(home / "run", tmp_path / name)
    info = json.loads((tmp_path / "unfinished" / "run.json").read_text())
    (tmp_path / "unfinished" / "run.json").write_text(json.dumps({**info, "status": "running"}))
    with pytest.raises(UserError, match="not finished"):
        WarmStart.open(tmp_path / "unfinished")
    weights = bytearray((tmp_path / "damaged" / "weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "damaged" / "weights.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"weights.safetensors: damaged"):
        WarmStart.open(tmp_path / "damaged")
    (tmp_path / "stateless" / STATE).unlink()
    start = WarmStart(RunFolder(tmp_path / "stateless"), "keep", "keep")
    with pytest.raises(UserError, match="kept no optimiser state.*--optimiser restart"):
        start.adapt(config(home / "2.parquet"))
    assert load_config(tmp_path / "stateless" / "config.yaml").training.keep_optimiser
