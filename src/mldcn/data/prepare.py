"""``prepare``: from a config's log to encoded training, validation and test rows on disk, in bounded memory.

One pass over the log fits the vocabularies and transforms on the training rows, and keeps what it parsed (keys
of ids and numbers, no text; some 8 bytes a cell) in a temporary file, from which every row is then encoded.
A split by time or order takes a pass before it, over one column.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mldcn.config import ColumnSplit, Config, DataConfig, FilesSplit, HashSplit, OrderSplit
from mldcn.data import encoder, shards, vocabulary
from mldcn.data.encoder import EncodedBlock, Encoder, Fitter, Statistics
from mldcn.data.parsing import ParsedBlock, parse
from mldcn.data.pipeline import Spool, ahead, ordered_map
from mldcn.data.reading import LogReader, RawBlock, expand
from mldcn.data.shards import EncodedRows, ShardWriter, replace_folder
from mldcn.data.splits import (
    LEFT_OUT,
    PARTS,
    TRAIN,
    ColumnRule,
    HashRule,
    Part,
    Parts,
    Rule,
    TimesOnDisk,
    order_rule,
    row_times,
)
from mldcn.errors import UserError
from mldcn.run import checksum, write_text

FORMAT = 1
_FILE = "prepared.json"

# What is being done, rows done, bytes of the log done and in all.
Progress = Callable[[str, int, int, int], None]
Watch = Callable[[ParsedBlock, Parts], None]
Out = TypeVar("Out")


@dataclass(frozen=True)
class EncodedData:
    """A prepared log.

    ``fingerprint`` is plain data for the run's folder: each file's size and digest. ``reused`` says that the
    folder held these rows already.
    """

    train: EncodedRows
    valid: EncodedRows | None
    test: EncodedRows | None
    encoder: Encoder
    fingerprint: dict[str, Any]
    reused: bool


def prepare(
    config: Config,
    folder: str | Path,
    progress: Progress | None = None,
    *,
    base: Encoder | None = None,
    statistics: Statistics = "keep",
) -> EncodedData:
    """Encodes the log that a config names.

    Vocabularies and transforms are fitted on training rows alone. When the folder holds what the same schema,
    data config and files (by size and time of change) gave, it is checked and used again.

    Args:
        config: its ``data`` and ``schema`` parts are read.
        folder: where the encoded rows go.
        progress: called after each block with (stage, rows done, bytes done, bytes in all).
        base: an encoder of the same features whose vocabularies grow: its ids keep their rows, new ones follow.
        statistics: ``keep`` the base's transforms and boundaries, or ``refresh`` them from this log.

    Raises:
        UserError: the log cannot be read or is not what the schema says, a split comes out empty, or the folder
            holds something else.
    """
    folder = Path(folder)
    passes = LogPasses(config, progress)
    key = _key(config, passes.files)
    if base is not None:
        key["base"] = [base.checksum(), statistics]
    fitter = Fitter(config.log_schema, base=base, statistics=statistics)
    if folder.exists() and any(folder.iterdir()):
        found = _prepared(folder)
        # Damaged rows are encoded again, not mourned.
        with contextlib.suppress(UserError, OSError):
            if found.get("key") == key:
                return _open(folder, found, reused=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        passes.write(temporary, fitter)
        if _key(config, passes.files)["files"] != key["files"]:
            raise UserError(
                "the log's files changed while they were read; prepare them again when they are whole"
            )
        parts = [part for part in PARTS if (temporary / part).is_dir()]
        found = {
            "format": FORMAT,
            "key": key,
            "parts": parts,
            "fingerprint": {"files": passes.fingerprint},
            # These hold the checksums of all other files.
            "crc32": {str(p.relative_to(temporary)): checksum(p) for p in sorted(temporary.rglob("*.json"))},
        }
        found["seal"] = _seal(found)
        write_text(temporary / _FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _open(folder, found, reused=False)


class LogPasses:
    """The passes over one log.

    Args:
        config: its ``data`` and ``schema`` parts are read.
        progress: called after each block.

    Raises:
        UserError: a file is missing.
    """

    def __init__(self, config: Config, progress: Progress | None = None) -> None:
        self._schema = config.log_schema
        self._data = config.data
        self.files = _files_of(config.data)
        self._progress = progress or (lambda *_: None)
        self.fingerprint: dict[str, Any] = {}

    def wanted(self, part: Part) -> bool:
        """Whether the split gives a part any rows; a share of 0 leaves it out."""
        split = self._data.split
        if isinstance(split, FilesSplit):
            return bool(self.files[part])
        return part == "train" or isinstance(split, ColumnSplit) or getattr(split, part) > 0

    def write(self, folder: Path, fitter: Fitter) -> None:
        """Fits, encodes and writes: the encoder, and a folder of rows a part."""
        rule = self.rule(folder)
        with ExitStack() as stack:
            spool = stack.enter_context(Spool(folder))
            fitted = self.fit(rule, fitter, spool.add)
            fitted.save(folder / "encoder")
            writers = {
                number: stack.enter_context(ShardWriter(folder / part, fitted.layout))
                for number, part in enumerate(PARTS)
                if self.wanted(part)
            }
            for block, parts in self._encoded(fitted, rule, spool):
                for number, writer in writers.items():
                    rows = parts == number
                    writer.write(block if rows.all() else block.select(rows))

    def _encoded(
        self, fitted: Encoder, rule: Rule | None, spool: Spool
    ) -> Iterator[tuple[EncodedBlock, Parts]]:
        """Every row of the log, encoded: those that the fit read from the spool, others from their files."""
        rows = 0
        for block, parts in ordered_map(lambda job: (fitted.assemble(job[0]), job[1]), spool):
            yield block, parts
            rows += len(block)
            self._progress("encode", rows, rows * spool.bytes // spool.rows, spool.bytes)
        for part in PARTS[1:]:
            yield from self.run("encode", part, rule, lambda raw: fitted.assemble(self._parse(raw)))

    def rule(self, folder: Path) -> Rule | None:
        """What says which part a row belongs to; None where each part has files of its own.

        Args:
            folder: for a temporary file of times.
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
        if isinstance(split, OrderSplit):
            column = self._schema.labels[0].log_column
            rows = sum(len(block) for block in self._blocks("count rows", "train", [column]))
            return order_rule(split, rows)
        if self._schema.time is None:
            raise UserError("data.split goes by time, but schema.time names no column; name it")
        times = TimesOnDisk(folder)
        try:
            for block in self._blocks("find times", "train", [self._schema.time]):
                times.add(row_times(block, self._schema.time))
            return times.rule(split, self._schema.time)
        finally:
            times.close()

    def fit(self, rule: Rule | None, fitter: Fitter | None = None, watch: Watch | None = None) -> Encoder:
        """Fits on the training rows.

        Args:
            rule: what :meth:`rule` gave.
            fitter: what to fit; a new one by default.
            watch: shown every block that is read, and the part of each of its rows.
        """
        fitter = fitter or Fitter(self._schema)
        counts = np.zeros(LEFT_OUT + 1, np.int64)
        for parsed, parts in self.run("fit", "train", rule, self._parse):
            counts += np.bincount(parts, minlength=len(counts))
            train = parts == TRAIN
            fitter.update(parsed, None if train.all() else np.flatnonzero(train))
            if watch is not None:
                watch(parsed, parts)
        for number, part in enumerate(PARTS):
            if rule is not None and not counts[number] and self.wanted(part):
                raise UserError(f"data.split leaves no {part} rows, of {counts.sum()}: {rule.remedy(part)}")
        return fitter.finish()

    def _parse(self, block: RawBlock) -> ParsedBlock:
        return parse(self._schema, block)

    def run(
        self, stage: str, part: Part, rule: Rule | None, work: Callable[[RawBlock], Out]
    ) -> Iterator[tuple[Out, Parts]]:
        """What ``work`` makes of each block, done by threads, in order; and the part of each of its rows."""
        columns = [*self._schema.columns(), *(rule.columns if rule is not None else ())]

        def jobs() -> Iterator[tuple[RawBlock, Parts]]:
            row = 0
            for block in self._blocks(stage, part, columns):
                given = np.full(len(block), PARTS.index(part), np.int8)
                yield block, given if rule is None else rule.parts(block, row)
                row += len(block)

        return ordered_map(lambda job: (work(job[0]), job[1]), jobs())

    def _blocks(self, stage: str, part: Part, columns: list[str]) -> Iterator[RawBlock]:
        if not self.files[part]:
            return
        whole = stage in ("fit", "encode")
        reader = LogReader(self.files[part], self._data, digests=whole)
        rows = 0
        for block in ahead(reader.blocks(list(dict.fromkeys(columns)))):
            yield block
            rows += len(block)
            self._progress(stage, rows, reader.bytes_done, reader.bytes_total)
        if whole:
            for path, size in zip(reader.files, reader.sizes, strict=True):
                self.fingerprint[str(path)] = {"bytes": size, "blake2b": reader.digests[str(path)]}


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


