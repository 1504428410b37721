"""The way from ids and dense columns to x0, each step against plain NumPy on the tables' own rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mldcn.config import EmbeddingConfig, parse
from mldcn.data.batch import MISSING, DenseSlot, EncodedLayout, IdSlot
from mldcn.embedding import Embedder
from mldcn.errors import UserError
from mldcn.schema import Schema

B, E = 5, 4


def make_schema(*features: dict[str, Any]) -> Schema:
    named = [{"kind": "categorical", **feature} for feature in features]
    return parse(Schema, {"features": named, "labels": [{"name": "click"}], "time": "ts"}, "test")


def encode(schema: Schema, rows: int | dict[str, int] = 20) -> EncodedLayout:
    """A layout as the encoder lays it out: columns in the schema's order, lists as long as ``max_length``."""
    ids, dense, tables, id_at, dense_at = [], [], {}, 0, 0

    def add(feature: Any, table: str, length: int, hashes: int, kind: Any, role: Any = "values") -> None:
        nonlocal id_at
        ids.append(IdSlot(feature.name, table, feature.source, id_at, length, hashes, kind, role))
        tables[table] = rows if isinstance(rows, int) else rows[table]
        id_at += length * hashes

    for feature in schema.features:
        if feature.kind in ("numeric", "embedding"):
            width = feature.width if feature.kind == "embedding" else 1 + feature.missing_indicator
            dense.append(DenseSlot(feature.name, feature.source, dense_at, width, feature.kind))
            dense_at += width
            continue
        hashes = getattr(feature.encoding, "hashes", 1)
        length = getattr(feature, "max_length", 1)
        kind = feature.kind if feature.kind in ("multi", "sequence") else "categorical"
        add(feature, schema.table_of(feature), length, hashes, kind)
        if getattr(feature, "actions", None):
            add(feature, f"{feature.name}.actions", length, 1, kind, "actions")
        if getattr(feature, "times", None):
            dense.append(DenseSlot(feature.name, feature.source, dense_at, length, "sequence"))
            dense_at += length
    return EncodedLayout(tuple(ids), tuple(dense), tables, ("click",))


def embedder(schema: Schema, rows: int | dict[str, int] = 20, **config: Any) -> Embedder:
    torch.manual_seed(0)
    return Embedder(encode(schema, rows), schema, EmbeddingConfig(**{"dim": E, "init_std": 1.0, **config}))


def run(model: Embedder, ids: Any, dense: Any = None) -> np.ndarray:
    ids = torch.as_tensor(np.asarray(ids), dtype=torch.int32)
    dense = torch.zeros(len(ids), 0) if dense is None else torch.as_tensor(dense, dtype=torch.float32)
    result = model(ids, dense)
    assert result.shape == (len(ids), model.layout.width)
    assert result.dtype == torch.float32
    return result.detach().numpy()


def rows_of(model: Embedder, table: str) -> np.ndarray:
    return model.table(table).numpy()


def test_single_ids_are_rows_of_their_own_tables_in_the_schemas_order() -> None:
    schema = make_schema({"name": "a", "source": "user"}, {"name": "b"}, {"name": "c", "source": "item"})
    model = embedder(schema, {"a": 5, "b": 7, "c": 9})
    ids = np.array([[0, 6, 8], [4, 0, 0], [2, 3, 4]])
    expected = np.concatenate([rows_of(model, name)[ids[:, i]] for i, name in enumerate("abc")], axis=1)
    np.testing.assert_array_equal(run(model, ids), expected)
    assert [(f.name, f.kind, f.source, f.offset) for f in model.layout] == [
        ("a", "categorical", "user", 0),
        ("b", "categorical", "context", E),
        ("c", "categorical", "item", 2 * E),
    ]
    assert list(model.tables()) == ["stacks.width_4.weight"]
    assert model.tables()["stacks.width_4.weight"].shape == (21, E)
    assert model.flops() == 0


