from collections import Counter
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mldcn.data import counting, vocabulary
from mldcn.data.counting import VocabularyBuilder
from mldcn.data.hashing import hash_texts
from mldcn.data.vocabulary import HashedRows, KeyIndex, Vocabulary, VocabularyWriter
from mldcn.errors import UserError


def built(blocks, min_count=1, max_size=None, base=None):
    builder = VocabularyBuilder()
    for block in blocks:
        count(builder, block)
    return builder.finish(min_count, max_size, base)


def count(builder, block):
    seen = Counter(block)
    texts = pa.array(list(seen), pa.string())
    builder.update(hash_texts(texts), np.array(list(seen.values()), np.int64), texts)


def rows(vocab, *texts):
    return vocab.lookup(hash_texts(pa.array(texts, pa.string()))).tolist()


def test_rows_are_missing_unknown_then_the_most_frequent_then_by_value():
    vocab = built([["b", "a", "c", None], ["c", "z"]])
    assert vocab.values.to_pylist() == ["c", "a", "b", "z"]
    assert vocab.counts.tolist() == [2, 1, 1, 1]
    assert rows(vocab, None, "never seen", "c", "a", "b", "z") == [0, 1, 2, 3, 4, 5]
    assert vocab.rows == 6


def test_min_count_and_max_size():
    blocks = [["a"] * 3 + ["b"] * 2 + ["c"] * 2 + ["d"]]
    assert built(blocks, min_count=2).values.to_pylist() == ["a", "b", "c"]
    assert built(blocks, max_size=2).values.to_pylist() == ["a", "b"]
    assert rows(built(blocks, min_count=4), "a") == [1]


def test_large_ids_stay_apart():
    # 2^24 + 1 and 2^53 + 1 are no float32 and float64.
    ids = [str(2**k + d) for k in (24, 53, 63) for d in (0, 1)]
    assert len(set(rows(built([ids]), *ids))) == 6


@given(st.lists(st.lists(st.none() | st.text(max_size=3), max_size=30), max_size=5), st.integers(1, 3))
def test_equals_counting_by_hand(blocks, min_count):
    counts = Counter(text for block in blocks for text in block if text is not None)
    expected = sorted((t for t in counts if counts[t] >= min_count), key=lambda t: (-counts[t], t.encode()))
    vocab = built(blocks, min_count)
    assert vocab.values.to_pylist() == expected
    assert rows(vocab, *expected) == list(range(2, 2 + len(expected)))


def test_merging_often_changes_nothing(monkeypatch):
    blocks = [[str(i * j % 97) for i in range(50)] for j in range(1, 20)]
    once = built(blocks)
    monkeypatch.setattr(counting, "_MERGE_AT", 1)
    often = built(blocks)
    assert often.values.equals(once.values)
    assert often.counts.tolist() == once.counts.tolist()


def test_key_index_at_its_edges():
    keys = np.array([0, 5, 2**63, 2**64 - 1], np.uint64)
    queries = np.array([0, 1, 5, 6, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)
    assert KeyIndex(keys).find(queries).tolist() == [0, -1, 1, -1, 2, -1, 3]
    assert KeyIndex(keys[:0]).find(queries).tolist() == [-1] * 7


def test_saved_and_loaded(tmp_path):
    vocab = built([["b", "a", "b", "é"]])
    vocab.save(tmp_path / "v.arrow")
    again = Vocabulary.load(tmp_path / "v.arrow")
    assert again.values.equals(vocab.values)
    assert rows(again, "b", "é", "x") == rows(vocab, "b", "é", "x")


def test_empty_vocabulary(tmp_path):
    built([]).save(tmp_path / "v.arrow")
    assert rows(Vocabulary.load(tmp_path / "v.arrow"), "a", None) == [1, 0]


def test_other_versions_and_damage_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "v.ids"
    built([["a"]]).save(path)
    monkeypatch.setattr(vocabulary, "FORMAT", 3)
    with pytest.raises(UserError, match="a vocabulary of format 2; this version of mldcn reads format 3"):
        Vocabulary.load(path)
    for size in (0, 10, 40, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match="no readable vocabulary"):
            Vocabulary.load(path)


def random_blocks(seed, number=40, size=200, distinct=3000):
    draw = np.random.default_rng(seed)
    # Some ids are frequent, most are rare; their texts differ in length.
    return [
        [f"{int(i):x}" * (int(i) % 3 + 1) for i in draw.pareto(0.5, size) % distinct] for _ in range(number)
    ]


@pytest.mark.parametrize("memory", [1 << 40, 60_000, 2_000])
@pytest.mark.parametrize(("min_count", "max_size"), [(1, None), (2, None), (1, 100), (2, 0)])
def test_runs_on_disk_change_nothing(tmp_path, memory, min_count, max_size):
    blocks = random_blocks(1)
    expected = built(blocks, min_count, max_size)
    builder = VocabularyBuilder()
    for number, block in enumerate(blocks):
        count(builder, block)
        if number % 7 == 3:
            builder.flush(tmp_path / f"{number}.run")
    found = builder.finish(min_count, max_size, path=tmp_path / "out" / "v.ids", memory=memory)
    found.save(tmp_path / "found")
    expected.save(tmp_path / "expected")
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    assert len(builder) == len(set(chain.from_iterable(blocks)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v.ids"]


@pytest.mark.parametrize("memory", [1 << 40, 5_000])
def test_a_base_keeps_its_rows(tmp_path, memory):
    base = built(random_blocks(2, number=5), max_size=50)
    blocks = random_blocks(3)
    seen = Counter(chain.from_iterable(blocks))
    old = base.values.to_pylist()
    new = sorted((t for t in seen if seen[t] >= 2 and t not in old), key=lambda t: (-seen[t], t.encode()))
    builder = VocabularyBuilder()
    for number, block in enumerate(blocks):
        count(builder, block)
        builder.flush(tmp_path / f"{number}.run")
    grown = builder.finish(2, 200, base, path=tmp_path / "v.ids", memory=memory)
    assert grown.values.to_pylist() == old + new[:150]
    assert grown.counts.tolist() == [seen[t] for t in old + new[:150]]
    assert rows(grown, *old) == list(range(2, 52))


def test_keys_are_sorted_in_parts_where_memory_is_short(tmp_path):
    texts = pa.array([str(i) for i in range(5000)])
    keys, counts = hash_texts(texts), np.ones(5000, np.int64)
    for name, memory in (("much", 1 << 30), ("little", 10_000)):
        with VocabularyWriter(tmp_path / name, memory) as writer:
            writer.add(texts, keys, counts)
    assert (tmp_path / "much").read_bytes() == (tmp_path / "little").read_bytes()
    assert Vocabulary.load(tmp_path / "little").lookup(keys).tolist() == list(range(2, 5002))


def test_hashed_rows():
    keys = hash_texts(pa.array([None, *map(str, range(10_000))]))
    table = HashedRows(100, 2)
    first, second = table.lookup(keys, 0), table.lookup(keys, 1)
    assert table.rows == 102
    assert first[0] == second[0] == 0
    assert first[1:].min() == 2
    assert first[1:].max() == 101
    # Independent: two ids of one row in the first hash agree in the second as seldom as any two.
    assert abs((first[1:] == second[1:]).mean() - 0.01) < 0.005
