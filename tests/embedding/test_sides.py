"""Side inputs: first-order terms, a second embedding and codewords of crossed ids, alone and in a whole model."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open

from mldcn import interactions
from mldcn import model as model_module
from mldcn.config import Config, EmbeddingConfig, ModelConfig, parse
from mldcn.data.batch import Batch, DenseSlot, EncodedLayout, IdSlot
from mldcn.data.prepare import prepare
from mldcn.embedding import Embedder, SideEmbedder
from mldcn.errors import UserError
from mldcn.interactions import Interaction
from mldcn.layout import CrossedIds, FieldLayout, FirstOrder, SecondEmbedding, as_layout
from mldcn.model import Ranker, load_weights, save_weights
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.schema import Schema
from mldcn.training.fit import Trainer, fit
from mldcn.training.optimisers import build_optimisers
from mldcn.training.step import backpropagate
from mldcn.training.warm_start import WarmStart

FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical", "source": "user"},
    {"name": "ad", "kind": "categorical", "source": "item"},
    {"name": "price", "kind": "numeric", "missing_indicator": True},
    {"name": "topics", "kind": "multi", "max_length": 3},
    {"name": "place", "kind": "categorical", "encoding": {"kind": "hash", "rows": 9, "hashes": 2}},
    {"name": "seen", "kind": "sequence", "share": "ad", "max_length": 2, "source": "user"},
    {"name": "image", "kind": "embedding", "width": 3, "project_to": 2, "normalise": False},
]
ROWS = {"user": 12, "ad": 15, "topics": 8, "place": 9}
SIDES = {
    "first order": (FirstOrder(),),
    "second embedding": (SecondEmbedding(),),
    "crossed ids": (CrossedIds(50, 4),),
    "all": (CrossedIds(31, 2, hashes=1, order=3), FirstOrder(), SecondEmbedding(), CrossedIds(50, 4)),
}
every_side = pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)


def a_schema(features: list[dict[str, Any]]) -> Schema:
    return parse(Schema, {"features": features, "labels": [{"name": "click"}, {"name": "save"}]}, "test")


SCHEMA = a_schema(FEATURES)


def encoded(rows: dict[str, int] = ROWS) -> EncodedLayout:
    ids = (
        IdSlot("user", "user", "user", 0, 1),
        IdSlot("ad", "ad", "item", 1, 1),
        IdSlot("topics", "topics", "context", 2, 3, 1, "multi"),
        IdSlot("place", "place", "context", 5, 1, 2),
        IdSlot("seen", "ad", "user", 7, 2, 1, "sequence"),
    )
    dense = (DenseSlot("price", "context", 0, 2), DenseSlot("image", "context", 2, 3, "embedding"))
    return EncodedLayout(ids, dense, rows, ("click", "save"))


def a_batch(n: int = 40, seed: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    limits = [12, 15, 8, 8, 8, 9, 9, 15, 15]
    ids = torch.stack([torch.randint(0, limit, (n,), generator=draw) for limit in limits], dim=1).int()
    labels = (torch.rand(n, 2, generator=draw) < 0.4).float()
    return Batch(ids, torch.randn(n, 5, generator=draw), labels, torch.ones(n), torch.zeros(n).int())


class Probe(Interaction):
    """``x0`` and its side inputs side by side."""

    def __init__(self, features: int | FieldLayout) -> None:
        super().__init__(as_layout(features).width, 0)

    def reading(self, sides: Any, features: FieldLayout) -> Probe:
        self.sides = sides
        self.out_features = features.width + sum(side.width(features) for side in sides)
        return self

    def forward(self, x0: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        return torch.cat([x0, *sides], dim=1)

    def flops(self) -> int:
        return 0


@pytest.fixture
def ranker(monkeypatch):
    """Makes a model whose interaction reads the given side inputs, and passes them all on."""

    def make(sides: Any, seed: int = 0, layout: EncodedLayout | None = None, **embedding: Any) -> Ranker:
        def build(spec: Any, features: FieldLayout, num_tasks: int | None = None) -> Interaction:
            return Probe(features).reading(sides, features)

        monkeypatch.setattr(interactions, "build", build)
        raw = {"embedding": {"dim": 4, **embedding}, "deep": {"hidden": (8,)}}
        torch.manual_seed(seed)
        return Ranker(ModelConfig.model_validate(raw), SCHEMA, layout or encoded())

    return make


# First-order terms ------------------------------------------------------------------------------------------


def test_first_order_terms_are_weights_of_ids_and_numbers() -> None:
    torch.manual_seed(0)
    layout, config = encoded(), EmbeddingConfig(dim=4, init_std=1.0)
    fields = Embedder(layout, SCHEMA, config).layout
    module = SideEmbedder((FirstOrder(),), layout, SCHEMA, config, fields)
    (terms,) = module.parts
    weight = torch.arange(1.0, 11.0)
    with torch.no_grad():
        terms.weight.copy_(weight)
    batch = a_batch(6)
    (found,) = module(batch.ids, batch.dense)
    assert found.shape == (6, len(SCHEMA.features))
    tables = {name: terms.embedder.table(name).numpy()[:, 0] for name in ROWS}
    for row, ids, dense in zip(found.detach().numpy(), batch.ids.numpy(), batch.dense.numpy(), strict=True):
        seen = [i for i in ids[7:9] if i]
        topics = [i for i in ids[2:5] if i]
        expected = [
            tables["user"][ids[0]],
            tables["ad"][ids[1]],
            3 * dense[0] + 4 * dense[1],  # the number and its indicator
            tables["topics"][topics].mean() if topics else 0,
            tables["place"][ids[5:7]].sum(),  # both hashes
            tables["ad"][seen].mean() if seen else 0,
            8 * dense[2] + 9 * dense[3] + 10 * dense[4],  # the vector as it is given, not its projection
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)


def test_a_first_order_term_is_one_number_an_id(ranker) -> None:
    model = ranker((FirstOrder(),), dims={"ad": 7})
    (table,) = model.sides.tables().values()
    assert table.shape == (sum(ROWS.values()), 1)
    dense = [p for p in model.sides.parameters() if p is not table]
    assert [p.shape for p in dense] == [(10,)]
    assert model.sides.flops() == 0


# Second embedding -------------------------------------------------------------------------------------------


def test_a_second_embedding_has_the_same_fields_from_tables_of_its_own(ranker) -> None:
    model = ranker((SecondEmbedding(),), dims={"ad": 7}, normalise="layer")
    batch = a_batch()
    x0, second = model.embedder(batch.ids, batch.dense), model.sides(batch.ids, batch.dense)[0]
    assert second.shape == x0.shape
    assert not torch.allclose(second, x0, atol=0.1)
    model.sides.parts[0].load_state_dict(model.embedder.state_dict())
    assert torch.equal(model.sides(batch.ids, batch.dense)[0], x0)
    assert model.flops()["embedding"] == 2 * model.embedder.flops() == 2 * 2 * 3 * 2


# Crossed ids ------------------------------------------------------------------------------------------------

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The generator's output for a state, in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def crossed(side: CrossedIds, names: str = "abc", rows: int = 1 << 30) -> Any:
    """The part of a log with single ids of these names alone; its tables are never made."""
    schema = a_schema([{"name": name, "kind": "categorical"} for name in names])
    slots = tuple(IdSlot(name, name, "context", i, 1) for i, name in enumerate(names))
    layout = EncodedLayout(slots, (), dict.fromkeys(names, rows), ("click", "save"))
    fields = FieldLayout.build([(name, "categorical", "context", 4) for name in names])
    return SideEmbedder((side,), layout, schema, EmbeddingConfig(dim=4), fields).parts[0]


@pytest.mark.parametrize(("order", "hashes"), [(2, 1), (2, 2), (3, 2), (1, 3)])
def test_codewords_are_those_of_the_hash_in_plain_integers(order: int, hashes: int) -> None:
    side = CrossedIds(rows=1009, dim=2, hashes=hashes, order=order)
    part = crossed(side, "abcd")
    ids = torch.randint(0, 1 << 30, (20, 4), dtype=torch.int32)
    expected = []
    for row in ids.tolist():
        expected.append([])
        for place, members in enumerate(combinations(range(4), order)):
            for number in range(hashes):
                key = splitmix64(1 + place * hashes + number)
                for member in members:
                    key = splitmix64(key ^ row[member])
                # The remainder of the key as a signed number.
                expected[-1].append((key - (1 << 64) if key >> 63 else key) % 1009)
    assert part.codewords(ids).tolist() == expected
    assert torch.equal(part.codewords(ids.long()), part.codewords(ids))
    found = part(ids, torch.zeros(20, 0))
    assert torch.equal(found, part.weight[torch.tensor(expected)].flatten(1))
    assert found.shape == (20, side.width(FieldLayout.uniform(4, 4)))


def test_large_ids_stay_exact() -> None:
    """Next to 2^24 and 2^30 a float32 holds no odd number."""
    part = crossed(CrossedIds(rows=1 << 20, dim=1, hashes=1), "ab")
    for large in (1 << 24, (1 << 30) - 2):
        ids = torch.tensor([[large, 5], [large + 1, 5], [5, large], [5, large + 1]], dtype=torch.int32)
        assert len(set(part.codewords(ids).flatten().tolist())) == 4


def test_neither_fields_nor_combinations_are_mixed_up() -> None:
    """(3, 8) is not (8, 3), and the same ids in other fields have other codewords."""
    part = crossed(CrossedIds(rows=1 << 20, dim=1, hashes=2), "abc")
    ids = torch.tensor([[3, 8, 3], [8, 3, 8]], dtype=torch.int32)
    assert part.codewords(ids).unique().numel() == 2 * 3 * 2


def test_combinations_spread_evenly_and_their_hashes_apart() -> None:
    """Two fields of consecutive ids, 90,000 crosses in 1,000 codewords: chi-squared within 5 deviations."""
    part = crossed(CrossedIds(rows=1000, dim=1, hashes=2), "ab")
    ids = torch.cartesian_prod(torch.arange(300), torch.arange(300)).int()
    first, second = part.codewords(ids).unbind(1)
    for codewords in (first, second):
        counts = codewords.bincount(minlength=1000).double()
        chi = ((counts - 90) ** 2 / 90).sum().item()
        assert abs(chi - 999) < 5 * (2 * 999) ** 0.5
    # What collides in one hash is spread by the other.
    assert (first == second).double().mean().item() == pytest.approx(1e-3, abs=5e-4)
    both = (first * 1000 + second).unique().numel()
    expected = 1e6 * (1 - np.exp(-0.09))
    assert both == pytest.approx(expected, rel=0.01)


def test_only_single_ids_are_crossed(ranker) -> None:
    """Of the schema's fields: user, ad and place (by its first hash), but no list."""
    model = ranker((CrossedIds(1 << 16, 2),))
    (part,) = model.sides.parts
    assert part.columns.tolist() == [0, 1, 5]
    batch = a_batch(8)
    before = part.codewords(batch.ids)
    for column, changes in ((0, [0, 1]), (1, [0, 2]), (5, [1, 2]), (2, []), (6, []), (7, [])):
        ids = batch.ids.clone()
        ids[:, column] += 1
        changed = (part.codewords(ids) != before).reshape(8, 3, 2).any(dim=2).all(dim=0)
        assert changed.nonzero().flatten().tolist() == changes