def test_the_encoded_order_need_not_be_the_schemas() -> None:
    schema = make_schema({"name": "a"}, {"name": "n", "kind": "numeric"}, {"name": "b"})
    layout = EncodedLayout(
        (IdSlot("b", "b", "context", 0, 1), IdSlot("a", "a", "context", 1, 1)),
        (DenseSlot("n", "context", 0, 1),),
        {"b": 5, "a": 3},
        ("click",),
    )
    model = Embedder(layout, schema, EmbeddingConfig(dim=E))
    x0 = run(model, [[4, 2]], [[7.0]])
    assert [field.name for field in model.layout] == ["a", "n", "b"]
    np.testing.assert_array_equal(x0[0, :E], rows_of(model, "a")[2])
    assert x0[0, E] == 7.0
    np.testing.assert_array_equal(x0[0, E + 1 :], rows_of(model, "b")[4])


def test_numbers_enter_as_encoded_with_their_missing_indicator() -> None:
    schema = make_schema(
        {"name": "x", "kind": "numeric"},
        {"name": "y", "kind": "numeric", "missing_indicator": True},
        {"name": "a"},
        {"name": "z", "kind": "numeric"},
    )
    model = embedder(schema)
    dense = np.arange(8, dtype=np.float32).reshape(2, 4)
    x0 = run(model, [[1], [2]], dense)
    assert model.layout.widths == (1, 2, E, 1)
    np.testing.assert_array_equal(x0[:, [0, 1, 2, 3 + E]], dense)


def test_two_hashes_are_summed() -> None:
    schema = make_schema({"name": "a"}, {"name": "h", "encoding": {"kind": "hash", "rows": 18, "hashes": 2}})
    model = embedder(schema)
    table = rows_of(model, "h")
    x0 = run(model, [[0, 3, 19], [0, 5, 5]])
    np.testing.assert_allclose(x0[:, E:], [table[3] + table[19], 2 * table[5]], rtol=1e-6)


