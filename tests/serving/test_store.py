"""Tables in files: what is read back, and how far off."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mldcn.errors import UserError
from mldcn.serving.store import KINDS, TableFile, packed, row_bytes, unpacked, write_table

TABLES = {
    "normal": torch.randn(300, 7, generator=torch.Generator().manual_seed(0)),
    "equal numbers": torch.full((3, 5), 0.3),
    "wide ranges": torch.tensor([[1e30, -1e30, 0.0], [1e-30, 0.0, -1e-30], [3.3e38, -3.3e38, 1.0]]),
    "one column": torch.randn(4, 1),
    "an even width": torch.randn(50, 16, generator=torch.Generator().manual_seed(1)) * 0.01,
    "far from zero": 1000 + torch.rand(9, 4, generator=torch.Generator().manual_seed(2)),
}
TABLES["tiny numbers"] = TABLES["normal"] * 1e-7


def opened(tmp_path, weight, kind):
    path = tmp_path / "table.bin"
    write_table(weight, path, kind)
    assert path.stat().st_size == len(weight) * row_bytes(kind, weight.shape[1])
    return TableFile(path, kind, *weight.shape)


@pytest.mark.parametrize("weight", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_read_back_within_the_stated_bound(tmp_path, weight, kind):
    if kind == "int4" and weight.abs().max() > 65504:
        with pytest.raises(UserError, match="too large for int4 rows"):
            write_table(weight, tmp_path / "table.bin", kind)
        return
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
        "int4": (span + exact.amin(-1, keepdim=True).abs() / 1000) / 29.9 + 4e-8,
    }[kind]
    # Of a number far from zero float32 itself drops a little.
    assert ((found.double() - exact).abs() <= bound + (kind == "int4") * exact.abs() * 1.2e-7).all()
    bytes_ = packed(weight, kind)
    np.testing.assert_allclose(unpacked(bytes_[rows], kind, weight.shape[1]), found, rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -1e5, 2e6])
def test_what_four_bits_cannot_hold_is_refused(value):
    weight = torch.tensor([[0.0, 1.0, value]])
    with pytest.raises(UserError, match="too large for int4 rows"):
        packed(weight, "int4")


def test_four_bits_are_sixteen_even_steps_two_in_a_byte():
    weight = torch.arange(16.0)[None, :] / 4 - 1
    found = packed(weight, "int4")
    assert found.shape == (1, 12)
    assert found[0, :8].tolist() == [low | (low + 1) << 4 for low in range(0, 16, 2)]
    assert found[0, 8:].view(torch.float16).tolist() == [0.25, -1.0]
    assert torch.equal(unpacked(found, "int4", 16), weight)
    assert [row_bytes("int4", width) for width in (1, 2, 3, 64)] == [5, 5, 6, 36]


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


def test_a_row_that_is_not_there_is_an_error(tmp_path):
    for kind in KINDS:
        table = opened(tmp_path, TABLES["one column"], kind)
        with pytest.raises((RuntimeError, IndexError)):
            table.look_up(torch.tensor([[4]]))
        assert table.packed(torch.tensor([1, 1])).shape == (2, row_bytes(kind, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_the_disk_are_touched_by_several_threads_and_read_the_same(tmp_path, monkeypatch, kind):
    table = opened(tmp_path, TABLES["normal"], kind)
    rows = torch.randint(0, 300, (40, 5))
    expected = table.look_up(rows), table.packed(rows.flatten())
    touched = []
    touch = TableFile._touch

    def noted(self, some):
        touched.append(some)
        touch(self, some)

    waits = iter(range(0, 10_000, 100))
    monkeypatch.setattr("mldcn.serving.store._page_waits", lambda: next(waits))
    monkeypatch.setattr(TableFile, "_touch", noted)
    assert torch.equal(table.look_up(rows), expected[0])
    assert not touched  # the first look-up finds out that the disk is waited for
    assert torch.equal(table.look_up(rows), expected[0])
    assert torch.equal(table.packed(rows.flatten()), expected[1])
    assert torch.equal(torch.cat(touched).sort().values, rows.flatten().repeat(2).sort().values)
    monkeypatch.setattr("mldcn.serving.store._page_waits", lambda: 0)
    table.look_up(rows)
    touched.clear()
    table.look_up(rows)
    assert not touched


MEASURE = """
import re, sys, torch
from pathlib import Path
from mldcn.serving.store import TableFile
table = TableFile(Path(sys.argv[1]), sys.argv[2], 40_000, 64)
rows = torch.randint(0, 40_000, (2000, 10))
for _ in range(3):
    table.look_up(rows)
found = re.search(re.escape(sys.argv[1]) + r".*?Rss: *([0-9]+) kB.*?Private_Dirty: *([0-9]+) kB.*?VmFlags: (.*?)$",
                  Path("/proc/self/smaps").read_text(), re.DOTALL | re.MULTILINE)
print(found[1], found[2], "rr" in found[3].split())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc/self/smaps, which only Linux has"
)
@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_a_process_holds_no_copy_of_a_table(tmp_path, kind):
    path = tmp_path / "table.bin"
    write_table(torch.randn(40_000, 64), path, kind)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), kind], capture_output=True, text=True, check=True
    )
    resident, own, random = done.stdout.split()
    assert int(resident) > 0.3 * path.stat().st_size / 1024
    assert int(own) == 0  # all its pages are the file's
    assert random == "True"