def test_too_few_ids_to_cross_are_refused(ranker) -> None:
    assert ranker((CrossedIds(8, 2, order=3),)).sides.widths == [4]
    with pytest.raises(UserError, match="crosses of 4 ids .* the schema has 3"):
        ranker((CrossedIds(8, 2, order=4),))


# In a whole model -------------------------------------------------------------------------------------------


@every_side
def test_sides_reach_the_interaction_in_order(sides: Any, ranker) -> None:
    model, batch = ranker(sides).eval(), a_batch()
    whole = model.embed(batch.ids, batch.dense)
    assert whole.shape[1] == sum(model.scorer.inputs)
    expected = [model.embedder(batch.ids, batch.dense)]
    for part in model.sides.parts:
        expected.append(part(batch.ids, batch.dense))
    assert [each.shape[1] for each in expected] == model.scorer.inputs
    assert torch.equal(whole, torch.cat(expected, dim=1))
    _, crossed = model.scorer._crossed(whole)
    assert torch.equal(crossed, whole)


@every_side
def test_a_step_moves_every_parameter_and_only_the_rows_read(sides: Any, ranker) -> None:
    model, batch = ranker(sides).train(), a_batch(10)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    tables = model.tables()
    optimisers = build_optimisers(Config.model_fields["training"].default.optimiser, model)
    losses = []
    for _ in range(20):
        model.zero_grad()
        losses.append(backpropagate(model, batch, torch.ones(2)).item())
        for name, value in model.named_parameters():
            assert value.grad is not None
            assert value.grad.is_sparse == (name in tables), name
        for optimiser in optimisers:
            optimiser.step()
    assert losses[-1] < losses[0]
    for name, value in model.named_parameters():
        moved = (value != start[name]).flatten(1).any(1) if value.dim() > 1 else value != start[name]
        assert moved.any(), name
        if name in tables:
            assert value.grad is not None
            touched = torch.zeros(len(value), dtype=torch.bool)
            touched[value.grad.coalesce().indices()[0]] = True
            assert not (moved & ~touched).any(), name
            assert not touched.all()


