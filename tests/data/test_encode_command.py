"""``mldcn data encode``: the log is encoded once, and rows that are left out are counted and named."""

import csv

from typer.testing import CliRunner

from mldcn import cli
from mldcn.data.shards import EncodedRows

CONFIG = """
data: {train: [LOG], split: {kind: order, valid: 0.25, test: 0.25}, on_error: skip}
schema:
  features: [{kind: categorical, name: ad}, {kind: numeric, name: price}]
  labels: [{name: click}]
"""


def test_data_encode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"a{i % 3},{'dear' if i == 2 else i},{i % 2}\n" for i in range(20)]
    (tmp_path / "log.csv").write_text("ad,price,click\n" + "".join(rows))
    (tmp_path / "c.yaml").write_text(CONFIG.replace("LOG", "log.csv"))

    first = CliRunner().invoke(cli.app, ["data", "encode", "c.yaml", "--out", "rows"])
    assert first.exit_code == 0, first.output
    assert "rows: 9 training rows, 5 validation rows, 5 test rows\n" in first.output
    assert "1 bad rows are left out" in first.output
    with (tmp_path / "rows" / "rejects.csv").open() as file:
        (reject,) = csv.DictReader(file)
    assert (reject["row"], reject["column"], reject["value"]) == ("3", "price", "dear")
    assert len(EncodedRows(tmp_path / "rows" / "test")) == 5

    again = CliRunner().invoke(cli.app, ["data", "encode", "c.yaml", "--out", "rows"])
    assert "(they were there already)" in again.output
    assert not list(tmp_path.glob("*.partial"))

    small = ["--set", "data.memory_mb=100"]
    refused = CliRunner().invoke(cli.app, ["data", "encode", "c.yaml", *small])
    assert refused.exit_code == 1
    assert "data.memory_mb: Input should be greater than or equal to 256 (found 100)" in str(
        refused.exception
    )
