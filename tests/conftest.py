"""Shared by all tests: one thread a worker, and where the real data lies."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MovieLens-1M and Criteo, where a developer has one."""
    folder = Path(os.environ.get("MLDCN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MLDCN_TEST_DATA to a folder that has it")
    return folder
