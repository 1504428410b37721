"""Stable 64-bit hashes of texts: the same on every machine, run and version of the libraries.

A text is read as little-endian 8-byte words w_1 .. w_m (the last one padded with zero bytes) and hashed as
h_0 = seed', h_k = x ^ (x >> 32) with x = (h_{k-1} ^ w_k) * M, and at the end splitmix64(h_m + length).
Each step is a bijection of h and of w_k, so that texts of one length up to 8 bytes never collide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

# The key of a missing value; no text has it.
NO_KEY = 0

_M = np.uint64(0x9E3779B97F4A7C15)
# Keep so many bytes of a word.
WORD_MASKS = np.array([(1 << 8 * length) - 1 for length in range(9)], dtype=np.uint64)


class Texts(Protocol):
    """Texts that are made when they are asked for; an Arrow array is some."""

    def take(self, places: Any) -> pa.Array:
        """Some of them."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class WordTexts:
    """Texts of up to 8 bytes, none of them 0, that are given as words, ``(d,)``."""

    words: Keys

    def take(self, places: Any) -> pa.Array:
        """Some of them."""
        characters = self.words[np.asarray(places)].astype("<u8").view(np.uint8).reshape(-1, 8)
        there = characters != 0
        ends = np.zeros(len(characters) + 1, np.int32)
        np.cumsum(there.sum(axis=1), out=ends[1:])
        return pa.StringArray.from_buffers(
            len(characters), pa.py_buffer(ends), pa.py_buffer(characters[there])
        )

    def some(self, places: NDArray[np.int64]) -> WordTexts:
        """Some of them, as words."""
        return WordTexts(self.words[places])

    def heads(self) -> Keys:
        """What :func:`first_words` gives for them."""
        return self.words.astype("<u8").view(">u8").astype(np.uint64)

    def __len__(self) -> int:
        return len(self.words)


def splitmix64(x: Keys) -> Keys:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that mixes well."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash_numbers(numbers: NDArray[np.integer], seed: int = 0) -> Keys:
    """A keyed hash of whole numbers, such as row numbers."""
    return splitmix64(numbers.astype(np.uint64) ^ _start(seed))


def hash_texts(texts: pa.Array, seed: int = 0) -> Keys:
    """The keys of texts, ``NO_KEY`` for nulls.

    Args:
        texts: an Arrow array of strings, ``(n,)``.
        seed: keys under different seeds are independent.

    Returns:
        ``(n,)`` uint64.
    """
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        texts = pc.cast(texts, pa.string())
    if len(texts) == 0:
        return np.zeros(0, np.uint64)
    words, starts, lengths = _words(texts, "<u8")
    keys = np.full(len(texts), _start(seed), np.uint64)
    _absorb(keys, words[starts], np.minimum(lengths, 8))
    longest, done = int(lengths.max()), 8
    rows = np.flatnonzero(lengths > done) if longest > done else np.zeros(0, np.int64)
    while len(rows):
        part = keys[rows]
        _absorb(part, words[starts[rows] + done], np.minimum(lengths[rows] - done, 8))
        keys[rows] = part
        done += 8
        rows = rows[lengths[rows] > done]
    keys = _finished(keys, lengths)
    if texts.null_count:
        keys[pc.is_null(texts).to_numpy(zero_copy_only=False)] = NO_KEY
    return keys


def hash_words(words: Keys, lengths: NDArray[np.integer]) -> Keys:
    """What :func:`hash_texts` gives for texts of up to 8 bytes that are given as words, ``(n,)``."""
    keys = np.full(len(words), _start(0), np.uint64)
    _absorb(keys, words, lengths)
    return _finished(keys, lengths)


def first_words(texts: pa.Array) -> Keys:
    """The first 8 bytes of each text as a number that sorts as they do, ``(n,)``; shorter texts end with zeros."""
    words, starts, lengths = _words(texts, ">u8")
    kept = ~(np.uint64(2**64 - 1) >> (8 * np.minimum(lengths, 7)).astype(np.uint64))
    kept[lengths >= 8] = np.uint64(2**64 - 1)
    return words[starts].astype(np.uint64) & kept


def _words(texts: pa.Array, kind: str) -> tuple[Keys, NDArray[np.int64], NDArray[np.int64]]:
    """The 8 bytes from each byte of the texts on, where each text begins, and how many bytes it has."""
    wide = pa.types.is_large_string(texts.type)
    _, offset_buffer, data = texts.buffers()
    stored = np.frombuffer(offset_buffer, np.int64 if wide else np.int32)
    stops = stored[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    first, last = int(stops[0]), int(stops[-1])
    # Eight spare bytes, so that the last word of the last text can be read whole.
    padded = np.zeros(last - first + 8, np.uint8)
    if last > first:
        padded[:-8] = np.frombuffer(data, np.uint8)[first:last]
    words: Keys = np.ndarray((last - first + 1,), np.dtype(kind), buffer=padded, strides=(1,))
    return words, stops[:-1] - first, np.diff(stops)


def _absorb(keys: Keys, words: Keys, lengths: NDArray[np.integer]) -> None:
    """One word a text, in place; an empty text takes a word of zero bytes."""
    words = words & WORD_MASKS[lengths]
    keys ^= words
    keys *= _M
    keys ^= keys >> np.uint64(32)


def _finished(keys: Keys, lengths: NDArray[np.integer]) -> Keys:
    keys = splitmix64(keys + lengths.astype(np.uint64))
    keys[keys == NO_KEY] = 1
    return keys


def _start(seed: int) -> np.uint64:
    return np.uint64(splitmix64(np.array([seed & (2**64 - 1)], np.uint64))[0])
