"""Every example in a docstring runs as it is printed."""

import doctest
import importlib
from pathlib import Path

import pytest

import mldcn

ROOT = Path(mldcn.__file__).parent
MODULES = [
    ".".join(["mldcn", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    for file in sorted(ROOT.rglob("*.py"))
    if ">>>" in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
