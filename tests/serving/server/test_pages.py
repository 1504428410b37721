"""The page that tries a request, the page of all calls, and what moved each score."""

import asyncio
import re

import httpx
import numpy as np
import pytest
from browser import PROGRAM, browsing
from serving_clients import rows, serving

from mldcn.serving.server.effects import CANDIDATES, groups_of
from mldcn.serving.server.options import Limits
from mldcn.serving.server.pages import PATHS

TOKEN = "0123456789abcdef"
drawn = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine: the pages are not drawn")


def asked(engine, count=3):
    values = rows(engine, count)
    user = {name: values[name][0] for name in engine.constant}
    return {
        "user": user,
        "candidates": {name: column for name, column in values.items() if name not in user},
    }


def test_pages_load_nothing_from_elsewhere(server):
    for path in PATHS:
        found = server.client.get(path)
        assert found.status_code == 200
        policy = found.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(https?:)?//[a-z]", found.text.replace("http://localhost", ""))
        assert "innerHTML" not in found.text
        links = re.findall(r'(?:src|href)="([^"#]*)"', found.text)
        assert all(link in {*PATHS, "/openapi.json", "data:,"} for link in links), links


@pytest.mark.parametrize("by", ["feature", "source"])
def test_effects_are_differences_of_scores(server, engine, by):
    request = asked(engine)
    plain = server.client.post("/v1/rank", json=request | {"probabilities": True}).json()
    found = server.client.post("/v1/effects", json=request | {"by": by, "probabilities": True}).json()
    for name in ("ranking", "scores", "probabilities", "model", "version"):
        assert found[name] == pytest.approx(plain[name], abs=1e-6) if name == "scores" else found[name]
    effects = np.array(found["effects"])
    assert effects.shape == (3, len(found["groups"]))
    assert [group["name"] for group in found["groups"]] == [group.name for group in groups_of(engine, by)]
    assert np.abs(effects).max() > 1e-4
    for g, group in enumerate(found["groups"]):
        changed = {
            "user": {k: None if k in group["columns"] else v for k, v in request["user"].items()},
            "candidates": {
                k: [None] * 3 if k in group["columns"] else v for k, v in request["candidates"].items()
            },
        }
        other = server.client.post("/v1/rank", json=changed).json()
        scores = dict(zip(other["ranking"], other["scores"], strict=True))
        expected = [
            score - scores[place] for place, score in zip(plain["ranking"], plain["scores"], strict=True)
        ]
        np.testing.assert_allclose(effects[:, g], expected, atol=1e-5)


def test_a_sequence_goes_with_its_times_and_actions(engine):
    groups = {group.name: group for group in groups_of(engine, "feature")}
    assert groups["history"].columns == ["history", "history_times", "history_actions"]
    assert set(groups) == {feature.name for feature in engine.config.log_schema.features}
    sources = groups_of(engine, "source")
    assert {group.name for group in sources} == {"user", "context", "item", "user_item"}


def test_effects_follow_objective_and_top(server, engine):
    request = asked(engine, 5) | {"objective": {"save": 2.0}, "top": 2}
    plain = server.client.post("/v1/rank", json=request).json()
    found = server.client.post("/v1/effects", json=request).json()
    assert found["ranking"] == plain["ranking"]
    assert len(found["effects"]) == 2
    empty = {name: [] for name in request["candidates"]}
    none = server.client.post("/v1/effects", json=asked(engine) | {"candidates": empty}).json()
    assert (none["ranking"], none["effects"]) == ([], [])