LISTS = np.array([[3, 7, 2], [5, MISSING, MISSING], [MISSING, MISSING, MISSING], [4, 4, MISSING], [9, 1, 1]])


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
@pytest.mark.parametrize("hashes", [1, 2])
def test_lists_are_pooled_without_padding(pooling: str, hashes: int) -> None:
    encoding = {"kind": "hash", "rows": 18, "hashes": hashes}
    schema = make_schema(
        {"name": "m", "kind": "multi", "max_length": 3, "pooling": pooling, "encoding": encoding}
    )
    model = embedder(schema)
    table = rows_of(model, "m")
    second = np.where(LISTS == MISSING, MISSING, (LISTS * 7) % 20)
    x0 = run(model, LISTS if hashes == 1 else np.concatenate([LISTS, second], axis=1))
    for got, first_ids, second_ids in zip(x0, LISTS, second, strict=True):
        real = first_ids != MISSING
        items = table[first_ids[real]] + (table[second_ids[real]] if hashes == 2 else 0)
        expected = getattr(np, pooling)(items, axis=0) if real.any() else np.zeros(E)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_sequence_shares_the_target_s_table_and_its_plain_pooling_is_the_mean() -> None:
    schema = make_schema(
        {"name": "item"}, {"name": "h", "kind": "sequence", "share": "item", "max_length": 3}
    )
    model = embedder(schema)
    assert sum(table.numel() for table in model.tables().values()) == 20 * E
    table = rows_of(model, "item")
    x0 = run(model, np.concatenate([np.full((5, 1), 6), LISTS], axis=1))
    for got, ids in zip(x0[:, E:], LISTS, strict=True):
        items = table[ids[ids != MISSING]]
        np.testing.assert_allclose(got, items.mean(0) if len(items) else np.zeros(E), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target_first", [True, False])
@pytest.mark.parametrize("timed", [True, False])
def test_attention_is_its_equation(target_first: bool, timed: bool) -> None:
    item = {"name": "item"}
    history = {
        "name": "h",
        "kind": "sequence",
        "share": "item",
        "max_length": 3,
        "pooling": "attention",
        "target": "item",
        "actions": "acts",
        "times": "when" if timed else None,
    }
    features = [{"name": "u"}, item, history] if target_first else [history, {"name": "u"}, item]
    schema = make_schema(*features)
    model = embedder(schema, {"u": 5, "item": 20, "h.actions": 6})
    rng = np.random.default_rng(0)
    actions = np.where(LISTS == MISSING, 0, rng.integers(0, 6, LISTS.shape))
    target = rng.integers(0, 20, (5, 1))
    user = np.ones((5, 1), dtype=int)
    ids = [user, target, LISTS, actions] if target_first else [LISTS, actions, user, target]
    ages = rng.exponential(size=(5, 3)) if timed else np.zeros((5, 0))
    decay = 0.0
    if timed:
        decay = 0.7
        (parameter,) = (p for name, p in model.named_parameters() if name.endswith("decay"))
        assert parameter == 0  # the start is attention alone
        torch.nn.init.constant_(parameter, decay)
    x0 = run(model, np.concatenate(ids, axis=1), ages)
    got = x0[:, 2 * E :] if target_first else x0[:, :E]
    table, action_table = rows_of(model, "item"), rows_of(model, "h.actions")
    for i in range(5):
        real = LISTS[i] != MISSING
        keys = table[LISTS[i][real]] + action_table[actions[i][real]]
        logits = keys @ table[target[i, 0]] / np.sqrt(E) - (decay * ages[i][real] if timed else 0.0)
        weights = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(got[i], weights @ keys if len(keys) else np.zeros(E), rtol=1e-4, atol=1e-6)
    assert model.flops() == 4 * 3 * E


def test_a_mean_with_times_weighs_items_by_a_power_of_their_age() -> None:
    schema = make_schema({"name": "h", "kind": "sequence", "max_length": 3, "times": "when"})
    model = embedder(schema)
    torch.nn.init.constant_(next(p for n, p in model.named_parameters() if n.endswith("decay")), 2.0)
    age = np.array([0.0, 3.0, 9.0])
    x0 = run(model, [[4, 5, 6]], np.log1p(age)[None])
    weights = (1 + age) ** -2.0
    np.testing.assert_allclose(x0[0], weights / weights.sum() @ rows_of(model, "h")[4:7], rtol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("project_to", [None, 3])
def test_given_vectors_are_normalised_and_projected(normalise: bool, project_to: int | None) -> None:
    feature = {"name": "v", "kind": "embedding", "width": 6, "normalise": normalise, "project_to": project_to}
    model = embedder(make_schema(feature))
    vectors = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    vectors[2] = 0.0  # missing
    expected = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    expected = expected if normalise else vectors
    if project_to:
        parameters = {name.rpartition(".")[2]: p.detach().numpy() for name, p in model.named_parameters()}
        expected = expected @ parameters["weight"].T + parameters["bias"]
    x0 = run(model, np.zeros((4, 0)), vectors)
    np.testing.assert_allclose(x0, expected, rtol=1e-5, atol=1e-6)
    assert model.layout.widths == (project_to or 6,)
    assert model.flops() == (2 * 6 * 3 if project_to else 0)


MIXED = (
    {"name": "x", "kind": "numeric"},
    {"name": "y", "kind": "numeric", "missing_indicator": True},
    {"name": "a"},
    {"name": "b"},
    {"name": "one"},
    {"name": "m", "kind": "multi", "max_length": 2},
    {"name": "v", "kind": "embedding", "width": 3, "normalise": False},
)


def mixed_batch(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 20, (rows, 5)), rng.normal(size=(rows, 6)).astype(np.float32)


def test_l2_sets_each_field_to_norm_one_and_leaves_numbers_and_width_one() -> None:
    schema = make_schema(*MIXED)
    plain, scaled = (embedder(schema, normalise=how, dims={"one": 1}) for how in ("none", "l2"))
    ids, dense = mixed_batch(B)
    ids[0, 3:] = MISSING  # an empty list: its zero vector has no direction and stays
    x0, expected = run(scaled, ids, dense), run(plain, ids, dense)
    for field in scaled.layout:
        if field.name not in ("x", "y", "one"):
            norm = np.linalg.norm(expected[:, field.columns], axis=1, keepdims=True)
            expected[:, field.columns] /= np.where(norm == 0, 1, norm)
    np.testing.assert_allclose(x0, expected, rtol=1e-5, atol=1e-6)
    assert not x0[0, scaled.layout.fields[5].columns].any()


def test_layer_norm_standardises_each_row() -> None:
    schema = make_schema(*MIXED)
    plain, normed = (embedder(schema, normalise=how) for how in ("none", "layer"))
    ids, dense = mixed_batch(B)
    raw = run(plain, ids, dense)
    expected = (raw - raw.mean(1, keepdims=True)) / np.sqrt(raw.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(run(normed, ids, dense), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_standardises_each_column_and_takes_a_batch_of_one() -> None:
    schema = make_schema(*MIXED)
    plain, normed = (embedder(schema, normalise=how) for how in ("none", "batch"))
    ids, dense = mixed_batch(64)
    raw = run(plain, ids, dense)
    got = run(normed, ids, dense)
    np.testing.assert_allclose(got, (raw - raw.mean(0)) / np.sqrt(raw.var(0) + 1e-5), rtol=1e-3, atol=1e-4)
    statistics = {name: value.clone() for name, value in normed.norm.state_dict().items()}
    one = run(normed, ids[:1], dense[:1])
    normed.eval()
    np.testing.assert_array_equal(one, run(normed, ids[:1], dense[:1]))
    for name, value in normed.norm.state_dict().items():
        assert torch.equal(value, statistics[name])


def test_dropout_acts_on_single_elements_in_training_only() -> None:
    schema = make_schema({"name": "a"}, {"name": "b"})
    model = embedder(schema, dropout=0.25)
    ids, _ = mixed_batch(2000)
    dropped = run(model, ids[:, :2])
    model.eval()
    kept = run(model, ids[:, :2])
    zero = dropped == 0
    np.testing.assert_allclose(dropped[~zero], kept[~zero] / 0.75, rtol=1e-5)
    assert 0.22 < zero.mean() < 0.28
    assert 0 < zero[:, :E].all(1).mean() < 0.02  # .25 ** 4, not .25 as if whole fields fell out


def test_widths_come_from_dims_and_auto() -> None:
    schema = make_schema({"name": "a"}, {"name": "b"}, {"name": "c"}, {"name": "s", "share": "c"})
    rows = {"a": 2, "b": 10_000, "c": 81}
    model = embedder(schema, rows, dim="auto", dims={"a": 5})
    assert model.layout.widths == (5, 60, 18, 18)  # 6 * 10000^.25 = 60, 6 * 81^.25 = 18
    assert sorted(model.tables()) == [f"stacks.width_{e}.weight" for e in (18, 5, 60)]
    ids = np.array([[1, 9_999, 80, 2]])
    expected = [rows_of(model, table)[i] for table, i in zip("abcc", ids[0], strict=True)]
    np.testing.assert_array_equal(run(model, ids)[0], np.concatenate(expected))


def test_dims_of_unknown_features_and_of_sharers_are_refused() -> None:
    schema = make_schema({"name": "item"}, {"name": "s", "share": "item"}, {"name": "x", "kind": "numeric"})
    with pytest.raises(UserError, match="no feature 'itme' with a table; did you mean 'item'"):
        embedder(schema, dims={"itme": 8})
    with pytest.raises(UserError, match="no feature 'x' with a table"):
        embedder(schema, dims={"x": 8})
    with pytest.raises(UserError, match="'s' uses the table of 'item'; give the width for 'item'"):
        embedder(schema, dims={"s": 8})
    with pytest.raises(UserError, match="'item' has width 0"):
        embedder(schema, dim=0)


def test_a_layout_of_another_schema_is_refused() -> None:
    layout = encode(make_schema({"name": "a"}))
    config = EmbeddingConfig()
    with pytest.raises(ValueError, match="'b' has no ids"):
        Embedder(layout, make_schema({"name": "a"}, {"name": "b"}), config)
    with pytest.raises(ValueError, match="'x' has no numeric columns"):
        Embedder(layout, make_schema({"name": "x", "kind": "numeric"}), config)


@pytest.mark.parametrize("bad", [20, -1, 2**31 - 1])
def test_an_id_outside_its_table_is_refused_though_the_stack_goes_on(bad: int) -> None:
    model = embedder(make_schema({"name": "a"}, {"name": "b"}))
    ids = np.ones((4, 2), dtype=np.int64)
    ids[2, 0] = bad
    with pytest.raises(
        UserError, match=f"feature 'a': id {bad} in the batch's row 2 is outside its table of 20"
    ):
        run(model, ids)


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_one_and_of_no_rows_keep_their_shape(rows: int) -> None:
    schema = make_schema(*MIXED, {"name": "h", "kind": "sequence", "share": "a", "max_length": 2})
    for normalise in ("none", "l2", "layer"):
        model = embedder(schema, normalise=normalise)
        ids, dense = mixed_batch(rows)
        x0 = model(torch.from_numpy(np.concatenate([ids, ids[:, :2]], 1)).int(), torch.from_numpy(dense))
        assert x0.shape == (rows, model.layout.width)
        x0.sum().backward()


def test_large_row_numbers_stay_exact() -> None:
    rows = 2**24 + 100  # beyond float32's integers
    model = embedder(make_schema({"name": "big"}), rows, dim=1)
    with torch.no_grad():
        model.tables()["stacks.width_1.weight"].copy_(torch.arange(rows).remainder_(1000).unsqueeze(1))
    ids = np.arange(2**24, 2**24 + 50)[:, None]
    np.testing.assert_array_equal(run(model, ids)[:, 0], ids[:, 0] % 1000)


def test_rows_start_with_the_given_deviation() -> None:
    model = embedder(make_schema({"name": "a"}), 20_000, init_std=0.05)
    table = rows_of(model, "a")
    assert table.std() == pytest.approx(0.05, rel=0.02)
    assert abs(table.mean()) < 0.001


def test_weights_can_be_saved_and_loaded() -> None:
    schema = make_schema(*MIXED)
    one, two = embedder(schema), embedder(schema)
    with torch.no_grad():
        one.tables()["stacks.width_4.weight"].add_(1.0)
    two.load_state_dict(one.state_dict())
    ids, dense = mixed_batch(B)
    np.testing.assert_array_equal(run(one, ids, dense), run(two, ids, dense))
    assert set(one.state_dict()) == {name for name, _ in one.named_parameters()}


def test_mixed_precision_changes_little() -> None:
    history = {"name": "h", "kind": "sequence", "share": "a", "max_length": 3, "target": "a"}
    schema = make_schema({"name": "a"}, {**history, "pooling": "attention"})
    for normalise in ("none", "l2", "layer", "batch"):
        model = embedder(schema, normalise=normalise)
        ids = torch.from_numpy(np.concatenate([np.arange(1, 6)[:, None], LISTS], axis=1)).int()
        full = model(ids, torch.zeros(5, 0))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids, torch.zeros(5, 0))
        mixed.float().sum().backward()
        torch.testing.assert_close(mixed.float(), full, rtol=0.05, atol=0.05)
