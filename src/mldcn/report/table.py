"""Tables that are the same in HTML, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from mldcn.report.text import DASH, clean, escape, escape_markdown, known, number

Best = Literal["max", "min", "one"]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Interval:
    """A cell: a value and the interval around it."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Label:
    """A cell: a name, and a smaller line below it."""

    text: str
    detail: str = ""


Cell = str | int | float | Interval | Label | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """What a column of a table holds.

    Args:
        name: its heading.
        unit: shown behind the heading.
        format: of its numbers, see :func:`mldcn.report.text.number`.
        best: which of its numbers is marked: the largest, the smallest, or the one nearest to 1.
        note: what the column means; listed below the table.
    """

    name: str
    unit: str = ""
    format: str = ""
    best: Best | None = None
    note: str = ""

    @property
    def heading(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first column names the rows.

    Args:
        caption: what the table shows.
        columns: one for each cell of a row.
        rows: cells; None and NaN are shown as a dash.
        name: of the table's CSV file.
        notes: lines below the table.

    Raises:
        ValueError: a row has not a cell for each column.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    name: str = "table"
    notes: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {i} of {self.caption!r}: {len(row)} cells for {len(self.columns)} columns"
                )

    def html(self, key: str) -> str:
        """The table in a box of its own that scrolls sideways on a narrow screen."""
        numeric = [self._numeric(i) for i in range(len(self.columns))]
        best = [self._best(i) for i in range(len(self.columns))]
        head = "".join(
            f'<th scope="col"{_class(numeric[i])}>{escape(column.name)}'
            + (f' <span class="unit">{escape(column.unit)}</span>' if column.unit else "")
            + "</th>"
            for i, column in enumerate(self.columns)
        )
        body = []
        for r, row in enumerate(self.rows):
            cells = []
            for i, cell in enumerate(row):
                text = _cell_html(cell, self.columns[i].format)
                if r in best[i]:
                    text = f"<strong>{text}</strong>"
                tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
                cells.append(f"<{tag}{scope}{_class(numeric[i])}>{text}</{tag}>")
            body.append(f"<tr>{''.join(cells)}</tr>")
        notes = "".join(f"<li>{escape(note)}</li>" for note in self._notes())
        return (
            f'<div class="table" role="region" tabindex="0" aria-labelledby="{key}"><table>'
            f'<caption id="{key}">{escape(self.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
            "<tbody>\n"
            + "\n".join(body)
            + "\n</tbody></table></div>"
            + (f'\n<ul class="notes">{notes}</ul>' if notes else "")
        )

    def markdown(self) -> str:
        """The table in Markdown (GitHub's), its caption above and its notes below."""
        best = [self._best(i) for i in range(len(self.columns))]
        lines = [
            "| " + " | ".join(escape_markdown(column.heading) for column in self.columns) + " |",
            "|" + "|".join(" ---: " if self._numeric(i) else " --- " for i in range(len(self.columns))) + "|",
        ]
        for r, row in enumerate(self.rows):
            texts = [_cell_markdown(cell, self.columns[i].format) for i, cell in enumerate(row)]
            marked = [f"**{text}**" if r in best[i] else text for i, text in enumerate(texts)]
            lines.append("| " + " | ".join(marked) + " |")
        notes = "".join(f"\n- {escape_markdown(note)}" for note in self._notes())
        return f"**{escape_markdown(self.caption)}**\n\n" + "\n".join(lines) + (f"\n{notes}" if notes else "")

    def csv(self) -> str:
        """The table as CSV, with unrounded numbers.

        An interval takes three columns (``x``, ``x low``, ``x high``), a name with a detail two.
        """
        kinds = [self._kind(i) for i in range(len(self.columns))]
        suffixes: dict[type, tuple[str, ...]] = {Interval: ("", " low", " high"), Label: ("", " detail")}
        names = [
            column.heading + suffix
            for column, kind in zip(self.columns, kinds, strict=True)
            for suffix in suffixes.get(kind, ("",))
        ]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            writer.writerow(value for i, cell in enumerate(row) for value in _cell_csv(cell, kinds[i]))
        return text.getvalue()

    def _kind(self, i: int) -> type:
        kinds = {type(row[i]) for row in self.rows}
        return next((kind for kind in (Interval, Label) if kind in kinds), str)

    def _numeric(self, i: int) -> bool:
        cells = [row[i] for row in self.rows]
        return all(not isinstance(cell, str | Label) for cell in cells) and any(
            cell is not None for cell in cells
        )

    def _best(self, i: int) -> set[int]:
        """The rows that hold the column's best number; several where they are shown alike."""
        column = self.columns[i]
        values = {
            r: value
            for r, row in enumerate(self.rows)
            if known(value := _value(row[i])) and value is not None
        }
        if column.best is None or len(values) < 2:
            return set()
        keys = {
            "max": lambda v: -v,
            "min": lambda v: v,
            "one": lambda v: abs(math.log(v)) if v > 0 else math.inf,
        }
        key = keys[column.best]
        shown = number(min(values.values(), key=key), column.format)
        marked = {r for r, value in values.items() if number(value, column.format) == shown}
        return marked if len(marked) < len(values) else set()  # where all are alike, none stands out

    def _notes(self) -> list[str]:
        notes = [f"{column.name}: {column.note}" for column in self.columns if column.note]
        if any(self._best(i) for i in range(len(self.columns))):
            notes.append(
                "Bold: the best number of its column, whether or not the others differ beyond chance."
            )
        return notes + list(self.notes)


