import shutil

import pytest
from study_cases import recipe

from mldcn.datasets.pinads import PinadsConfig, write_log
from mldcn.study.bench import Bench


@pytest.fixture(scope="session")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    write_log(folder, 4000, PinadsConfig(num_users=300, num_items=100))
    return folder


@pytest.fixture(scope="session")
def encoded(log, tmp_path_factory):
    """A study's folder with the log encoded, and the widths solved of the rivals as they stand."""
    folder = tmp_path_factory.mktemp("study")
    bench = Bench.open(recipe(), log, folder)
    for rival in recipe().rivals:
        bench.planner.final(rival, -1, {})
    return folder


@pytest.fixture
def folder(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "out")
    return tmp_path / "out"
