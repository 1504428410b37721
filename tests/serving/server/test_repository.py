"""Models and versions: found in folders, swapped under load, given to a share of the users."""

import asyncio
import os
import shutil
import threading
import time

import httpx
import numpy as np
import pytest
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http
from serving_clients import expected, rows, serving
from tritonclient.utils import InferenceServerException

from every_feature import SIMPLE, config, make_run
from mldcn.errors import UserError
from mldcn.serving.engine import Engine
from mldcn.serving.refused import Refused
from mldcn.serving.server.repository import Repository, parse_path, places, share_of

LABELS = [{"name": "click"}]


def small_run(path, rank=2):
    """A run of a small model; each rank is another model."""
    make_run(path, config({"name": "mldcn", "num_layers": 1, "rank": rank}, SIMPLE, LABELS), rows=100)
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs of different models, and their engines."""
    folder = tmp_path_factory.mktemp("two")
    paths = [small_run(folder / "a", 2), small_run(folder / "b", 3)]
    return paths, [Engine.load(path, "cpu") for path in paths]


def ask(server_or_url, values, model="ads", version="", **headers):
    path = f"/v2/models/{model}/versions/{version}/infer" if version else f"/v2/models/{model}/infer"
    inputs = [
        {"name": name, "shape": [len(column)], "datatype": "BYTES", "data": column}
        for name, column in texts(values).items()
    ]
    return server_or_url.post(path, json={"inputs": inputs}, headers=headers)


def texts(values):
    return {name: ["" if v is None else str(v) for v in column] for name, column in values.items()}


def test_names_and_folders():
    assert parse_path("ads=runs/x")[0] == "ads"
    assert parse_path("runs/a=b") == (None, parse_path("runs/a=b")[1])


def test_folders_of_models_and_versions(tmp_path, two):
    source = two[0][0]
    for name in ("ads/9", "ads/10", "video", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("ads/9", "ads/10", "video"):
        shutil.copytree(source, tmp_path / name, dirs_exist_ok=True)
    found = [(place.model, place.label) for place in places([(None, tmp_path)])]
    assert found == [("ads", "9"), ("ads", "10"), ("video", None)]
    assert [p.model for p in places([("mine", source), (None, source)])] == ["mine", None]


def test_nothing_to_serve_is_said(tmp_path):
    async def load(*paths):
        await Repository([(None, path) for path in paths], "cpu").load()

    with pytest.raises(UserError, match="neither a run's folder nor a bundle"):
        asyncio.run(load(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run's folder nor a bundle"):
        asyncio.run(load(tmp_path / "empty"))


def test_two_folders_of_one_version_are_refused(two, tmp_path):
    path = two[0][0]
    shutil.copytree(path, tmp_path / "copy")
    repository = Repository([("ads", path), ("ads", tmp_path / "copy")], "cpu")
    with pytest.raises(UserError, match="two folders hold version"):
        asyncio.run(repository.load())


def test_versions_are_asked_for_by_name_and_the_newest_answers(two):
    paths, engines = two
    values = rows(engines[0], 3)
    with serving(*(f"ads={path}" for path in paths)) as running:
        for engine in engines:
            found = ask(running.client, values, version=engine.version).json()
            assert found["model_version"] == engine.version
            np.testing.assert_allclose(found["outputs"][0]["data"], expected(engine, values)[:, 0], atol=1e-6)
        assert ask(running.client, values).json()["model_version"] == engines[1].version
        with by_grpc.InferenceServerClient(running.grpc) as client:
            index = client.get_model_repository_index().models
            assert {(each.name, each.version, each.state) for each in index} == {
                ("ads", engine.version, "READY") for engine in engines
            }
            with pytest.raises(InferenceServerException, match="not started for it"):
                client.unload_model("ads")
        assert running.client.post("/v2/repository/models/ads/load").status_code == 403


def test_a_canary_answers_its_share_of_users_always_the_same(two):
    paths, engines = two
    values = rows(engines[0], 1)
    share = 0.3
    with serving(*(f"ads={path}" for path in paths), canary=share) as running:
        found = {}
        for user in map(str, range(40)):
            versions = {
                ask(running.client, values, **{"x-routing-key": user}).json()["model_version"]
                for _ in range(2)
            }
            assert len(versions) == 1
            found[user] = versions.pop()
            assert (found[user] == engines[1].version) == (share_of("ads", user) < share)
        assert len(set(found.values())) == 2
        assert ask(running.client, values).json()["model_version"] == engines[0].version
        # The key may be a parameter of the protocol, in either transport.
        new = next(user for user, version in found.items() if version == engines[1].version)
        columns = texts(values)
        with by_grpc.InferenceServerClient(running.grpc) as client:
            tensors = []
            for name, column in columns.items():
                tensors.append(by_grpc.InferInput(name, [1], "BYTES"))
                tensors[-1].set_data_from_numpy(np.array(column, object))
            result = client.infer("ads", tensors, parameters={"routing_key": new})
            assert result.get_response().model_version == engines[1].version


def test_shares_are_even():
    found = np.array([share_of("ads", str(user)) for user in range(20_000)])
    assert abs((found < 0.1).mean() - 0.1) < 0.01
    assert found.min() >= 0
    assert found.max() < 1
    other = np.array([share_of("video", str(user)) for user in range(20_000)])
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.03


def replace(path, source):
    """Puts another run into a folder's place, as an operator would: two renames."""
    new, old = path.with_name("incoming"), path.with_name("outgoing")
    shutil.copytree(source, new)
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old)


