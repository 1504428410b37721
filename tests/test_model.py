import pytest
import torch

from mldcn.config import ModelConfig
from mldcn.cost.budget import match_flops, scorer_flops
from mldcn.cost.flops import module_flops
from mldcn.data.batch import EncodedLayout, IdSlot
from mldcn.errors import UserError
from mldcn.layout import FieldLayout
from mldcn.model import Ranker, Scorer, load_weights, pick_device, save_weights
from mldcn.schema import Categorical, Label, Schema

LAYOUT = FieldLayout.build([("user", "categorical", "user", 12), ("price", "numeric", "item", 1)])
NAMES = ["mldcn", "dcnv2", "dcnv2_lowrank", "dcn_mix", "masknet_parallel", "dnn"]


def config(name="mldcn", structure="stacked", **options):
    return ModelConfig.model_validate(
        {"interaction": {"name": name, **options}, "deep": {"hidden": (16,), "structure": structure}}
    )


def ranker(positions=0):
    torch.manual_seed(0)
    layout = EncodedLayout((IdSlot("ad", "ad", "item", 0, 1),), (), {"ad": 9}, ("click", "save"), positions)
    schema = Schema(
        features=(Categorical(name="ad", kind="categorical"),),
        labels=(Label(name="click"), Label(name="save")),
    )
    return Ranker(config(rank=2, num_layers=1), schema, layout).eval()


IDS, DENSE = torch.arange(9, dtype=torch.int32).reshape(9, 1), torch.zeros(9, 0)


@pytest.mark.parametrize("structure", ["stacked", "parallel"])
@pytest.mark.parametrize("name", NAMES)
def test_flops_by_part_are_what_torch_counts(name, structure):
    scorer = Scorer(config(name, structure), LAYOUT, ("click", "save"))
    assert sum(scorer.flops().values()) == module_flops(scorer, torch.randn(4, LAYOUT.width))
    assert scorer(torch.randn(1, LAYOUT.width)).shape == (1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_meets_the_reference_budget(name):
    layout = FieldLayout.uniform(10, 16)
    tasks = ("click",)
    budget = scorer_flops(config(rank=40), layout, tasks)
    start = config(name, num_blocks=2, reduction_ratio=0.25) if name == "masknet_parallel" else config(name)
    matched = match_flops(start, layout, tasks, budget)
    assert scorer_flops(matched, layout, tasks) == pytest.approx(budget, rel=0.01)


def test_a_budget_that_no_width_meets_is_refused():
    with pytest.raises(UserError, match="no rank and deep.hidden comes within"):
        match_flops(config(), FieldLayout.uniform(10, 16), ("click",), 100)


def test_positions_are_learned_and_fixed_in_serving():
    model = ranker(positions=4)
    with torch.no_grad():
        model.position_bias.weight.copy_(torch.arange(10.0).reshape(5, 2))
    logged = torch.full((9,), 3)
    plain = model.scorer(model.embedder(IDS, DENSE))
    torch.testing.assert_close(model(IDS, DENSE, logged), plain + torch.tensor([6.0, 7.0]))
    torch.testing.assert_close(model(IDS, DENSE), plain + torch.tensor([2.0, 3.0]))


def test_weights_round_trip_and_refuse_another_model(tmp_path):
    model, other = ranker(), ranker(positions=4)
    with torch.no_grad():
        model.scorer.heads.logits[0].bias.fill_(3.0)
    save_weights(model, tmp_path / "w.safetensors")
    copy = ranker()
    load_weights(copy, tmp_path / "w.safetensors")
    assert torch.equal(copy(IDS, DENSE), model(IDS, DENSE))
    with pytest.raises(UserError, match="does not fit"):
        load_weights(other, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(copy, tmp_path / "w.safetensors")


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="no device 'gpu'"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            pick_device("cuda")


def test_parameters_are_counted_once():
    model = ranker(positions=4)
    counts = model.parameter_counts()
    assert counts["embedding"] == 9 * 16
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
