"""Runs, bundles and a server that several tests read and leave as they are."""

import shutil

import pytest
from serving_clients import serving

from every_feature import SIMPLE, config, make_run
from mldcn.predict import Predictor
from mldcn.serving.engine import Engine
from mldcn.serving.export import export_run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A finished run of a small model of few features."""
    made = config({"name": "mldcn", "rank": 4, "num_layers": 1}, SIMPLE, evaluation={"calibration": "platt"})
    return make_run(tmp_path_factory.mktemp("small") / "small", made)


@pytest.fixture(scope="session")
def small_bundle(small_run):
    """Its bundle; to be read, not changed."""
    path = small_run.path.with_name("bundle")
    export_run(Predictor.load(small_run.path, "cpu"), "torch-export", path)
    return path


@pytest.fixture(scope="session")
def compiled_bundle(small_run):
    """A bundle of it in native code, which takes long to compile; to be read, not changed."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler on this machine: AOTInductor is not tried")
    path = small_run.path.with_name("compiled")
    export_run(Predictor.load(small_run.path, "cpu"), "aoti", path)
    return path


@pytest.fixture(scope="session")
def served_run(tmp_path_factory):
    """The folder of a finished run of a model on every kind of feature, with two tasks and a calibrator."""
    path = tmp_path_factory.mktemp("runs") / "ads"
    make_run(path, config({"name": "mldcn", "num_layers": 2, "rank": 4}, evaluation={"calibration": "platt"}))
    return path


@pytest.fixture(scope="session")
def engine(served_run):
    """What the server must answer like."""
    return Engine.load(served_run, "cpu")


@pytest.fixture(scope="session")
def server(served_run):
    """A server of that run."""
    with serving(served_run, control="explicit") as running:
        yield running