@every_side
def test_gradients_are_the_dense_ones_however_the_batch_is_cut(sides: Any, ranker, monkeypatch) -> None:
    model, batch = ranker(sides, init_std=0.5).double(), a_batch()
    batch = Batch(*(each.double() if each.is_floating_point() else each for each in vars(batch).values()))

    def gradients(numbers: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(model_module, "PART_NUMBERS", numbers)
        model.zero_grad()
        backpropagate(model, batch, torch.ones(2))
        return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, cut = gradients(1 << 20), gradients(7 * sum(model.scorer.inputs))
    assert len(model.parts(40, torch.device("cpu"))) == 10
    assert whole.keys() == cut.keys() == dict(model.named_parameters()).keys()

    def loss() -> float:
        with torch.no_grad():
            logits = model(batch.ids, batch.dense)
            each = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, batch.labels, reduction="none"
            )
        return each.mean(dim=0).sum().item()

    for name, value in model.named_parameters():
        torch.testing.assert_close(cut[name], whole[name])
        flat, grad = value.detach().view(-1), whole[name].view(-1)
        for i in grad.abs().argsort(descending=True)[:3].tolist():
            ends = []
            for change in (1e-6, -2e-6):
                flat[i] += change
                ends.append(loss())
            flat[i] += 1e-6
            assert grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-8), name


