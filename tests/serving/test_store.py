"""Tables in files: what is read back, and how far off."""

import numpy as np
import pytest
import torch

from mldcn.errors import UserError
from mldcn.serving.store import TableFile, row_bytes, write_table

TABLES = {
    "normal": torch.randn(300, 7, generator=torch.Generator().manual_seed(0)),
    "equal numbers": torch.full((3, 5), 0.3),
    "wide ranges": torch.tensor([[1e30, -1e30, 0.0], [1e-30, 0.0, -1e-30], [3.3e38, -3.3e38, 1.0]]),
    "one column": torch.randn(4, 1),
}


def opened(tmp_path, weight, kind):
    path = tmp_path / "table.bin"
    write_table(weight, path, kind)
    assert path.stat().st_size == len(weight) * row_bytes(kind, weight.shape[1])
    return TableFile(path, kind, *weight.shape)


@pytest.mark.parametrize("weight", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_numbers_are_read_back_within_the_stated_bound(tmp_path, weight, kind):
    rows = torch.randint(0, len(weight), (5, 3))
    found = opened(tmp_path, weight, kind).look_up(rows)
    assert found.dtype == torch.float32
    assert found.shape == (5, 3, weight.shape[1])
    exact = weight[rows].double()
    span = exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)
    bound = {
        "fp32": torch.zeros(()),
        "bf16": exact.abs() / 256,
        "int8": span / 510 + exact.abs().amax(-1, keepdim=True) * 1e-6,
    }[kind]
    assert ((found.double() - exact).abs() <= bound).all()


def test_int8_keeps_the_ends_of_a_rows_range_and_its_size(tmp_path):
    weight = TABLES["normal"]
    found = opened(tmp_path, weight, "int8").look_up(torch.arange(300)[:, None])[:, 0]
    torch.testing.assert_close(found.amin(1), weight.amin(1))
    torch.testing.assert_close(found.amax(1), weight.amax(1))
    # A code is off by half a step at most and by a quarter on average.
    step = (weight.amax(1) - weight.amin(1)) / 255
    inner = ((found - weight).abs() / step[:, None]).mean()
    assert 0.1 < inner < 0.3
    assert row_bytes("int8", 64) == 72


def test_a_file_of_another_size_is_refused(tmp_path):
    write_table(TABLES["normal"], tmp_path / "table.bin", "bf16")
    with pytest.raises(UserError, match="table.bin: has 4200 bytes, expected 4214"):
        TableFile(tmp_path / "table.bin", "bf16", 301, 7)
    with pytest.raises(UserError, match="other.bin: cannot be read"):
        TableFile(tmp_path / "other.bin", "bf16", 301, 7)


def test_an_empty_table_and_a_large_one_are_written(tmp_path):
    assert opened(tmp_path, torch.zeros(0, 3), "int8").look_up(torch.zeros(0, 2, dtype=torch.long)).shape == (
        0,
        2,
        3,
    )
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(70_000, 2)).astype(np.float32))
    found = opened(tmp_path, weight, "fp32").look_up(torch.tensor([[0, 65_535, 65_536, 69_999]]))
    assert torch.equal(found[0], weight[[0, 65_535, 65_536, 69_999]])
