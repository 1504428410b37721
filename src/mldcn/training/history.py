"""``history.jsonl``: a line an evaluation, and one each time that training was rolled back."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from mldcn.errors import UserError
from mldcn.files import write_text, writing


class History:
    """Lines that are only added to. A checkpoint holds how long the file was, so that a resumed run can cut off
    what came later.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, line: dict[str, Any]) -> None:
        """Appends a line and flushes it to the disk."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)

    def state(self) -> dict[str, int]:
        """The file's length and checksum."""
        content = self._read()
        return {"bytes": len(content), "crc32": zlib.crc32(content)}

    def restore(self, state: dict[str, int]) -> None:
        """Cuts the file to what it was.

        Raises:
            UserError: what it was then is no longer there.
        """
        content = self._read()[: state["bytes"]]
        if len(content) != state["bytes"] or zlib.crc32(content) != state["crc32"]:
            raise UserError(
                f"{self.path}: was damaged while the run was in progress; restore it, or train anew"
            )
        write_text(self.path, content.decode())

    def _read(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""


def evaluations(path: Path) -> list[tuple[int, dict[str, dict[str, float]]]]:
    """Step and metrics by task of each evaluation in a history."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["metrics"]) for line in lines if "metrics" in line]
