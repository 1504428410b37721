"""What candidates of a request share is computed once, and their scores are those of rows scored one by one."""

import numpy as np
import pytest
import torch
from torch import nn

from every_feature import FEATURES, SIMPLE, config, log, make_run
from mldcn.errors import UserError
from mldcn.predict import Predictor
from mldcn.serving import hybrid
from mldcn.serving.engine import Engine
from mldcn.serving.export import _exported, export_run, made_up
from mldcn.serving.program import Body, Tables, look_ups, table_files
from mldcn.serving.rewriting import PerRequest, Rewritten
from mldcn.serving.sharing import divided
from mldcn.serving.store import write_table

# Quicker to export: no sequence with a target, whose pooling is a candidate's own.
SHORT = [FEATURES[i] for i in (0, 1, 4, 6, 7, 9)]

# By model: how its x0 is normalised, and how many products are cut in blocks.
MODELS = {
    "dnn": ({"name": "dnn"}, "layer", 1),
    "dcnv2": ({"name": "dcnv2", "num_layers": 2}, "none", 1),
    "dcnv2_lowrank": ({"name": "dcnv2_lowrank", "num_layers": 2, "rank": 4}, "l2", 1),
    "mldcn": ({"name": "mldcn_plain", "num_layers": 2, "rank": 4}, "batch", 1),
    "norm at the entry": (
        {"name": "mldcn_plain", "num_layers": 1, "rank": 4, "input_norm": "layer"},
        "none",
        1,
    ),
    "masknet": ({"name": "masknet", "num_layers": 2}, "layer", 1),
    "masknet_parallel": ({"name": "masknet_parallel", "num_blocks": 2}, "none", 1),
    "crossed ids": ({"name": "hcnet"}, "none", None),
    "tokens": ({"name": "autoint"}, "none", None),
}


def bundled(path, interaction, normalise, features=FEATURES, to="torch-export", **options):
    run = make_run(path / "run", normalised(interaction, normalise, features))
    export_run(Predictor.load(run.path, "cpu"), to, path / "bundle", **options)
    return Engine.load(run.path, "cpu"), Engine.load(path / "bundle", "cpu")


def asked(engine, rows):
    """One request of a log's rows: the first row's user and context for all of them."""
    constant = {name: rows.column(name)[0].as_py() for name in sorted(engine.constant)}
    names = [each.name for each in engine.inputs if each.name not in constant]
    return constant, {name: rows.column(name).to_pylist() for name in names}


def normalised(interaction, normalise, features):
    made = config(interaction, features)
    embedding = made.model.embedding.model_copy(update={"normalise": normalise})
    return made.model_copy(update={"model": made.model.model_copy(update={"embedding": embedding})})


@pytest.mark.parametrize("name", MODELS)
def test_a_program_over_requests_equals_the_one_over_rows(tmp_path, name):
    interaction, normalise, blocks = MODELS[name]
    run = make_run(
        tmp_path, normalised(interaction, normalise, FEATURES if name in ("dnn", "crossed ids") else SHORT)
    )
    predictor = Predictor.load(run.path, "cpu")
    plan = look_ups(predictor.model, "fp32")
    for each, weight in zip(plan, predictor.model.tables().values(), strict=True):
        write_table(weight, tmp_path / each.file, "fp32")
    body = Body(predictor.model).eval().requires_grad_(False)
    division = divided(predictor.config.log_schema, predictor.encoder.layout, plan)
    tables, first, own = (
        Tables(table_files(tmp_path), each) for each in (plan, division.first, division.own)
    )
    rows = [torch.from_numpy(each) for each in made_up(predictor.encoder.layout, 60)]
    request = torch.arange(5).repeat_interleave(torch.tensor([7, 1, 30, 2, 20]))
    heads = torch.tensor([0, 7, 8, 38, 40])
    for each, shared in zip(rows, division.columns[:2], strict=True):
        each[:, shared] = each[heads][request][:, shared]
    expected = body(*rows, tables.look_up(rows[0]))
    exported = _exported(body, *rows, tables.look_up(rows[0]))
    over_rows = Rewritten(exported)(*rows, tables.look_up(rows[0]))
    torch.testing.assert_close(over_rows, expected, atol=1e-5, rtol=0)
    program = PerRequest(exported, division.columns)
    inputs = (
        [each[heads] for each in rows],
        rows,
        first.look_up(rows[0][heads]),
        own.look_up(rows[0]),
        request,
    )
    found = program(*inputs)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if blocks is not None:
        assert sum(name.endswith("_own") for name, _ in program.named_buffers()) == blocks


