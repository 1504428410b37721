"""A load test of a server of ours, by each transport, and its report."""

import asyncio
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from serving_clients import serving
from typer.testing import CliRunner

from every_feature import config, log, make_run
from mldcn.cli import app
from mldcn.errors import UserError
from mldcn.loadtest.clients import RankClient, Target
from mldcn.loadtest.draws import Candidates
from mldcn.loadtest.report import page_of, write
from mldcn.loadtest.run import Plan, run
from mldcn.loadtest.traffic import Traffic, read_log


@pytest.fixture(scope="module")
def ads(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "ads"
    make_run(path, config({"name": "mldcn", "num_layers": 1, "rank": 4}))
    with serving(path, token="0123456789abcdef") as running:
        yield running


@pytest.fixture(scope="module")
def sample(ads):
    return ads.client.get("/v1/sample", headers=KEY).json()


KEY = {"Authorization": "Bearer 0123456789abcdef"}


def plan(ads, **others):
    short = {"callers": [2], "rates": [40.0], "seconds": 0.5, "warm_up": 0.1, "candidates": "3-6"}
    return Plan(ads.http, **{"token": "0123456789abcdef", "grpc": ads.grpc, **short, **others})


@pytest.mark.parametrize("transport", ["json", "arrow", "grpc"])
def test_every_transport_is_answered(ads, transport):
    result = run(plan(ads, transport=transport))
    closed, opened = result.steps
    for step in (closed, opened):
        assert step.sent == step.answered > 0
        assert not step.errors
    assert (closed.kind, closed.load, opened.kind, opened.load) == ("closed", 2, "open", 40.0)
    assert 3 <= result.rows <= 6


def test_rates_come_from_what_callers_got(ads):
    told = []
    result = run(plan(ads, rates=None, seconds=0.5), told.append)
    closed, *opened = result.steps
    assert [step.load for step in opened] == pytest.approx(
        [share * closed.throughput for share in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)]
    )
    assert any("answered" in line and "2 callers" in line for line in told)


def test_traffic_is_the_users_own_and_drawn_anew(sample):
    def drawn(seed):
        return list(Traffic(sample, Candidates.parse("2-9"), 50, 1.0, seed).draw(200))

    asks = drawn(1)
    assert asks == drawn(1) != drawn(2)
    assert all(2 <= ask.rows <= 9 for ask in asks)
    assert {len(values) for ask in asks for values in ask.columns().values()} <= set(range(2, 10))
    users = {}
    for ask in asks:
        text = json.dumps(ask.user)
        users[text] = users.get(text, 0) + 1
        lists = [ask.user[name] for name in ("history", "history_times", "history_actions")]
        assert len({len(each) for each in lists}) == 1
        assert all(len(vector) == 4 for vector in ask.candidates["picture"])
    assert 5 < len(users) <= 50
    assert max(users.values()) > 20  # the most frequent user's share is 22 %


def test_a_logs_rows_are_asked_about(ads, sample, tmp_path):
    table = log(40)
    pq.write_table(table, tmp_path / "log.parquet")
    columns = read_log(tmp_path / "log.parquet", sample)
    (ask,) = Traffic(sample, Candidates.parse("5"), 10, 1.0, 0, columns).draw(1)
    rows = table.to_pylist()
    names = list(ask.candidates)
    assert {name: ask.user[name] for name in ask.user} in [
        {name: row[name] for name in ask.user} for row in rows
    ]
    for values in zip(*ask.candidates.values(), strict=True):
        assert dict(zip(names, values, strict=True)) in [{name: row[name] for name in names} for row in rows]
    result = run(plan(ads, log=tmp_path / "log.parquet"))
    assert all(not step.errors for step in result.steps)
    with pytest.raises(UserError, match="has no 'item'"):
        pq.write_table(table.drop_columns(["item"]), tmp_path / "less.parquet")
        read_log(tmp_path / "less.parquet", sample)
    with pytest.raises(UserError, match="cannot be read"):
        (tmp_path / "none.parquet").write_bytes(b"x")
        read_log(tmp_path / "none.parquet", sample)


def test_what_goes_wrong_is_said(ads):
    with pytest.raises(UserError, match="is 'mldcn serve' running"):
        run(Plan("http://127.0.0.1:9"))
    with pytest.raises(UserError, match="401"):
        run(Plan(ads.http))
    with pytest.raises(UserError, match="no model 'no'"):
        run(plan(ads, model="no"))
    with pytest.raises(UserError, match="no address"):
        run(Plan("ftp://x"))
    with pytest.raises(UserError, match="requests a second"):
        run(plan(ads, rates=[0.0]))
    with pytest.raises(UserError, match="no request was answered rightly.*UNAVAILABLE"):
        run(plan(ads, transport="grpc", grpc="127.0.0.1:9"))


def test_a_refused_request_is_an_error_of_its_kind(ads, sample):
    async def ask():
        client = RankClient(Target(ads.http, None, "0123456789abcdef", 5), "none", arrow=False)
        asks = Traffic(sample, Candidates.parse("2"), 1, 1.0, 0).draw(1)
        try:
            return await client.send(client.body(next(asks)))
        finally:
            await client.close()

    assert asyncio.run(ask()) == "HTTP 404"


def test_the_report_says_what_was_found(ads, tmp_path):
    result = run(plan(ads, seconds=3.0, rates=[60.0]))
    write(result, tmp_path)
    assert {"report.html", "report.md", "result.json", "latency.svg", "rates.csv", "callers.csv"} <= {
        path.name for path in tmp_path.iterdir()
    }
    page = (tmp_path / "report.html").read_text()
    assert "Load on ads" in page
    assert "0123456789abcdef" not in page + (tmp_path / "result.json").read_text()
    assert "src=" not in page
    found = json.loads((tmp_path / "result.json").read_text())
    opened = found["steps"][1]
    assert opened["latencies"]["p50"] == result.steps[1].latencies[50.0]
    assert opened["throughput"] == pytest.approx(opened["answered"] / opened["seconds"])
    assert any("Ids are made up" in block.markdown() for block in page_of(result).blocks)


def test_the_command_prints_and_writes(ads, tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef")
    words = ["loadtest", ads.http, "--token-file", tmp_path / "token", "--rate", "30", "--seconds", "0.5"]
    words += ["--candidates", "4", "--warm-up", "0.1", "--out", tmp_path / "out"]
    ran = CliRunner().invoke(app, list(map(str, words)))
    assert ran.exit_code == 0, ran.output
    assert "30 sent a second" in ran.output
    assert (tmp_path / "out" / "report.html").is_file()
    assert np.isfinite(json.loads((tmp_path / "out" / "result.json").read_text())["rows"])
