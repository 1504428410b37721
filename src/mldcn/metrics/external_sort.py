"""Sorting more rows than memory should hold: sorted runs on disk, merged block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mldcn.errors import UserError
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
        self._runs: list[Path] = []

    def add(self, rows: Array) -> None:
        """Writes ``(n,)`` structured rows as one sorted run.

        Raises:
            UserError: the folder cannot be written.
        """
        if not len(rows):
            return
        path = self._folder / f"run-{len(self._runs):05d}.npy"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            np.save(path, rows[np.argsort(rows["key"], kind="stable")], allow_pickle=False)
        except OSError as error:
            raise UserError(
                f"{path}: cannot keep rows to sort ({error.strerror or error}); name a workdir with room"
            ) from None
        self._runs.append(path)

    def blocks(self, rows: int) -> Iterator[Array]:
        """All rows in order of key, in blocks of about ``rows``; equal keys can lie in several blocks."""
        runs = [np.load(path, mmap_mode="r", allow_pickle=False) for path in self._runs]
        done = [0] * len(runs)
        share = max(_LEAST_READ, rows // max(1, len(runs)))
        while True:
            windows = [run[at : at + share] for run, at in zip(runs, done, strict=True)]
            # Every run is read at least to this key, and one of them has its whole window taken.
            last = [window["key"][-1] for window in windows if len(window)]
            if not last:
                return
            bound = min(last)
            parts = []
            for index, window in enumerate(windows):
                taken = int(np.searchsorted(window["key"], bound, side="right"))
                parts.append(np.array(window[:taken]))
                done[index] += taken
            block = np.concatenate(parts)
            # The stable sort finds the runs that it is made of and merges them.
            yield block[np.argsort(block["key"], kind="stable")]


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