def test_scores_of_several_requests_in_one_batch_are_those_of_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(hybrid, "SHARED_FROM", 32)
    run, engine = bundled(tmp_path, {"name": "deepfm"}, "layer")
    program = engine.program
    assert program.per_request is not None
    rows = log(60, seed=3, unseen=True)
    calls, expected = [], []
    for start, size in ((0, 7), (7, 1), (8, 30), (38, 2), (40, 20)):
        request = asked(engine, rows.slice(start, size))
        calls.append(engine.encode_rank(*request))
        # Row by row, with all columns repeated: nothing is shared.
        row = {name: [value] for name, value in request[0].items()}
        for i in range(size):
            each = row | {name: values[i : i + 1] for name, values in request[1].items()}
            expected.append(run.score(each).probabilities)
    expected = np.concatenate(expected)
    assert expected.std() > 0.02
    found = [scores.probabilities for scores in engine.score_rows(calls)]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5, rtol=0)
    # Rows of no request among them.
    mixed = engine.score_rows([engine.encode(each), *calls])
    np.testing.assert_allclose(mixed[0].probabilities, expected[-1:], atol=1e-5, rtol=0)
    np.testing.assert_allclose(mixed[3].probabilities, expected[8:38], atol=1e-5, rtol=0)
    ids, dense = (np.concatenate([getattr(call, side) for call in calls]) for side in ("ids", "dense"))
    request = np.repeat(np.arange(5), [7, 1, 30, 2, 20])
    assert program.look_up(ids, dense, request).function is program.per_request.function
    assert program.look_up(ids[:5], dense[:5], np.arange(5)).function is program.function


def test_requests_are_encoded_as_their_rows_are(tmp_path):
    run = make_run(tmp_path / "run", config({"name": "dnn"}))
    engine = Engine.load(run.path, "cpu")
    for seed in range(5):
        constant, candidates = asked(engine, log(9, seed, unseen=True))
        found = engine.encode_rank(constant, candidates)
        repeated = {name: [value] * 9 for name, value in constant.items()}
        expected = engine.encode(repeated | candidates)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.dense, expected.dense)
        assert (found.unseen, found.missing) == (expected.unseen, expected.missing)
        assert found.request
        assert not expected.request
    empty = engine.encode_rank(constant, {name: [] for name in candidates})
    assert (len(empty), empty.request) == (0, True)
    # A user's column a candidate: the rows need not agree, and are encoded one by one.
    candidates["user"] = [constant.pop("user")] * 9
    other = engine.encode_rank(constant, candidates)
    np.testing.assert_array_equal(other.ids, found.ids)
    assert not other.request


def test_what_is_wrong_with_a_request_is_said_as_before(tmp_path):
    engine = Engine.load(make_run(tmp_path / "run", config({"name": "dnn"})).path, "cpu")
    constant, candidates = asked(engine, log(3))
    with pytest.raises(UserError, match="'user' is given once for the request and again"):
        engine.rank(constant, candidates | {"user": ["u1"] * 3})
    with pytest.raises(UserError, match="there are no candidates"):
        engine.rank(constant, {})
    with pytest.raises(UserError, match="no feature reads 'itme'"):
        engine.rank(constant, candidates | {"itme": ["i1"] * 3})
    with pytest.raises(UserError, match="no feature reads 'usr'"):
        engine.rank(constant | {"usr": "u1"}, candidates)
    with pytest.raises(UserError, match="'item' is lacking"):
        engine.rank(constant, {name: values for name, values in candidates.items() if name != "item"})
    with pytest.raises(UserError, match="'user' is lacking"):
        engine.rank({name: value for name, value in constant.items() if name != "user"}, candidates)
    with pytest.raises(UserError, match="row 1, column 'age': 'old' is not a number"):
        engine.rank(constant | {"age": "old"}, candidates)
    with pytest.raises(UserError, match="row 3, column 'price': 'dear' is not a number"):
        engine.rank(constant, candidates | {"price": [1.0, 2.0, "dear"]})


