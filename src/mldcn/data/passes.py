"""The passes over one log: what part each row belongs to, and what is made of each block, by threads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mldcn.config import ColumnSplit, Config, DataConfig, FilesSplit, HashSplit, OrderSplit
from mldcn.data.encoder import Encoder
from mldcn.data.fitting import Fitter
from mldcn.data.parsing import ParsedBlock, id_columns, number_columns, parse, salvage
from mldcn.data.pipeline import ahead, cores, ordered_map
from mldcn.data.reading import BLOCK_BYTES, LogReader, RawBlock, expand
from mldcn.data.rejects import Reject
from mldcn.data.splits import (
    LEFT_OUT,
    PARTS,
    TRAIN,
    ColumnRule,
    HashRule,
    Part,
    Parts,
    Rule,
    ThresholdRule,
    TimesOnDisk,
    order_rule,
    row_times,
)
from mldcn.errors import UserError

# What is being done, rows done, bytes of the log done and in all.
Progress = Callable[[str, int, int, int], None]
Watch = Callable[[ParsedBlock, Parts], None]
Out = TypeVar("Out")


class LogPasses:
    """The passes over one log.

    Args:
        config: its ``data`` and ``schema`` parts are read.
        progress: called after each block.
        rejected: given the rows of each block that were left out, where bad rows are skipped.

    Raises:
        UserError: a file is missing.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress | None = None,
        rejected: Callable[[Sequence[Reject]], None] | None = None,
    ) -> None:
        self._schema = config.log_schema
        self._data = config.data
        self.files = _files_of(config.data)
        self.progress = progress or (lambda *_: None)
        self._rejected = rejected or (lambda _: None)
        self.fingerprint: dict[str, Any] = {}
        # A block in flight is held as it was read, as it was parsed, and as bytes.
        fitting = (config.data.memory_mb << 20) // 4 // (3 * BLOCK_BYTES)
        self.workers = max(1, min(cores(), fitting))

    def wanted(self, part: Part) -> bool:
        """Whether the split gives a part any rows; a share of 0 leaves it out."""
        split = self._data.split
        if isinstance(split, FilesSplit):
            return bool(self.files[part])
        return part == "train" or isinstance(split, ColumnSplit) or getattr(split, part) > 0

    def rule(self, folder: Path, bounds: Sequence[float] | None = None) -> Rule | None:
        """What says which part a row belongs to; None where each part has files of its own.

        Args:
            folder: for a temporary file of times.
            bounds: those of the rule that an earlier call found, so that it need not look for them again.
        """
        split = self._data.split
        if isinstance(split, FilesSplit):
            return None
        if isinstance(split, ColumnSplit):
            return ColumnRule(split)
        if split.valid + split.test >= 1:
            raise UserError(
                f"data.split: valid {split.valid:g} and test {split.test:g} leave no rows for training; lower them"
            )
        if isinstance(split, HashSplit):
            return HashRule(split)
        time = None if isinstance(split, OrderSplit) else self._schema.time
        if bounds is not None:
            return ThresholdRule(time, *bounds)
        if isinstance(split, OrderSplit):
            column = self._schema.labels[0].log_column
            return order_rule(
                split, sum(block.span for block in self._blocks("count rows", "train", [column]))
            )
        if time is None:
            raise UserError("data.split goes by time, but schema.time names no column; name it")
        times = TimesOnDisk(folder)
        try:
            for block in self._blocks("find times", "train", [time]):
                times.add(salvage(block, lambda block: row_times(block, time))[0])
            return times.rule(split, time)
        finally:
            times.close()

    def fit(self, rule: Rule | None, fitter: Fitter, watch: Watch | None = None) -> Encoder:
        """Fits on the training rows.

        Args:
            rule: what :meth:`rule` gave.
            fitter: what to fit.
            watch: shown every block that is read, and the part of each of its rows.
        """
        counts = np.zeros(LEFT_OUT + 1, np.int64)
        for (parsed, measured), parts in self.run(
            "fit", "train", rule, lambda block, parts: _measured(fitter, self.parse(block, rule), parts)
        ):
            counts += np.bincount(parts, minlength=len(counts))
            fitter.add(measured)
            if watch is not None:
                watch(parsed, parts)
        self.check(rule, counts)
        return fitter.finish()

    def check(self, rule: Rule | None, counts: NDArray[np.int64]) -> None:
        """Refuses a split that leaves a part without rows.

        Args:
            rule: what :meth:`rule` gave.
            counts: rows of each part.
        """
        for number, part in enumerate(PARTS):
            if rule is not None and not counts[number] and self.wanted(part):
                raise UserError(f"data.split leaves no {part} rows, of {counts.sum()}: {rule.remedy(part)}")

    def parse(self, block: RawBlock, rule: Rule | None) -> ParsedBlock:
        """The block's cells."""
        return parse(self._schema, block, timed=isinstance(rule, ThresholdRule) and bool(rule.columns))

    def run(
        self,
        stage: str,
        part: Part,
        rule: Rule | None,
        work: Callable[[RawBlock, Parts], Out],
        skip: int = 0,
    ) -> Iterator[tuple[Out, Parts]]:
        """What ``work`` makes of each block and its rows' parts, done by threads, in order; and the parts.

        Args:
            stage: its name for ``progress``.
            part: whose files to read.
            rule: what :meth:`rule` gave.
            work: what to do; called again without the rows that it refuses, where bad rows are skipped.
            skip: leave out so many blocks at the beginning: they are read, and nothing is done with them.
        """
        others = rule.columns if rule is not None else ()
        columns = [*self._schema.columns(), *others]
        numbers = number_columns(self._schema) - set(others)

        def jobs() -> Iterator[tuple[RawBlock, int]]:
            row = 0
            for number, block in enumerate(self._blocks(stage, part, columns, numbers)):
                if number >= skip:
                    yield block, row
                row += block.span

        def done(job: tuple[RawBlock, int]) -> tuple[Out, Parts, Sequence[Reject]]:
            def both(block: RawBlock) -> tuple[Out, Parts]:
                given = np.full(len(block), PARTS.index(part), np.int8)
                parts = given if rule is None else rule.parts(block, job[1])
                return work(block, parts), parts

            (out, parts), good = salvage(job[0], both)
            return out, parts, good.rejects

        for out, parts, rejects in ordered_map(done, jobs(), self.workers):
            self._rejected(rejects)
            yield out, parts

    def _blocks(
        self, stage: str, part: Part, columns: list[str], numbers: Collection[str] = ()
    ) -> Iterator[RawBlock]:
        if not self.files[part]:
            return
        whole = stage in ("fit", "encode")
        reader = LogReader(self.files[part], self._data, digests=whole)
        rows = 0
        blocks = reader.blocks(list(dict.fromkeys(columns)), numbers=numbers, ids=id_columns(self._schema))
        for block in ahead(blocks, lead=self.workers):
            yield block
            rows += block.span
            self.progress(stage, rows, reader.bytes_done, reader.bytes_total)
        if whole:
            for path, size in zip(reader.files, reader.sizes, strict=True):
                self.fingerprint[str(path)] = {"bytes": size, "sha256": reader.digests[str(path)]}


def _measured(fitter: Fitter, parsed: ParsedBlock, parts: Parts) -> tuple[ParsedBlock, Any]:
    return parsed, fitter.measure(parsed, rows_of(parts, TRAIN))


def rows_of(parts: Parts, part: int) -> NDArray[np.int64] | None:
    """The numbers of a part's rows; None where they are all."""
    rows = np.flatnonzero(parts == part)
    return None if len(rows) == len(parts) else rows


def _files_of(data: DataConfig) -> dict[Part, list[Path]]:
    """The files of each part; where a rule splits the log, all are the training part's."""
    if not data.train:
        raise UserError("data.train names no file; give the log's files there")
    if isinstance(data.split, FilesSplit):
        return {"train": expand(data.train), "valid": _expanded(data.valid), "test": _expanded(data.test)}
    for name, files in (("valid", data.valid), ("test", data.test)):
        if files:
            raise UserError(
                f"data.{name} names files, but data.split is {data.split.kind!r}; set its kind to files"
            )
    return {"train": expand(data.train), "valid": [], "test": []}


def _expanded(files: tuple[str, ...]) -> list[Path]:
    return expand(files) if files else []