def table_of(
    caption: str,
    rows: Sequence[Row],
    columns: Sequence[tuple[Column, Callable[[Row], Cell]]],
    *,
    name: str,
    notes: Sequence[str] = (),
) -> Table:
    """A table of those columns that say something of any row; the first is always there."""
    cells = [[cell(row) for row in rows] for _, cell in columns]
    kept = [i for i in range(len(columns)) if i == 0 or any(cell not in (None, "") for cell in cells[i])]
    body = [[cells[i][r] for i in kept] for r in range(len(rows))]
    return Table(caption, [columns[i][0] for i in kept], body, name, notes)


def _class(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _value(cell: Cell) -> float | int | None:
    if isinstance(cell, Interval):
        return cell.value
    return None if isinstance(cell, str | Label) else cell


def _cell_html(cell: Cell, spec: str) -> str:
    if isinstance(cell, Label):
        return escape(cell.text) + (f"<small>{escape(cell.detail)}</small>" if cell.detail else "")
    if isinstance(cell, Interval) and (known(cell.low) or known(cell.high)):
        return (
            f"{_shown(cell.value, spec)}<small>{_shown(cell.low, spec)} to {_shown(cell.high, spec)}</small>"
        )
    return _shown(_value(cell), spec) if not isinstance(cell, str) else escape(cell or DASH)


def _cell_markdown(cell: Cell, spec: str) -> str:
    if isinstance(cell, Label):
        return escape_markdown(f"{cell.text} ({cell.detail})" if cell.detail else cell.text)
    if isinstance(cell, Interval) and (known(cell.low) or known(cell.high)):
        return f"{_shown(cell.value, spec)} ({_shown(cell.low, spec)} to {_shown(cell.high, spec)})"
    return _shown(_value(cell), spec) if not isinstance(cell, str) else escape_markdown(cell or DASH)


def _shown(value: float | int | None, spec: str) -> str:
    return escape(number(value, spec))


def _cell_csv(cell: Cell, kind: type) -> list[str | int | float]:
    parts: Sequence[str | int | float | None]
    if kind is Interval:
        parts = (
            (cell.value, cell.low, cell.high) if isinstance(cell, Interval) else (_value(cell), None, None)
        )
    elif kind is Label:
        parts = (
            (cell.text, cell.detail)
            if isinstance(cell, Label)
            else (cell if isinstance(cell, str) else "", "")
        )
    else:
        parts = (cell if isinstance(cell, str) else _value(cell),)
    return [
        clean(part) if isinstance(part, str) else "" if part is None or math.isnan(part) else part
        for part in parts
    ]
