import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mldcn.config import DataConfig, TimeSplit, load_config
from mldcn.data.encoder import Encoder
from mldcn.data.inference import infer, to_yaml
from mldcn.data.reading import table_blocks
from mldcn.errors import UserError

ROWS = 400


def columns() -> dict[str, list]:
    """A log with one column of every sort."""
    draw = random.Random(0)
    click = [int(draw.random() < 0.3) for _ in range(ROWS)]
    lengths = [draw.randrange(1, 5) for _ in range(ROWS)]
    return {
        "request_id": [i // 4 for i in range(ROWS)],
        "timestamp": [1_700_000_000 + i for i in range(ROWS)],
        "user_id": [draw.randrange(50) for _ in range(ROWS)],
        "item_id": [str(draw.randrange(90)) for _ in range(ROWS)],
        "item_tags": ["|".join(draw.sample(["red", "green", "blue"], 2)) for _ in range(ROWS)],
        "user_age": [draw.choice([None, 18, 34, 50, 65]) for _ in range(ROWS)],
        "user_item_views": [draw.randrange(1000) for _ in range(ROWS)],
        "spend": [draw.lognormvariate(0, 3) for _ in range(ROWS)],
        "content_vector": [[draw.random(), draw.random(), draw.random()] for _ in range(ROWS)],
        "recent_items": [[str(draw.randrange(90)) for _ in range(n)] for n in lengths],
        "recent_items_times": [[draw.randrange(1000) for _ in range(n)] for n in lengths],
        "recent_items_actions": [[draw.choice("ab") for _ in range(n)] for n in lengths],
        "weekday": [draw.randrange(7) for _ in range(ROWS)],
        "position": [i % 4 + 1 for i in range(ROWS)],
        "row_key": [f"k{i}" for i in range(ROWS)],
        "nothing": pa.nulls(ROWS),
        "extra": [{"a": 1}] * ROWS,
        "split": [draw.choice(["train", "test"]) for _ in range(ROWS)],
        "click": click,
        "save": [c and int(draw.random() < 0.5) for c in click],
        "dwell_time": [draw.random() if c else None for c in click],
        "landing": ["page" if c else None for c in click],
        "echo": [c + draw.random() * 1.1 for c in click],
    }


@pytest.fixture(scope="module")
def inferred():
    return infer(pa.table(columns()))


def test_roles(inferred):
    assert inferred.label == "click"
    assert inferred.alternatives == ("save",)
    assert inferred.time == "timestamp"
    assert inferred.request == "request_id"
    assert inferred.user == "user_id"
    assert inferred.position == "position"
    assert inferred.rows == ROWS
    left = {column.name: column.reason for column in inferred.columns if column.role == "left out"}
    assert left == {
        "recent_items_times": "goes with recent_items",
        "recent_items_actions": "goes with recent_items",
        "row_key": "another value in every row",
        "nothing": "empty in all rows looked at",
        "split": "says which part of a split the row is in",
    }


def test_kinds_and_sources(inferred):
    features = {c.name: (c.kind, c.source) for c in inferred.columns if c.role == "feature"}
    assert features == {
        "user_id": ("categorical", "user"),
        "item_id": ("categorical", "item"),
        "item_tags": ("multi", "item"),
        "user_age": ("numeric", "user"),
        "user_item_views": ("numeric", "user_item"),
        "spend": ("numeric", "context"),
        "content_vector": ("embedding", "item"),
        "recent_items": ("sequence", "user"),
        "weekday": ("categorical", "context"),
    }
    facts = {c.name: c for c in inferred.columns}
    assert facts["item_tags"].delimiter == "|"
    assert facts["content_vector"].width == 3
    assert facts["spend"].transform == "log"
    assert facts["user_age"].missing == pytest.approx(0.2, abs=0.1)
    sequence = facts["recent_items"]
    assert (sequence.times, sequence.actions, sequence.share) == (
        "recent_items_times",
        "recent_items_actions",
        "item_id",
    )


def test_leaks_have_reasons(inferred):
    reasons = {column.name: column.reason for column in inferred.leaks}
    assert reasons.keys() == {"dwell_time", "landing", "echo"}
    assert "its name says" in reasons["dwell_time"]
    assert reasons["landing"] == "empty or zero whenever click is 0"
    assert "alone it ranks click with an AUC of 0.99" in reasons["echo"]


def test_the_config_loads_and_encodes(inferred, tmp_path):
    log = tmp_path / "log.parquet"
    pq.write_table(pa.table(columns()), log)
    path = tmp_path / "config.yaml"
    text = to_yaml(infer([log]), log)
    path.write_text(text)
    config = load_config(path)
    assert config.data.train == (str(log),)
    assert isinstance(config.data.split, TimeSplit)
    schema = config.log_schema
    assert [f.name for f in schema.features] == [c.name for c in inferred.columns if c.role == "feature"]
    assert (schema.request, schema.user, schema.time, schema.position) == (
        "request_id",
        "user_id",
        "timestamp",
        "position",
    )
    # A leak is there to read, not to use.
    assert "# - {kind: categorical, name: landing" in text
    assert "#   leak? empty or zero whenever click is 0" in text
    assert "# - {name: save, weight: 1.0}" in text
    block = next(table_blocks(pa.table(columns()), ROWS))
    assert len(Encoder.fit(schema, [block]).encode(block)) == ROWS


def test_commented_defaults_are_the_defaults(inferred, tmp_path):
    text = to_yaml(inferred, "log.parquet")
    head, marks = text.split("# The defaults of model; take off the marks to change them.")
    lines = [line.removeprefix("# ") for line in marks.splitlines() if not line.startswith("# The defaults")]
    (tmp_path / "a.yaml").write_text(head)
    (tmp_path / "b.yaml").write_text(head + "\n".join(lines))
    assert load_config(tmp_path / "a.yaml") == load_config(tmp_path / "b.yaml")


def test_text_logs_infer_like_typed_ones(inferred, tmp_path):
    rows = columns()
    del rows["extra"]
    texts = {}
    for name, cells in rows.items():
        cells = cells.to_pylist() if isinstance(cells, pa.Array) else cells
        texts[name] = [
            "" if c is None else "|".join(map(str, c)) if isinstance(c, list) else str(c) for c in cells
        ]
    lines = [",".join(texts), *(",".join(row) for row in zip(*texts.values(), strict=True))]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    text = infer([tmp_path / "log.csv"])
    assert [(c.name, c.role, c.kind) for c in text.columns] == [
        (c.name, c.role, c.kind) for c in inferred.columns
    ]


def test_a_rating_becomes_a_label_by_threshold(tmp_path):
    table = pa.table({"user_id": [1, 2, 3] * 4, "rating": [1, 2, 3, 4, 5, 5] * 2})
    guess = infer(table)
    assert (guess.label, guess.at_least) == ("rating", 4)
    (tmp_path / "c.yaml").write_text(to_yaml(guess, "x.csv"))
    assert load_config(tmp_path / "c.yaml").log_schema.labels[0].at_least == 4


def test_the_label_can_be_named():
    table = pa.table({"user_id": [1, 2] * 4, "click": [0, 1] * 4, "other": [1, 1, 0, 0] * 2})
    assert infer(table, label="other").label == "other"
    with pytest.raises(UserError, match="has no column 'othr'"):
        infer(table, label="othr")


def test_no_label():
    with pytest.raises(UserError, match="no column of zeros and ones.*it has user_id, price"):
        infer(pa.table({"user_id": ["a", "b"], "price": [1.5, 2.5]}))


def test_a_log_without_a_header_is_noticed(tmp_path):
    (tmp_path / "log.tsv").write_text("1\t5\t5\n0\t6\t7\n")
    with pytest.raises(UserError, match="looks like a row, not a header .*data.column_names"):
        infer([tmp_path / "log.tsv"])
    data = DataConfig(header=False, column_names=("label", "x", "y"))
    guess = infer([tmp_path / "log.tsv"], data)
    (tmp_path / "c.yaml").write_text(to_yaml(guess, tmp_path / "log.tsv"))
    assert load_config(tmp_path / "c.yaml").data.column_names == ("label", "x", "y")


def test_hostile_names_and_values_stay_in_their_place(tmp_path):
    table = pa.table(
        {"y": [0, 1] * 4, "a: b # c": ["x\n- evil: 1", "z"] * 4, "né, {e}": [1.5, 2.5] * 4, "on": [1, 2] * 4}
    )
    guess = infer(table)
    (tmp_path / "c.yaml").write_text(to_yaml(guess, Path("we ird: #.csv")), encoding="utf-8")
    config = load_config(tmp_path / "c.yaml")
    assert {f.name for f in config.log_schema.features} <= {"a: b # c", "né, {e}", "on"}
    assert config.log_schema.labels[0].name == "y"
    assert config.data.train == ("we ird: #.csv",)


def one_task(click, **others):
    rows = len(click)
    return pa.table({"price": [i + 0.5 for i in range(rows)], **others, "click": click})


def test_one_stray_value_does_not_move_the_threshold_to_it():
    guess = infer(one_task([0, 0, 1, 0] * 50 + [2]), label="click")
    assert guess.at_least == 1
    assert "at_least: 1}  # not only 0 and 1: 25.4% of the rows reach this" in to_yaml(guess, "x.csv")
    assert infer(one_task([0, 0, 1, 0] * 50 + [2], is_mobile=[0, 1, 1] * 67)).label == "click"


@pytest.mark.parametrize(
    ("click", "shows"), [(["no", "yes"], "no, yes"), ([0, 0], "0"), ([None] * 2, "empty")]
)
def test_a_label_that_is_none_is_shown(click, shows):
    for label in ("click", None):
        with pytest.raises(
            UserError, match=rf"column 'click' holds no two numbers \({shows}\), .* write it as"
        ):
            infer(one_task(click * 50, is_mobile=[0, 1] * 50), label=label)


def test_sample_weights_are_no_feature():
    text = to_yaml(infer(one_task([0, 1] * 50, sample_weight=[1.0, 0.5] * 50)), "x.csv")
    assert "\n  weight: sample_weight\n" in text
    assert "name: sample_weight" not in text
    assert "# weight: weight  # if it holds" in to_yaml(infer(one_task([0, 1], weight=[1.0, 0.5])), "x.csv")


def test_a_column_that_is_twice_in_a_table_is_named():
    table = pa.Table.from_arrays([pa.array([0, 1])] * 2, names=["click", "click"])
    with pytest.raises(UserError, match="table: column 'click' is there twice"):
        infer(table)


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_another_delimiter_is_guessed_and_written(tmp_path, mark):
    log, config = tmp_path / "log.csv", tmp_path / "config.yaml"
    log.write_text(f"ad{mark}click\n" + f"1,5{mark}0\n2{mark}1\n" * 20)
    guessed = infer([log])
    assert [column.name for column in guessed.columns] == ["ad", "click"]
    config.write_text(to_yaml(guessed, log))
    assert load_config(config).data.delimiter == mark


def test_several_files_are_looked_at(tmp_path):
    for number in range(20):
        tag = f"{number}|{number + 1}" if number else "0"
        (tmp_path / f"{number:02}.csv").write_text("ad,tags,click\n" + f"a{number},{tag},{number % 2}\n" * 50)
    guessed = infer([tmp_path])
    facts = {column.name: column for column in guessed.columns}
    assert guessed.label == "click"
    assert facts["tags"].kind == "multi"
    assert facts["ad"].distinct > 5
    pq.write_table(pa.table({"ad": [1, 2] * 50, "click": [0, 1] * 50}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"ad": ["x", "y"] * 50, "click": [0, 1] * 50}), tmp_path / "b.parquet")
    assert infer([tmp_path / "a.parquet", tmp_path / "b.parquet"]).rows in (100, 200)


def test_whole_numbers_called_after_users_and_items_are_ids():
    numbers = list(range(200))
    guessed = infer(one_task([0, 1, 1, 0] * 50, u=numbers, i=numbers, movie=numbers, clicks_before=numbers))
    kinds = {column.name: column.kind for column in guessed.columns}
    assert kinds == {
        "price": "numeric",
        "click": "categorical", "u": "categorical", "i": "categorical", "movie": "categorical",
        "clicks_before": "numeric",
    }  # fmt: skip


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "log.csv").touch()
    with pytest.raises(UserError, match=r"log.csv: is empty; remove it"):
        infer([tmp_path / "log.csv"])
