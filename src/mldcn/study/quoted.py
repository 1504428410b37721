"""A paper's own figures as a recipe quotes them: shown beside what is measured, never among it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mldcn.study.findings import Standing


@dataclass(frozen=True)
class Quoted:
    """One column of a paper's table.

    source: the paper and its table. what: the figures are of. values: point (``rank=48``), rival, or
    ``rival@point`` -> figure. notes: on the paper's own set-up.
    """

    source: str
    what: str
    values: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def of(self, standing: Standing) -> float | None:
        """The figure for a rival at a point."""
        names = (f"{standing.rival}@{standing.point}", standing.point, standing.rival)
        return next((self.values[name] for name in names if name in self.values), None)


def read_quoted(raw: Mapping[str, Any]) -> list[Quoted]:
    """The columns that a recipe quotes.

    Args:
        raw: its ``quoted``: ``source``, ``what``, ``values`` and ``notes``, or such mappings by any names.

    Example:
        >>> read_quoted({"source": "A, Table 1", "what": "AUC gain", "values": {"rank=2": 0.1}})[0].values
        {'rank=2': 0.1}
    """
    return list(_columns(raw))


def _columns(raw: Mapping[str, Any]) -> Iterator[Quoted]:
    values = raw.get("values")
    if not isinstance(values, Mapping):
        for part in raw.values():
            for each in part if isinstance(part, list | tuple) else [part]:
                if isinstance(each, Mapping):
                    yield from _columns(each)
        return
    notes = raw.get("notes", ())
    notes = (notes,) if isinstance(notes, str) else tuple(notes)
    source, what = str(raw.get("source", "the paper")), str(raw.get("what", "figure"))
    several = {str(name): cell for name, cell in values.items() if isinstance(cell, Mapping)}
    single = {str(name): float(cell) for name, cell in values.items() if isinstance(cell, int | float)}
    if single:
        yield Quoted(source, what, single, notes)
    for column in dict.fromkeys(column for cells in several.values() for column in cells):
        found = {name: float(cells[column]) for name, cells in several.items() if column in cells}
        yield Quoted(source, str(column), found, notes)
