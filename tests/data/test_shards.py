import ctypes
import json
from itertools import chain

import numpy as np
import pytest

from mldcn.data import shards
from mldcn.data.batch import DenseSlot, EncodedLayout, IdSlot
from mldcn.data.encoder import EncodedBlock
from mldcn.data.shards import EncodedRows, ShardWriter
from mldcn.errors import UserError

LAYOUT = EncodedLayout(
    ids=(IdSlot("ad", "ad", "item", 0, 1), IdSlot("tags", "tags", "item", 1, 2, kind="multi")),
    dense=(DenseSlot("x", "context", 0, 1),),
    tables={"ad": 1_000_000, "tags": 5},
    tasks=("click", "save"),
)


def rows(first: int, count: int) -> EncodedBlock:
    """Rows whose every column tells the row's number."""
    number = np.arange(first, first + count)
    return EncodedBlock(
        ids=np.stack([number, number % 5, number % 3], axis=1).astype(np.int32),
        dense=number[:, None].astype(np.float32),
        labels=np.stack([number % 2, np.where(number % 3, np.nan, 1)], axis=1).astype(np.float32),
        weight=(number + 0.5).astype(np.float32),
        position=(number % 7).astype(np.int32),
        request=number + 2**40,
        user=number // 2,
        time=number * 1.0,
    )


def written(folder, blocks=(5, 3, 4), layout=LAYOUT) -> EncodedRows:
    first = 0
    with ShardWriter(folder, layout) as writer:
        for count in blocks:
            writer.write(rows(first, count))
            first += count
    return EncodedRows(folder)


def numbers(batches):
    return [batch.ids[:, 0].tolist() for batch in batches]


@pytest.fixture
def small(monkeypatch):
    """Chunks of 2 rows, windows of 3 chunks, files of 8 rows."""
    monkeypatch.setattr(shards, "CHUNK_ROWS", 2)
    monkeypatch.setattr(shards, "WINDOW_ROWS", 6)
    monkeypatch.setattr(shards, "FILE_ROWS", 8)


def test_rows_come_back_in_order(tmp_path, small):
    encoded = written(tmp_path / "train")
    assert len(encoded) == 12
    assert encoded.layout == LAYOUT
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == [
        "manifest.json",
        "rows-00000.arrow",
        "rows-00001.arrow",
    ]
    assert numbers(encoded.batches(5)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert numbers(encoded.batches(5, drop_last=True)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert numbers(encoded.batches(5, start_batch=1)) == [[5, 6, 7, 8, 9], [10, 11]]
    assert numbers(encoded.batches(5, start_batch=3)) == []


def test_every_column_belongs_to_its_row(tmp_path, small):
    encoded = written(tmp_path / "train")
    for batch in encoded.batches(5, shuffle=True, seed=3):
        expected = rows(0, 12).select(batch.ids[:, 0].numpy())
        for name in ("ids", "dense", "labels", "weight", "position"):
            np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(expected, name))
    whole = rows(0, 12)
    for name in ("request", "user", "time", "weight", "position", "labels"):
        np.testing.assert_array_equal(encoded.column(name), getattr(whole, name))
    np.testing.assert_array_equal(encoded.labels, whole.labels)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 12, 50])
def test_a_shuffle_gives_each_row_once_in_whole_batches(tmp_path, small, batch_size):
    encoded = written(tmp_path / "train", (5, 3, 4, 1))
    batches = numbers(encoded.batches(batch_size, shuffle=True, seed=1))
    assert sorted(chain(*batches)) == list(range(13))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    whole = numbers(encoded.batches(batch_size, shuffle=True, seed=1, drop_last=True))
    assert whole == [batch for batch in batches if len(batch) == batch_size]


def test_the_order_is_that_of_seed_and_epoch_whatever_the_blocks(tmp_path, small):
    one, other = written(tmp_path / "a", (12,)), written(tmp_path / "b", (1, 4, 4, 3))

    def order(encoded, **options):
        return numbers(encoded.batches(5, shuffle=True, **options))

    assert order(one, seed=1, epoch=2) == order(other, seed=1, epoch=2)
    assert order(one, seed=1) != order(one, seed=2)
    assert order(one, seed=1, epoch=0) != order(one, seed=1, epoch=1)
    assert order(one, seed=1) != numbers(one.batches(5))


