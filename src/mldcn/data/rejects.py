"""Rows that cannot be used: what is wrong with each, and the file that keeps a line of each one left out."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mldcn.errors import UserError
from mldcn.files import atomic

HEADER = ("file", "row", "column", "value", "problem")
_LONGEST = 200


class Reject(NamedTuple):
    """The first problem of one row. ``column`` is empty where the whole line is malformed."""

    file: str
    row: int
    column: str
    value: str
    problem: str

    def __str__(self) -> str:
        """One line, as an error prints it."""
        return described(self, self.value or None)


def described(reject: Reject, value: object) -> str:
    """A reject as an error prints it, its value in the type that the log gave it."""
    if not reject.column:
        return f"{reject.file}: row {reject.row} {reject.problem} (the row: {shown(value)})"
    return f"{reject.file}: row {reject.row}, column {reject.column!r}: {shown(value)} {reject.problem}"


class BadRows(UserError):
    """Rows of one block that cannot be used; as an error it names the first.

    Args:
        rejects: what is wrong, by the row's index in the block.
        message: of the error; that of the first reject by default.
    """

    def __init__(self, rejects: Mapping[int, Reject], message: str | None = None) -> None:
        self.rejects = dict(rejects)
        super().__init__(message or str(next(iter(self.rejects.values()))))


class RejectsFile:
    """A CSV file (file, row, column, value, problem) with a line for each row left out. A context manager.

    The file appears when the context ends well and there was a reject; one of that name that was there before is
    gone then in any case.

    Args:
        path: the file; None only counts.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.count = 0
        self.first: Reject | None = None
        self._writer: Any = None
        self._opened = ExitStack()

    def __enter__(self) -> RejectsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)
        if error is None and not self.count and self.path is not None:
            self.path.unlink(missing_ok=True)

    def add(self, rejects: Iterable[Reject]) -> None:
        """Counts the rejects and writes a line for each."""
        for reject in rejects:
            self.first = self.first or reject
            self.count += 1
            if self.path is None:
                continue
            if self._writer is None:
                temporary = self._opened.enter_context(atomic(self.path))
                file = self._opened.enter_context(temporary.open("w", encoding="utf-8", newline=""))
                self._writer = csv.writer(file, lineterminator="\n")
                self._writer.writerow(HEADER)
            self._writer.writerow(line(reject))

    def refuse_all(self, good_rows: int) -> None:
        """Refuses a log of which no row is left.

        Raises:
            UserError: rows were rejected, and none was good.
        """
        if self.count and not good_rows:
            raise UserError(f"all {self.count:,} rows are bad, so none is left; the first: {self.first}")


def shown(value: object) -> str:
    """A value as an error prints it, cut where it is long."""
    if value is None:
        return "an empty cell"
    if isinstance(value, str):
        value = value[:_LONGEST]
        # Bytes in hexadecimal stand in it with single backslashes.
        text = f"'{value}'" if value.isprintable() and "'" not in value else repr(value)
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def line(reject: Reject) -> list[str]:
    """The cells of a reject's line in a rejects file."""
    return [_one_line(str(field)) for field in reject]


def _one_line(text: str) -> str:
    """A text that stays on its line."""
    plain = text.replace("\r", "\\r").replace("\n", "\\n")
    return plain if len(plain) <= _LONGEST * 2 else plain[: _LONGEST * 2 - 3] + "..."