def test_the_cost_of_effects_is_bounded(served_run, engine):
    with serving(served_run, limits=Limits(rows=60)) as running:
        assert running.client.post("/v1/effects", json=asked(engine, 5)).status_code == 200
        refused = running.client.post("/v1/effects", json=asked(engine, 6))
        assert refused.status_code == 413
        assert "at most 5 are explained" in refused.json()["error"]
        assert running.metric("mldcn_rows_total", model="ads", version=engine.version) == 0  # no traffic
    assert CANDIDATES <= 50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"by": "moon"}, "by: Input should be"),
        ({"user": {"age": 3}}, "'user' is lacking"),
        ({"user": {"item": "i1"}}, "given once for the request and again"),
        ({"candidates": {"item": ["a", "b"], "price": [1.0]}}, "several lengths"),
        ({"candidates": [{"item": {"a": 1}}]}, "a value is"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_wrong_requests_for_effects_are_refused(server, engine, change, words):
    found = server.client.post("/v1/effects", json=asked(engine) | change)
    assert found.status_code == 400
    assert words in found.json()["error"]


@drawn
def test_a_request_is_tried_by_hand(server, tmp_path):
    evil = '<img src=x onerror="document.title=1">'

    async def try_it():
        async with browsing() as page:
            await page.open(f"{server.http}/")
            await page.until("document.querySelectorAll('#candidates tbody tr').length === 4")
            await page.run("byId('more').click()")
            first = "document.querySelector('#candidates tbody input[data-name=item]').value"
            await page.run(f"{first} = {evil!r}")
            await page.run("byId('rank').click()")
            await page.until("document.querySelectorAll('#ranking > li').length === 5")
            assert await page.run("document.querySelectorAll('img').length") == 0
            assert evil in await page.run("byId('ranking').textContent")
            made = await page.run("JSON.stringify(request())")
            shown = await page.run(
                "[...document.querySelectorAll('#ranking .score')].map((each) => each.firstChild.textContent)"
            )
            expected = server.client.post("/v1/effects", content=made).json()
            assert shown == [f"{score:.4f}" for score in expected["scores"]]
            assert await page.run("document.querySelectorAll('#ranking .effect').length") == 5 * 10
            await page.run("byId('by').value = 'source'; byId('rank').click()")
            await page.until("document.querySelectorAll('#ranking .effect').length === 5 * 4")
            await page.run(
                "document.querySelector('input[data-name=age]').value = 'old'; byId('rank').click()"
            )
            await page.until("byId('problem').textContent.includes('old is no number')")
            for width in (1100, 390):
                for dark in (False, True):
                    await page.look(width, dark=dark, file=tmp_path / f"{width}-{dark}.png")
                assert await page.run("document.documentElement.scrollWidth") <= width
            back = "getComputedStyle(document.body).backgroundColor"
            assert await page.run(back) == "rgb(20, 23, 28)"
            assert page.messages == []
            assert all(url.startswith((server.http, "data:")) for url in page.asked), page.asked

    asyncio.run(try_it())


@drawn
def test_all_calls_are_described_without_a_network(server):
    paths = server.client.get("/openapi.json").json()["paths"]

    async def look():
        async with browsing() as page:
            await page.open(f"{server.http}/docs")
            await page.until("document.querySelectorAll('.call').length > 0")
            found = await page.run(
                "[...document.querySelectorAll('.call h3')].map((each) => each.textContent)"
            )
            assert found == [
                f"{method.upper()}{path}" for path, methods in paths.items() for method in methods
            ]
            text = await page.run("document.body.textContent")
            assert "weights of the tasks' probabilities" in text
            assert page.messages == []
            assert all(url.startswith((server.http, "data:")) for url in page.asked), page.asked
            await page.size(390)
            assert await page.run("document.documentElement.scrollWidth") <= 390

    asyncio.run(look())


@drawn
def test_pages_ask_for_the_token(served_run):
    with serving(served_run, token=TOKEN) as running:
        assert httpx.get(f"{running.http}/").status_code == 200
        assert httpx.get(f"{running.http}/openapi.json").status_code == 401

        async def try_it():
            async with browsing() as page:
                await page.open(f"{running.http}/")
                await page.until("document.readyState === 'complete' && !byId('login').hidden")
                submit = "document.querySelector('#login button').click()"
                await page.run(f"byId('token').value = 'wrong'; {submit}")
                await page.until("byId('problem').textContent.includes('token')")
                assert await page.run("byId('request').hidden")
                await page.run(f"byId('token').value = '{TOKEN}'; {submit}")
                await page.until("!byId('request').hidden && byId('login').hidden")
                assert TOKEN not in await page.run("document.cookie + JSON.stringify(localStorage)")

        asyncio.run(try_it())
