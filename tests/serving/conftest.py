"""One run and one server for all tests that leave it as it is."""

import pytest
from serving_cases import config, make_run
from serving_clients import serving

from mldcn.serving.engine import Engine

ML_DCN = {"name": "mldcn", "num_layers": 2, "rank": 4}


@pytest.fixture(scope="session")
def served_run(tmp_path_factory):
    """A finished run of a model on every kind of feature, with two tasks and a calibrator."""
    path = tmp_path_factory.mktemp("runs") / "ads"
    make_run(path, config(ML_DCN, evaluation={"calibration": "platt"}))
    return path


@pytest.fixture(scope="session")
def engine(served_run):
    return Engine.load(served_run, "cpu")


@pytest.fixture(scope="session")
def server(served_run):
    with serving(served_run, control="explicit") as running:
        yield running
