"""What an unfinished preparation has done so far, in a folder of its own, so that a later one can go on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mldcn.data.rejects import HEADER, Reject, RejectsFile, line
from mldcn.data.spool import whole
from mldcn.files import checksum, write_text

_STATE = "state.json"
_SPOOL = "parsed.spool"
_FIT = "fit"


class Partial:
    """The folder and its state; damaged or foreign state is discarded.

    Args:
        folder: the folder; it is made if need be.
        key: what the preparation depends on, as plain data.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        self.spool = folder / _SPOOL
        self.state = read_sealed(folder / _STATE)
        # Whether there is anything on disk to go on from.
        self.saved = self.state.get("key") == key and self._whole()
        if not self.saved:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.state = {"key": key, "crc32": {}}
        self._sweep()

    def save(self, **state: Any) -> None:
        """Notes what is done; what is in the folder must be flushed to disk already."""
        self.state |= state
        sums, needed = self.state["crc32"], self._needed()
        self.state["crc32"] = {n: sums[n] for n in sums if n in needed or not n.startswith(f"{_FIT}/")}
        write_sealed(self.folder / _STATE, self.state)
        self.saved = True
        self._sweep()

    def vouch(self, *names: str) -> None:
        """Takes checksums of files that have none yet, to be noted by the next :meth:`save`."""
        sums = self.state["crc32"]
        sums |= {name: checksum(self.folder / name) for name in names if name not in sums}

    def discard_fit(self) -> None:
        """Removes what only an unfinished fit needs."""
        shutil.rmtree(self.folder / _FIT, ignore_errors=True)

    @staticmethod
    def clean(folder: Path) -> None:
        """Removes all that only an unfinished preparation needs."""
        for name in (_STATE, _SPOOL):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / _FIT, ignore_errors=True)

    def _needed(self) -> set[str]:
        """The fit's files that the state knows."""
        return {str(self.state.get("fitter")), *(f"{_FIT}/{run}" for run in self.state.get("runs", ()))}

    def _sweep(self) -> None:
        """Removes the others."""
        needed = self._needed()
        for path in (self.folder / _FIT).rglob("*.*"):
            if str(path.relative_to(self.folder)) not in needed:
                path.unlink()

    def _whole(self) -> bool:
        try:
            for name, crc in self.state["crc32"].items():
                if checksum(self.folder / name) != crc:
                    return False
            return whole(self.spool, self.state.get("spool", 0))
        except (OSError, KeyError, TypeError, AttributeError):
            return False


class PartialRejects(RejectsFile):
    """A rejects file that is written in place, so that a later preparation can go on with it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path
        self._file: IO[str] | None = None

    def add(self, rejects: Iterable[Reject]) -> None:
        """Counts the rejects and writes a line for each."""
        for reject in rejects:
            if self._file is None:
                self._open("w").writerow(HEADER)
            self.first = self.first or reject
            self.count += 1
            self._writer.writerow(line(reject))

    def sync(self) -> list[int]:
        """Flushes what was written to disk; gives what :meth:`resume` needs to go on from here."""
        if self._file is None:
            return [0, 0]
        self._file.flush()
        os.fsync(self._file.fileno())
        return [self._path.stat().st_size, self.count]

    def resume(self, size: int, count: int) -> None:
        """Goes on where an earlier writer of the file was; what was written since is dropped."""
        self.close()
        self.count, self.first = count, None
        if not size:
            self._path.unlink(missing_ok=True)
            return
        os.truncate(self._path, size)
        with self._path.open(encoding="utf-8", newline="") as file:
            _, first = islice(csv.reader(file), 2)
        self.first = Reject(first[0], int(first[1]), *first[2:])
        self._open("a")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, mode: str) -> Any:
        self._file = self._path.open(mode, encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        return self._writer


def read_sealed(path: Path) -> dict[str, Any]:
    """A mapping that :func:`write_sealed` wrote; an empty one where there is none, or it was changed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.pop("seal", None) == _seal(found) else {}


def write_sealed(path: Path, facts: dict[str, Any]) -> None:
    """Writes plain data with a checksum of itself, atomically."""
    write_text(path, json.dumps({**facts, "seal": _seal(facts)}, indent=1, ensure_ascii=False) + "\n")


def _seal(facts: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"