def test_a_swap_under_load_loses_no_request_and_mixes_no_versions(tmp_path, two):
    paths, engines = two
    values = rows(engines[0], 5)
    wanted = {engine.version: expected(engine, values)[:, 0] for engine in engines}
    assert not np.allclose(*wanted.values(), atol=1e-3)
    live = tmp_path / "ads"
    shutil.copytree(paths[0], live)
    problems: list[str] = []
    seen: list[str] = []
    end = threading.Event()

    def load(url):
        with httpx.Client(base_url=url, timeout=20) as client:
            while not end.is_set():
                response = ask(client, values)
                if response.status_code != 200:
                    problems.append(response.text)
                    continue
                found = response.json()
                seen.append(found["model_version"])
                if not np.allclose(found["outputs"][0]["data"], wanted[found["model_version"]], atol=1e-6):
                    problems.append(f"mixed: {found}")

    with serving(live, control="poll", poll_seconds=0.1) as running:
        threads = [threading.Thread(target=load, args=[running.http]) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(1, 4):
                replace(live, paths[turn % 2])
                await_version(running, engines[turn % 2].version)
                time.sleep(0.2)
        finally:
            end.set()
            for thread in threads:
                thread.join()
        assert not problems, problems[:3]
        assert set(seen) == set(wanted)
        assert running.metric("mldcn_model_loads_total", model="ads", result="loaded") == 4
        # The series of a version that is gone are gone too.
        assert f'version="{engines[0].version}"' not in running.client.get("/metrics").text


def await_version(running, version):
    deadline = time.monotonic() + 30
    while running.client.get("/v2/models/ads").json()["versions"] != [version]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_damaged_new_version_leaves_the_old_one_serving(tmp_path, two):
    paths, engines = two
    values = rows(engines[0], 1)
    live = tmp_path / "ads"
    shutil.copytree(paths[0], live)
    with serving(live, control="explicit") as running:
        damaged = tmp_path / "damaged"
        shutil.copytree(paths[1], damaged)
        with (damaged / "weights.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        replace(live, damaged)
        with by_http.InferenceServerClient(running.host) as client:
            with pytest.raises(InferenceServerException, match="cannot be loaded; see the log"):
                client.load_model("ads")
            assert ask(running.client, values).json()["model_version"] == engines[0].version
            assert running.metric("mldcn_model_loads_total", model="ads", result="failed") == 1
            replace(live, paths[1])
            client.load_model("ads")
            assert ask(running.client, values).json()["model_version"] == engines[1].version
            client.unload_model("ads")
            assert ask(running.client, values).status_code == 404
            assert not client.is_model_ready("ads")
            client.load_model("ads")
            assert client.is_model_ready("ads")
            with pytest.raises(InferenceServerException, match="no model 'other'"):
                client.load_model("other")
            with pytest.raises(InferenceServerException, match="parameters: none are known"):
                client.load_model("ads", config="{}")


def test_a_folder_named_by_a_caller_is_never_opened(tmp_path, two):
    path = two[0][1]
    with serving(two[0][0], control="explicit") as running:
        for name in (str(path), "../b", "..", "b"):
            with (
                by_http.InferenceServerClient(running.host) as client,
                pytest.raises(InferenceServerException),
            ):
                client.load_model(name)
        assert [each["name"] for each in running.client.post("/v2/repository/index").json()] == ["a"]


def test_several_models_need_a_name(two):
    paths, _ = two
    repository = Repository([(None, path) for path in paths], "cpu")
    asyncio.run(repository.load())
    assert sorted(repository.models) == ["a", "b"]
    with pytest.raises(Refused, match="there are several"):
        repository.pick(None)
    assert repository.pick("b").model == "b"


def test_a_bundle_is_served_as_its_run_is(small_run, small_bundle):
    engine = Engine.load(small_run.path, "cpu")
    values = rows(engine, 6)
    wanted = expected(engine, values)
    with serving(f"ads={small_run.path}", f"ads={small_bundle}") as running:
        answers = [
            ask(running.client, values, version=version).json()
            for version in running.client.get("/v2/models/ads").json()["versions"]
        ]
    assert len({each["model_version"] for each in answers}) == 2
    for each in answers:
        for place in range(wanted.shape[1]):
            np.testing.assert_allclose(each["outputs"][place]["data"], wanted[:, place], atol=1e-5)


def test_a_link_that_turns_while_a_version_is_loaded_mixes_nothing(two, tmp_path, monkeypatch):
    paths, engines = two
    live = tmp_path / "ads"
    live.symlink_to(paths[0])
    load = Engine.load

    def turning(path, *others):
        new = tmp_path / "new"
        new.symlink_to(paths[1])
        new.replace(live)
        return load(path, *others)

    monkeypatch.setattr(Engine, "load", turning)
    repository = Repository([("ads", live)], "cpu")
    asyncio.run(repository.load())
    assert repository.pick("ads").label == engines[0].version
    monkeypatch.setattr(Engine, "load", load)
    asyncio.run(repository.refresh())
    assert repository.pick("ads").label == engines[1].version