@every_side
def test_relevance_is_the_forward_pass_in_parts(sides: Any, ranker, monkeypatch) -> None:
    model, batch = ranker(sides).eval(), a_batch()
    with torch.no_grad():
        whole = model(batch.ids, batch.dense)
    monkeypatch.setattr(model_module, "PART_NUMBERS", 8 * sum(model.scorer.inputs))
    assert len(model.parts(40, torch.device("cpu"))) == 5
    torch.testing.assert_close(model.relevance(batch.ids, batch.dense), whole)
    one = model.relevance(batch.ids[:1], batch.dense[:1])
    torch.testing.assert_close(one, whole[:1])
    assert model.relevance(batch.ids[:0], batch.dense[:0]).shape == (0, 2)


@every_side
def test_weights_survive_a_file(sides: Any, ranker, tmp_path) -> None:
    model, other, batch = ranker(sides).eval(), ranker(sides, seed=5).eval(), a_batch()
    save_weights(model, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(other(batch.ids, batch.dense), model(batch.ids, batch.dense))
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        # What follows from the config (columns, salts, masks) is not in it.
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}


def test_names_of_tables_are_stable(ranker) -> None:
    model = ranker(SIDES["all"])
    assert list(model.spans()) == list(model.tables())
    assert {name: dict(spans) for name, spans in model.spans().items() if name.startswith("sides")} == {
        "sides.parts.1.embedder.stacks.width_1.weight": {
            "user": slice(0, 12),
            "ad": slice(12, 27),
            "topics": slice(27, 35),
            "place": slice(35, 44),
        },
        "sides.parts.2.stacks.width_4.weight": {
            "user": slice(0, 12),
            "ad": slice(12, 27),
            "topics": slice(27, 35),
            "place": slice(35, 44),
        },
        "sides.parts.0.weight": {"codebook": slice(0, 31)},
        "sides.parts.3.weight": {"codebook": slice(0, 50)},
    }
    for name, spans in model.spans().items():
        assert max(rows.stop for rows in spans.values()) == len(model.tables()[name])
    counts = model.parameter_counts()
    assert counts["embedding"] == 44 * (4 + 1 + 4) + 31 * 2 + 50 * 4
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