@pytest.mark.parametrize("start", range(6))
def test_starting_later_gives_the_same_batches_and_reads_no_earlier_window(
    tmp_path, small, monkeypatch, start
):
    encoded = written(tmp_path / "train", (5, 3, 4, 8))
    whole = numbers(encoded.batches(4, shuffle=True, seed=9))
    read = []
    gathered = EncodedRows._gathered
    monkeypatch.setattr(
        EncodedRows, "_gathered", lambda self, name, at: read.append(at) or gathered(self, name, at)
    )
    assert numbers(encoded.batches(4, shuffle=True, seed=9, start_batch=start)) == whole[start:]
    # Windows that end before the start are not touched.
    stops = [stop for _, _, stop, _ in encoded._windows(9, 0)]
    assert len(stops) == 4
    assert len(read) / 5 == sum(stop > start * 4 for stop in stops)


def test_every_window_is_a_sample_of_the_whole_log(tmp_path, small):
    encoded = written(tmp_path / "train", (5, 3, 4, 9))  # 11 chunks: 4 windows of 2 or 3
    found = []
    for seed in range(30):
        windows = [[start // 2 for start, _ in pieces] for *_, pieces in encoded._windows(seed, 0)]
        assert sorted(chain(*windows)) == list(range(11))
        # Of every 4 chunks in a row each window has one; the last 3 go to three of them.
        for window in windows:
            assert [chunk // 4 for chunk in window] in ([0, 1, 2], [0, 1])
        found += windows
    for chunk in range(11):
        where = {number % 4 for number, window in enumerate(found) if chunk in window}
        assert where == {0, 1, 2, 3}


def test_a_log_within_one_window_is_shuffled_fully(tmp_path):
    encoded = written(tmp_path / "train", (3000, 3000))
    order = np.concatenate([batch.ids[:, 0] for batch in encoded.batches(1000, shuffle=True)])
    # The mean distance of a row from its place is a third of the rows.
    assert abs(np.abs(order - np.arange(6000)).mean() / 6000 - 1 / 3) < 0.02


def test_batches_own_their_memory(tmp_path):
    encoded = written(tmp_path / "train")
    for batch in encoded.batches(4):
        batch.dense.zero_()
    assert next(encoded.batches(4)).dense.sum() == 6


class _MallInfo(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_size_t * 10)]


def bytes_in_use() -> int:
    """What the process has from malloc."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallInfo
    return mallinfo().sizes[7]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")
@pytest.mark.parametrize("shuffle", [False, True])
def test_reading_keeps_nothing_of_the_blocks(tmp_path, shuffle):
    """What stayed of a block would lie between the batches' large arrays, and the heap would grow with the log."""
    blocks = 300
    encoded = written(tmp_path / "train", blocks=(10,) * blocks)
    list(written(tmp_path / "other").batches(10, shuffle=shuffle))  # makes what is made once
    before = bytes_in_use()
    count = sum(len(batch.labels) for batch in encoded.batches(64, shuffle=shuffle))
    count += sum(len(piece["user"]) for piece in encoded.pieces(("user", "request", "time"), 64))
    assert count == 2 * 10 * blocks
    # Arrow's description of a block takes 4,600.
    assert bytes_in_use() - before < 200 * blocks


def test_matrices_without_columns(tmp_path):
    layout = EncodedLayout(ids=LAYOUT.ids, dense=(), tables=LAYOUT.tables, tasks=LAYOUT.tasks)
    with ShardWriter(tmp_path / "train", layout) as writer:
        block = rows(0, 5)
        writer.write(EncodedBlock(**{**block.__dict__, "dense": np.zeros((5, 0), np.float32)}))
    batches = list(EncodedRows(tmp_path / "train").batches(3, shuffle=True))
    assert [tuple(batch.dense.shape) for batch in batches] == [(3, 0), (2, 0)]


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "train", LAYOUT) as writer:
        writer.write(rows(0, 3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole(tmp_path):
    written(tmp_path / "train", (5,))
    assert len(written(tmp_path / "train", (2,))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["train"]


def test_damage_is_named(tmp_path):
    encoded = written(tmp_path / "train")
    encoded.verify()
    file = tmp_path / "train" / "rows-00000.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(UserError, match=r"rows-00000.arrow: damaged \(its checksum"):
        EncodedRows(tmp_path / "train").verify()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"rows-00000.arrow: damaged \(\d+ bytes, expected"):
        EncodedRows(tmp_path / "train")
    file.unlink()
    with pytest.raises(UserError, match="rows-00000.arrow: missing"):
        EncodedRows(tmp_path / "train")
    manifest = tmp_path / "train" / "manifest.json"
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**raw, "format": 7}))
    with pytest.raises(UserError, match="encoded rows of format 7; this version of mldcn reads format 1"):
        EncodedRows(tmp_path / "train")
    manifest.write_text("[]")
    with pytest.raises(UserError, match="manifest.json: damaged"):
        EncodedRows(tmp_path / "train")
    with pytest.raises(UserError, match="cannot be read"):
        EncodedRows(tmp_path / "nowhere")
