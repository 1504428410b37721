"""The constructor's options are the config: strict, frozen, with errors that name the remedy."""

from typing import get_args

import pydantic
import pytest

from mldcn import interactions
from mldcn.errors import UserError
from mldcn.interactions import DNN, MLDCN, DCNMix, DCNV2LowRank, Interaction, MaskNet, register


def test_a_config_spells_out_every_default_and_builds_the_same_module():
    config = interactions.parse({"name": "mldcn", "rank": 8})
    assert config.rank == 8
    assert config.num_layers == 4
    assert interactions.parse(config.model_dump()) == config
    assert interactions.parse(config.model_dump(mode="json")) == config
    assert interactions.build(config, 16).flops() == MLDCN(16, rank=8).flops()


def test_a_config_is_frozen():
    config = interactions.parse({"name": "mldcn"})
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.rank = 3


@pytest.mark.parametrize("name", interactions.names())
def test_what_is_known_of_each(name):
    known = interactions.info(name)
    assert known.title
    assert known.paper
    assert 1900 < known.year < 2030
    assert known.order
    assert known.cost
    for knob in (known.knob, known.secondary):
        assert knob is None or knob in known.config.model_fields
    assert known.config is interactions.config_of(name)
    assert get_args(known.config.model_fields["name"].annotation) == (name,)
    assert known.cls.__doc__
    assert "Args:" in known.cls.__doc__
    documented = known.cls.__doc__
    assert [
        option for option in known.cls.Options.model_fields if f"        {option}: " not in documented
    ] == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "mldnc"}, "did you mean 'mldcn'"),
        ({}, "a name is needed"),
        ({"name": 3}, "a name is needed"),
        ({"name": "mldcn", "rnak": 3}, "interaction mldcn: rnak: no such key; did you mean 'rank'"),
        ({"name": "mldcn", "rank": "3"}, r"rank: .*integer \(found '3'\)"),
        ({"name": "mldcn", "rank": 2.5}, "rank: .*integer"),
        ({"name": "mldcn", "rank": 0}, r"rank: .*greater than or equal to 1 \(found 0\)"),
        ({"name": "mldcn", "mask_ratio": 0}, "mask_ratio: .*greater than 0"),
        ({"name": "mldcn", "mask_ratio": float("nan")}, "mask_ratio"),
        ({"name": "mldcn", "norm": "brnch"}, "norm: .*'branch', 'post', 'batch' or 'none'"),
        ({"name": "mldcn", "dropout": 1.0}, "dropout: .*less than 1"),
        (
            {"name": "mldcn", "norm": "post", "norm_gain": 0.0},
            "interaction mldcn: norm_gain 0 with norm post",
        ),
        ({"name": "dcn_mix", "gate": "constant", "share_gate": True}, "interaction dcn_mix: share_gate"),
        ({"name": "dnn", "hidden": [8, 0]}, "hidden.1: .*greater than or equal to 1"),
        ({"name": "dcnv2_lowrank", "relu": "yes"}, "relu: .*boolean"),
        ({"name": "homefeed", "num_blocks": True}, "num_blocks: .*integer"),
    ],
)
def test_a_wrong_config_is_refused_with_the_remedy(spec, message):
    with pytest.raises(UserError, match=message):
        interactions.build(spec, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLDCN(8, rank=0), "MLDCN: rank"),
        (lambda: MLDCN(8, mask="half"), "mask: .*'full', 'linear', 'relu' or 'none'"),
        (lambda: MLDCN(8, ranks=4), "ranks: no such key; did you mean 'rank'"),
        (lambda: MLDCN(0), "width 0"),
        (lambda: DNN(8, dropout=-0.1), "dropout"),
        (lambda: DCNMix(8, num_experts=0), "num_experts"),
        (lambda: DCNV2LowRank(8, num_layers=0), "num_layers"),
        (lambda: MaskNet(8, mask_ratio=-1.0), "mask_ratio"),
    ],
)
def test_a_constructor_refuses_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_name_is_registered_once_and_its_knob_and_defaults_exist():
    known = {"title": "x", "paper": "x", "year": 2020, "order": "1", "cost": "0"}
    with pytest.raises(ValueError, match="twice"):
        register("mldcn", **known, knob="rank")(MLDCN)
    with pytest.raises(ValueError, match="no option widht"):
        register("new", **known, knob="widht")(MLDCN)
    with pytest.raises(ValueError, match="no option rnak"):
        register("new", **known, knob=None, rnak=3)(MLDCN)
    assert "new" not in interactions.names()


def test_the_contract_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Interaction(3, 3)
