"""Sorting more rows than memory should hold: sorted runs on disk, merged block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mldcn.errors import UserError
from mldcn.files import writing
from mldcn.metrics.rows import Array

# The fewest rows read of a run at a time: below this a merge would be all overhead.
_LEAST_READ = 1024


class ExternalSort:
    """Sorts structured rows by their field ``key``.

    Each :meth:`add` sorts what it is given and writes it as one run, an .npy file in ``folder``;
    :meth:`blocks` maps the runs and merges them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._dtype: np.dtype[Any] | None = None
        self._runs: list[tuple[Path, int]] = []

    def add(self, rows: Array) -> None:
        """Writes ``(n,)`` structured rows as one sorted run.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        if not len(rows):
            return
        path = self._folder / f"run-{len(self._runs):05d}.rows"
        try:
            with writing(path):
                self._folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(rows[np.argsort(rows["key"], kind="stable")].view(np.uint8).data)
        except OSError as error:
            raise UserError(f"{path}: cannot keep rows to sort ({error}); name a workdir with room") from None
        self._dtype = rows.dtype
        self._runs.append((path, len(rows)))

    def blocks(self, rows: int) -> Iterator[Array]:
        """All rows in order of key, in blocks of about ``rows``; equal keys can lie in several blocks."""
        share = max(_LEAST_READ, rows // max(1, len(self._runs)))
        windows = [self._read(run, 0, share) for run in range(len(self._runs))]
        done = [0] * len(windows)
        while any(len(window) for window in windows):
            # Every run is read at least to this key, and one of them has its whole window taken.
            bound = min(window["key"][-1] for window in windows if len(window))
            parts = []
            for run, window in enumerate(windows):
                taken = int(np.searchsorted(window["key"], bound, side="right"))
                parts.append(window[:taken])
                if taken:
                    done[run] += taken
                    windows[run] = self._read(run, done[run], share)
            block = np.concatenate(parts)
            # The stable sort finds the runs that it is made of and merges them.
            yield block[np.argsort(block["key"], kind="stable")]

    def _read(self, run: int, start: int, rows: int) -> Array:
        # Read, not mapped: the pages of a map would count as this process's memory.
        path, length = self._runs[run]
        assert self._dtype is not None
        count = min(rows, length - start)
        return np.fromfile(path, self._dtype, count, offset=start * self._dtype.itemsize)


def whole_keys(blocks: Iterable[Array]) -> Iterator[Array]:
    """Cuts sorted blocks anew, so that equal keys lie in one. A block grows as large as its largest key."""
    held: list[Array] = []
    for block in blocks:
        keys = block["key"]
        cut = int(np.searchsorted(keys, keys[-1], side="left"))
        if held and keys[0] != held[0]["key"][-1]:
            yield np.concatenate(held)
            held = []
        if cut:
            yield np.concatenate([*held, block[:cut]])
            held = []
        held.append(block[cut:])
    if held:
        yield np.concatenate(held)