# From a log -------------------------------------------------------------------------------------------------


def write_day(path: Any, day: int, ads: Any) -> None:
    rng = np.random.default_rng(day)
    ad, user = rng.choice(ads, 800), rng.integers(0, 20 * day, 800)
    click = rng.random(800) < 1 / (1 + np.exp(2 - 3 * ((ad + user) % 3 == 0)))
    frame = {"user": user, "ad": ad, "place": rng.integers(0, 5, 800), "price": rng.exponential(day, 800)}
    pl.DataFrame({**frame, "click": click.astype(int)}).write_parquet(path)


def a_config(log: Any, interaction: dict[str, Any]) -> Config:
    features = [{"name": name, "kind": "categorical"} for name in ("user", "ad", "place")]
    raw = {
        "data": {"train": [str(log)], "split": {"kind": "hash", "valid": 0.2, "test": 0.2}},
        "schema": {
            "features": [*features, {"name": "price", "kind": "numeric", "transform": "log"}],
            "labels": [{"name": "click"}],
        },
        "model": {"embedding": {"dim": 4}, "interaction": interaction, "deep": {"hidden": [8]}},
        "training": {
            "threads": 1,
            "epochs": 1,
            "batch_size": 128,
            "keep_optimiser": True,
            "optimiser": {"lr": 0.01},
        },
    }
    return parse(Config, raw, "test")


@pytest.mark.parametrize(
    "interaction",
    [{"name": "deepfm", "hidden": [8]}, {"name": "afn_plus"}, {"name": "hcnet"}],
    ids=lambda spec: spec["name"],
)
def test_a_run_is_trained_served_and_gone_on_from(interaction: dict[str, Any], tmp_path) -> None:
    write_day(tmp_path / "1.parquet", 1, np.arange(10))
    write_day(tmp_path / "2.parquet", 2, np.arange(5, 25))
    wanted = a_config(tmp_path / "1.parquet", interaction)
    data = prepare(wanted, tmp_path / "encoded-1")
    fit(wanted, RunFolder.create(tmp_path / "run"), data)
    old = Predictor.load(tmp_path / "run")
    raw = pl.read_parquet(tmp_path / "1.parquet").to_arrow()
    scores = old.predict_table(raw)
    assert np.isfinite(scores).all()
    batch = next(iter(data.train.batches(64)))
    with torch.no_grad():
        expected = old.model.eval()(batch.ids, batch.dense)
    torch.testing.assert_close(old.model.relevance(batch.ids, batch.dense), expected)

    # The next day has more ads and users: their rows move in all tables, and the old rows' scores stay.
    start = WarmStart.open(tmp_path / "run", "keep", "keep")
    wanted = start.adapt(a_config(tmp_path / "2.parquet", interaction))
    data = prepare(wanted, tmp_path / "encoded-2", base=start.encoder(), statistics="keep")
    trainer = Trainer(wanted, RunFolder.create(tmp_path / "new"), data, [], start)
    before, after = old.model, trainer.model
    assert data.encoder.layout.tables["ad"] > old.encoder.layout.tables["ad"]
    state = dict(after.named_parameters())
    for name, spans in before.spans().items():
        moments = trainer.optimisers[1].state[state[name]]
        assert moments, name
        for table, rows in spans.items():
            new = after.spans()[name][table]
            kept = state[name][new.start : new.start + rows.stop - rows.start]
            assert torch.equal(kept, before.tables()[name][rows]), name
    served = Predictor.load(tmp_path / "run")
    served.model, served.encoder = after.eval(), data.encoder
    assert np.array_equal(served.predict_table(raw), scores)
    after.train()
    batch = next(iter(data.train.batches(256)))
    trainer._step(batch)
    assert not np.array_equal(served.predict_table(raw), scores)
