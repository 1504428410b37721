"""Where each field lies inside ``x0``, the flat vector ``(B, d)`` that every interaction reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

Source = Literal["user", "item", "user_item", "context"]
FieldKind = Literal["numeric", "categorical", "multi", "embedding", "sequence"]


@dataclass(frozen=True)
class Field:
    """One field of ``x0``: columns ``offset .. offset + width``."""

    name: str
    kind: FieldKind
    source: Source
    width: int
    offset: int

    @property
    def columns(self) -> slice:
        """The field's columns of ``x0``."""
        return slice(self.offset, self.offset + self.width)


@dataclass(frozen=True)
class FieldLayout:
    """The fields of ``x0`` in order, without gaps.

    Architectures that work on tokens read it to cut ``x0`` into fields; flat ones use only ``width``.
    """

    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        expected = 0
        for field in self.fields:
            if field.width < 1 or field.offset != expected:
                raise ValueError(
                    f"field {field.name!r} has offset {field.offset} and width {field.width}; "
                    f"expected offset {expected} and a width of at least 1"
                )
            expected += field.width
        if not self.fields:
            raise ValueError("a layout needs at least one field")
        if len({field.name for field in self.fields}) != len(self.fields):
            raise ValueError("field names must be distinct")

    @classmethod
    def build(cls, fields: Sequence[tuple[str, FieldKind, Source, int]]) -> FieldLayout:
        """A layout from ``(name, kind, source, width)`` in order; offsets are filled in."""
        placed, offset = [], 0
        for name, kind, source, width in fields:
            placed.append(Field(name, kind, source, width, offset))
            offset += width
        return cls(tuple(placed))

    @classmethod
    def flat(cls, width: int) -> FieldLayout:
        """One anonymous field of ``width`` columns: what a drop-in user with a plain tensor has."""
        return cls.build([("x0", "embedding", "context", width)])

    @classmethod
    def uniform(cls, num_fields: int, width: int) -> FieldLayout:
        """``num_fields`` categorical fields of one width, as in most papers' ``F x e`` inputs."""
        return cls.build([(f"f{i}", "categorical", "context", width) for i in range(num_fields)])

    @property
    def width(self) -> int:
        """``d``, the width of ``x0``."""
        return self.fields[-1].offset + self.fields[-1].width

    @property
    def widths(self) -> tuple[int, ...]:
        """Each field's width, in order."""
        return tuple(field.width for field in self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)


def as_layout(features: int | FieldLayout) -> FieldLayout:
    """The layout itself, or a flat one of the given width."""
    return features if isinstance(features, FieldLayout) else FieldLayout.flat(features)


@dataclass(frozen=True)
class FirstOrder:
    """Side input ``(B, F)``: each field's first-order term, a learned weight an id or a number (w_i x_i)."""

    def width(self, layout: FieldLayout) -> int:
        """Its columns: one a field."""
        return len(layout)


@dataclass(frozen=True)
class SecondEmbedding:
    """Side input ``(B, d)``: an ``x0`` of the same fields from tables of its own."""

    def width(self, layout: FieldLayout) -> int:
        """Its columns: those of ``x0``."""
        return layout.width


@dataclass(frozen=True)
class CrossedIds:
    """Side input ``(B, P hashes dim)``: codewords of the P combinations of ``order`` categorical fields.

    Combinations go in the order of ``itertools.combinations`` over the layout's fields of kind
    ``categorical``; each has its ``hashes`` codewords side by side. All share one codebook.

    Args:
        rows: codewords in the codebook.
        dim: width of a codeword.
        hashes: codewords a combination.
        order: fields in a combination.
    """

    rows: int
    dim: int
    hashes: int = 2
    order: int = 2

    def combinations(self, layout: FieldLayout) -> int:
        """P."""
        return comb(sum(field.kind == "categorical" for field in layout), self.order)

    def width(self, layout: FieldLayout) -> int:
        """Its columns."""
        return self.combinations(layout) * self.hashes * self.dim


Side = FirstOrder | SecondEmbedding | CrossedIds