def test_a_model_of_items_alone_shares_nothing(tmp_path):
    _, engine = bundled(tmp_path, {"name": "dnn"}, "none", [FEATURES[4], FEATURES[5]])
    assert engine.program.per_request is None
    request = engine.sample()
    assert len(engine.rank(request["constant"], request["candidates"])) == 4


class Odd(nn.Module):
    """Operations that no model of ours has in this form, on ids (B, 4), dense (B, 6) and rows (B, 4, 2)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.batch = nn.BatchNorm1d(6).eval()
        self.norm = nn.LayerNorm(6)

    def forward(self, ids, dense, rows):
        tokens = rows[0] * 2 + rows[0].relu()
        pairs = torch.stack([dense[:, 0], tokens.sum((1, 2)), dense[:, 5]], dim=1)
        turned = tokens.transpose(0, 1).reshape(4, -1).sum(0).reshape(-1, 2)
        mixed = self.batch(dense) + dense.flip(1) * (ids[:, :1] != 0)
        product = nn.functional.linear(self.norm(dense + 3.0), self.weight * 2)
        zeros = dense.new_zeros(dense.shape[0], 1) + dense.mean(1, keepdim=True)
        summed = (
            tokens.sum(1) + rows[0].amax(1) + tokens.select(1, 1) + tokens[:, 2:].softmax(2).flatten(1)[:, :2]
        )
        return torch.cat(
            [pairs, turned, mixed, product, zeros, summed, tokens.view(-1, 2, 4).flatten(1)], dim=1
        )


def test_operations_of_every_form_are_those_of_the_rows():
    torch.manual_seed(0)
    flags = ([True, False, True, True], [True, True, False, False, False, True], [True, False, False, True])
    rows = torch.randint(0, 3, (9, 4), dtype=torch.int32), torch.randn(9, 6), torch.randn(9, 4, 2)
    request = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    first = torch.tensor([0, 3, 4])
    for each, shared in zip(rows, flags, strict=True):
        each[:, shared] = each[first][request][:, shared]
    module = Odd().requires_grad_(False)
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(
        module, (rows[0], rows[1], [rows[2]]), dynamic_shapes={"ids": batch, "dense": batch, "rows": [batch]}
    )
    inputs = (
        (rows[0][first], rows[1][first]),
        (rows[0], rows[1]),
        [rows[2][first][:, flags[2]]],
        [rows[2][:, [not shared for shared in flags[2]]]],
        request,
    )
    found = PerRequest(program, flags)(*inputs)
    torch.testing.assert_close(found, module(rows[0], rows[1], [rows[2]]), atol=1e-5, rtol=0)


def test_a_norm_far_from_zero_keeps_its_digits():
    torch.manual_seed(0)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.linear = nn.Linear(64, 8)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

        def forward(self, ids, dense, rows):
            return self.linear(self.norm(dense))

    module = Normed().requires_grad_(False)
    flags = ([True], [True] * 40 + [False] * 24)
    ids, dense = torch.zeros(6, 1, dtype=torch.int32), torch.randn(6, 64) + 30.0
    dense[:, :40] = dense[0, :40] - 25.0
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(
        module, (ids, dense, []), dynamic_shapes={"ids": batch, "dense": batch, "rows": []}
    )
    inputs = ((ids[:1], dense[:1]), (ids, dense), [], [], torch.zeros(6, dtype=torch.int64))
    exact = module.double()(ids, dense.double(), [])
    module.float()
    found = PerRequest(program, flags)(*inputs)
    assert (found - exact).abs().max() < 1e-5
    torch.testing.assert_close(found, module(ids, dense, []), atol=1e-5, rtol=0)


def test_bf16_and_int8_bundles_answer_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(hybrid, "SHARED_FROM", 32)
    run, engine = bundled(
        tmp_path, {"name": "mldcn_plain", "rank": 4}, "layer", SIMPLE, dtype="bf16", embeddings="int8"
    )
    request = asked(engine, log(60, seed=4))
    found, expected = (each.rank(*request).probabilities for each in (engine, run))
    assert np.abs(found - expected).max() < 0.1