def _key(config: Config, files: dict[Part, list[Path]]) -> dict[str, Any]:
    """What the encoded rows depend on, as plain data."""
    states = {}
    for part, paths in files.items():
        facts = [(path, path.stat()) for path in paths]
        states[part] = [[str(path.resolve()), fact.st_size, fact.st_mtime_ns] for path, fact in facts]
    return {
        "formats": [FORMAT, encoder.FORMAT, shards.FORMAT, vocabulary.FORMAT],
        "schema": config.log_schema.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json", exclude={"encoded", "memory_mb"}),
        "files": states,
    }


def _prepared(folder: Path) -> dict[str, Any]:
    """What an earlier preparation noted in the folder.

    Raises:
        UserError: the folder is no preparation's.
    """
    path = folder / _FILE
    if not path.is_file():
        raise UserError(f"{folder}: holds something else than encoded rows; name another folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.pop("seal", None) == _seal(found) else {}


def _seal(found: dict[str, Any]) -> str:
    """A checksum of what was noted."""
    return f"{zlib.crc32(json.dumps(found, sort_keys=True).encode()):08x}"


def _open(folder: Path, found: dict[str, Any], *, reused: bool) -> EncodedData:
    if reused:
        for name, expected in found["crc32"].items():
            if checksum(folder / name) != expected:
                raise UserError(f"{folder / name}: damaged (its checksum is another)")
    rows = {part: EncodedRows(folder / part) for part in found["parts"]}
    if reused:
        for part in rows.values():
            part.verify()
    return EncodedData(
        train=rows["train"],
        valid=rows.get("valid"),
        test=rows.get("test"),
        encoder=encoder.Encoder.load(folder / "encoder"),
        fingerprint=found["fingerprint"],
        reused=reused,
    )
