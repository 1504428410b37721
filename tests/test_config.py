import pytest
import yaml

from mldcn.config import Config, dump_config, load_config, parse
from mldcn.errors import UserError
from mldcn.schema import Schema

MINIMAL = {"schema": {"features": [{"name": "ad", "kind": "categorical"}], "labels": [{"name": "click"}]}}


def complaint(**changes):
    with pytest.raises(UserError) as caught:
        parse(Config, {**MINIMAL, **changes}, "c.yaml")
    return str(caught.value)


def schema(**feature):
    return {"features": [{"name": "ad", "kind": "categorical", **feature}], "labels": [{"name": "click"}]}


def test_minimal_config_fills_every_default_and_round_trips():
    config = parse(Config, MINIMAL, "c.yaml")
    assert config.model.interaction == {"name": "mldcn"}
    assert parse(Config, yaml.safe_load(dump_config(config)), "again") == config


def test_unknown_key_names_file_key_and_nearest():
    assert complaint(trainin={}) == "c.yaml: trainin: no such key; did you mean 'training'?"
    assert complaint(training={"epoch": 3}) == "c.yaml: training.epoch: no such key; did you mean 'epochs'?"


def test_unknown_key_inside_a_feature_is_found_behind_the_union():
    text = complaint(schema=schema(encoding={"kind": "vocabulary", "min_cnt": 2}))
    assert text == "c.yaml: schema.features.0 (ad).encoding.min_cnt: no such key; did you mean 'min_count'?"


def test_wrong_type_is_refused_not_converted():
    assert "training.epochs: Input should be a valid integer (found '3')" in complaint(
        training={"epochs": "3"}
    )
    assert "training.amp: Input should be 'off' or 'bf16' (found 'fp16')" in complaint(
        training={"amp": "fp16"}
    )


def test_out_of_range_is_refused():
    assert "model.embedding.dropout" in complaint(model={"embedding": {"dropout": 1.0}})


def test_unknown_kind_lists_the_kinds():
    assert "'numeric', 'bucketised', 'categorical'" in complaint(schema=schema(kind="categorial"))


def test_wrong_references_in_the_schema():
    twice = schema()
    twice["features"] *= 2
    assert "given twice: ad" in complaint(schema=twice)
    assert "share names 'pin'" in complaint(schema=schema(share="pin"))
    sequence = {"name": "recent", "kind": "sequence", "share": "ad", "pooling": "attention", "target": "ads"}
    both = {**schema(), "features": [*schema()["features"], sequence]}
    assert "target 'ads' is no categorical feature" in complaint(schema=both)


def test_overrides_reach_into_the_tree(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(file, ["training.epochs=3", "model.interaction.rank=8", "data.split={kind: order}"])
    assert config.training.epochs == 3
    assert config.model.interaction == {"name": "mldcn", "rank": 8}
    assert config.data.split.kind == "order"


@pytest.mark.parametrize("override", ["training.epochs", "training.epochs.x=1", "training.epochs=[3"])
def test_bad_overrides(tmp_path, override):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "training": {"epochs": 1}}))
    with pytest.raises(UserError, match="--set"):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("text", "says"), [("a: [", "not YAML"), ("- 1", "expected a mapping"), (None, "cannot be read")]
)
def test_unreadable_files(tmp_path, text, says):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=says):
        load_config(file)


def test_yaml_cannot_run_code(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("schema: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="not YAML"):
        load_config(file)


def test_a_label_is_no_feature():
    raw = {
        "features": [{"name": "a", "kind": "numeric"}, {"name": "b", "kind": "numeric", "column": "clicked"}],
        "labels": [{"name": "click", "column": "clicked"}],
    }
    with pytest.raises(UserError, match="column 'clicked' is a label"):
        parse(Schema, raw, "test")


@pytest.mark.parametrize("text", ["a: 1\nb: {c: 1\nd: 2\n", "a: [", "a:\n\t- b", "a: 'b", "a: \x00"])
def test_what_is_not_yaml_is_said_in_one_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="not YAML") as caught:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_an_open_bracket_is_found_where_it_was_opened(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1\nb: {c: 1\nd: [\n")
    with pytest.raises(UserError, match=r"line 3, column 2: not YAML: .* that begins in line 2$"):
        load_config(tmp_path / "c.yaml")


def test_a_feature_without_a_kind():
    feature = schema()
    del feature["features"][0]["kind"]
    assert "schema.features.0 (ad).kind: missing" in complaint(schema=feature)
    assert "schema.features.0 (ad).kind: no kind is called 'x'; known: 'numeric'" in complaint(
        schema=schema(kind="x")
    )
