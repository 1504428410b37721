"""``prepare``: from a config's log to encoded training, validation and test rows on disk, in bounded memory.

One pass over the log fits the vocabularies and transforms on the training rows, and keeps what it parsed (codes
of ids and numbers, no cell's text), in a file where it is much; from that every row is then encoded. A split by
time or order takes a pass before it, over one column. All of it happens in ``<folder>.partial``, which gets its
name at the end; a preparation that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mldcn.config import Config, FilesSplit
from mldcn.data import encoder, shards, vocabulary
from mldcn.data.encoder import EncodedBlock, Encoder
from mldcn.data.fitting import Fitter, MeasuredBlock, Statistics, Store
from mldcn.data.parsing import ParsedBlock
from mldcn.data.partial import Partial, PartialRejects, read_sealed, write_sealed
from mldcn.data.passes import LogPasses, Progress, rows_of
from mldcn.data.pipeline import give_memory_back, ordered_map, short_turns
from mldcn.data.reading import RawBlock
from mldcn.data.shards import EncodedRows, ShardFiles, replace_folder
from mldcn.data.splits import LEFT_OUT, PARTS, TRAIN, Part, Parts, Rule, ThresholdRule
from mldcn.data.spool import Item, Spool, slim
from mldcn.errors import DiskFullError, UserError
from mldcn.files import checksum, drop_dead_lock, locked, sync_file, writing

FORMAT = 4
REJECTS = "rejects.csv"
# What was done is noted this often, or less often the longer it has taken so far.
CHECKPOINT_SECONDS = 30.0
_CHECKPOINT_SHARE = 0.05
# Of data.memory_mb, for counted ids: blocks in flight and the readers' buffers take the rest of the least bound.
_COUNTED_SHARE = 1 / 6
# For parsed blocks that are not written to the disk.
_SPOOL_SHARE = 1 / 16
_FILE = "prepared.json"


@dataclass(frozen=True)
class EncodedData:
    """A prepared log.

    ``fingerprint`` is plain data for the run's folder: each file's size and digest. ``reused`` says that the
    folder held these rows already. ``rejected`` rows were left out; the folder's ``rejects.csv`` names them.
    """

    train: EncodedRows
    valid: EncodedRows | None
    test: EncodedRows | None
    encoder: Encoder
    fingerprint: dict[str, Any]
    reused: bool
    rejected: int = 0


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
    data config and files (by size and time of change) gave, it is checked and used again. A preparation that was
    interrupted is continued; where another process prepares the folder, its end is waited for.

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
    key = _key(config, LogPasses(config).files)
    if base is not None:
        key["base"] = [base.checksum(), statistics]
    found = _reusable(folder, key)
    if found is not None:
        drop_dead_lock(folder)
        return found
    with locked(folder, wait=True):
        found = _reusable(folder, key)
        if found is not None:
            return found
        partial = folder.with_name(f"{folder.name}.partial")
        if read_sealed(partial / _FILE).get("key") != key:
            with writing(partial), short_turns():
                _prepare(config, Partial(partial, key), progress, base, statistics)
        Partial.clean(partial)
        replace_folder(partial, folder)
        return _open(folder, read_sealed(folder / _FILE), reused=False)


def _prepare(
    config: Config, partial: Partial, progress: Progress | None, base: Encoder | None, statistics: Statistics
) -> None:
    preparation = _Preparation(config, partial, progress, base, statistics)
    try:
        preparation.run()
    except BaseException as error:
        preparation.close()
        # What was interrupted can go on; after a mistake in the log or the config there is nothing to go on with.
        mistaken = isinstance(error, UserError) and not isinstance(error, DiskFullError)
        if mistaken or not partial.saved:
            shutil.rmtree(partial.folder, ignore_errors=True)
        raise


class _Preparation:
    """All the work on one log, noted in a :class:`Partial` as it goes on."""

    def __init__(
        self,
        config: Config,
        partial: Partial,
        progress: Progress | None,
        base: Encoder | None,
        statistics: Statistics,
    ) -> None:
        self._config = config
        self._partial = partial
        self._folder = partial.folder
        self._state = partial.state
        self._rejects = PartialRejects(self._folder / REJECTS)
        self._passes = LogPasses(config, progress, self._rejects.add)
        self._passes.fingerprint = self._state.setdefault("fingerprint", {})
        self._by_files = isinstance(config.data.split, FilesSplit)
        counted = int((config.data.memory_mb << 20) * _COUNTED_SHARE)
        store = Store(self._folder / "fit", self._folder / "encoder", counted)
        self._fitter = Fitter(config.log_schema, base=base, statistics=statistics, store=store)
        self._started = self._noted = time.monotonic()
        self._writers: dict[Part, ShardFiles] = {}
        memory = int((config.data.memory_mb << 20) * _SPOOL_SHARE)
        self._spool = Spool(partial.spool, self._state.get("spool", 0), memory)
        # Files are flushed to the disk while others are made.
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []

    def run(self) -> None:
        """Does what is left to do."""
        state = self._state
        rule = self._passes.rule(self._folder, state.get("bounds"))
        if isinstance(rule, ThresholdRule):
            state["bounds"] = list(rule.bounds)
        if not state.get("fitted"):
            self._fit(rule)
        encoder = Encoder.load(self._folder / "encoder", check=False)
        for part in PARTS:
            if self._passes.wanted(part):
                mine = state["parts"].setdefault(part, {"files": [], "block": 0, "done": False})
                self._writers[part] = ShardFiles(
                    self._folder / part, encoder.layout, mine["files"], self._flush
                )
        self._encode_spool(encoder)
        if self._by_files:
            for part in PARTS[1:]:
                self._encode_files(encoder, part)
        self._flushed()
        self.close()
        if _key(self._config, self._passes.files)["files"] != state["key"]["files"]:
            raise UserError(
                "the log's files changed while they were read; prepare them again when they are whole"
            )
        names = ["encoder/encoder.json", *(f"{part}/manifest.json" for part in self._writers)]
        facts = {
            "format": FORMAT,
            "key": state["key"],
            "parts": list(self._writers),
            "rejected": self._rejects.count,
            "fingerprint": {"files": self._passes.fingerprint},
            # These hold the checksums of all other files.
            "crc32": {name: checksum(self._folder / name) for name in names},
        }
        # From here on the folder is whole.
        write_sealed(self._folder / _FILE, facts)

    def close(self) -> None:
        """Closes what is open."""
        self._flusher.shutdown(cancel_futures=True)
        self._spool.close()
        self._rejects.close()
        for writer in self._writers.values():
            writer.close()

    def _fit(self, rule: Rule | None) -> None:
        state = self._state
        if "fitter" in state:
            self._fitter.restore(self._folder / state["fitter"], state["runs"])
            self._rejects.resume(*state["rejects"])
        else:
            state |= {"blocks": 0, "counts": [0] * (LEFT_OUT + 1), "parts": {}}
        counts = np.array(state["counts"], np.int64)

        def work(block: RawBlock, parts: Parts) -> tuple[MeasuredBlock, ParsedBlock]:
            parsed = self._passes.parse(block, rule)
            return self._fitter.measure(parsed, rows_of(parts, TRAIN)), slim(parsed)

        def note() -> None:
            state.update(counts=counts.tolist(), rejects=self._rejects.sync())

        blocks = state["blocks"]
        for (measured, parsed), parts in self._passes.run("fit", "train", rule, work, skip=blocks):
            blocks += 1
            counts += np.bincount(parts, minlength=len(counts))
            self._fitter.add(measured)
            self._spool.add(parsed, parts)
            if self._due():
                note()
                fitter = f"fit/fitter-{blocks:08}.npz"
                runs = self._fitter.save_state(self._folder / fitter)
                self._partial.vouch(fitter, *(f"fit/{run}" for run in runs))
                self._save(blocks=blocks, fitter=fitter, runs=runs)
        self._rejects.refuse_all(int(counts.sum()))
        self._passes.check(rule, counts)
        # A log that fits into memory anyway leaves it to the next step, which would have to ask for it again.
        large = self._spool.bytes > 0
        if large:
            give_memory_back()
        encoder = self._folder / "encoder"
        self._fitter.finish().save(encoder)
        self._flush(*encoder.iterdir())
        if large:
            give_memory_back()
        note()
        state["fitted"] = True
        if self._long():
            self._partial.vouch(*(f"encoder/{path.name}" for path in encoder.iterdir()))
            self._save()
        self._partial.discard_fit()

    def _encode_spool(self, encoder: Encoder) -> None:
        """Writes the rows that the fit read."""
        state = self._state
        mine = {part: state["parts"][part] for part in self._writers if part == "train" or not self._by_files}
        if all(part["done"] for part in mine.values()):
            return
        first = min(part["block"] for part in mine.values())
        items = islice(self._spool.blocks(), first, None)
        blocks = ordered_map(lambda item: _assembled(encoder, item, mine), items, self._passes.workers)
        rows, size = 0, sum(file["bytes"] for file in self._passes.fingerprint.values())
        for number, (count, blocks_of) in enumerate(blocks, first):
            rows += count
            self._write(number, blocks_of)
            self._passes.progress("encode", rows, rows * size // sum(state["counts"]), size)
        for part in mine:
            self._finish(part)

    def _encode_files(self, encoder: Encoder, part: Part) -> None:
        """Writes the rows of a part that has files of its own, and was not read yet."""
        if part not in self._writers or self._state["parts"][part]["done"]:
            return
        mine = self._state["parts"][part]
        self._rejects.resume(*mine.get("rejects", self._state["rejects"]))

        def work(block: RawBlock, parts: Parts) -> EncodedBlock:
            return encoder.assemble(self._passes.parse(block, None))

        first = mine["block"]
        for number, (block, _) in enumerate(self._passes.run("encode", part, None, work, skip=first), first):
            self._write(number, {part: block})
        self._state["rejects"] = self._rejects.sync()
        self._finish(part)

    def _write(self, number: int, blocks: dict[Part, EncodedBlock]) -> None:
        """Writes what a block of the log gave for each part, unless that was written before."""
        for part, block in blocks.items():
            mine = self._state["parts"][part]
            if number >= mine["block"] and self._writers[part].write(block):
                mine.update(files=self._writers[part].files.copy(), block=number + 1)
                if self._by_files and part != "train":
                    mine["rejects"] = self._rejects.sync()
        if all(flush.done() for flush in self._flushes):
            self._flush(*(writer.path for writer in self._writers.values() if writer.path is not None))
        if self._due():
            self._save()

    def _finish(self, part: Part) -> None:
        self._writers[part].finish()
        self._state["parts"][part].update(files=self._writers[part].files.copy(), done=True)
        if self._long():
            self._save()

    def _flush(self, *paths: Path) -> None:
        """Flushes files to the disk, some time before :meth:`_flushed` is over."""
        self._flushes += [self._flusher.submit(sync_file, path) for path in paths]

    def _flushed(self) -> None:
        for flush in self._flushes:
            flush.result()
        self._flushes = []

    def _save(self, **state: Any) -> None:
        self._spool.sync()
        self._flushed()
        self._state["spool"] = self._spool.bytes
        for part, facts in self._state["parts"].items():
            self._state["crc32"] |= {f"{part}/{file['name']}": file["crc32"] for file in facts["files"]}
        self._partial.save(**state)
        self._noted = time.monotonic()

    def _due(self) -> bool:
        """Whether it is time to note what was done."""
        now = time.monotonic()
        return now - self._noted >= max(CHECKPOINT_SECONDS, _CHECKPOINT_SHARE * (now - self._started))

    def _long(self) -> bool:
        """Whether the work has taken so long that it would be a pity to lose it."""
        return self._partial.saved or time.monotonic() - self._started >= CHECKPOINT_SECONDS


def _assembled(encoder: Encoder, item: Item, parts: Iterable[Part]) -> tuple[int, dict[Part, EncodedBlock]]:
    """A block's rows, encoded, by part."""
    parsed, part_of = item
    whole = encoder.assemble(parsed)
    if len(set(parts)) == 1 and not part_of.any():
        return parsed.rows, {"train": whole}
    rows = {part: rows_of(part_of, PARTS.index(part)) for part in parts}
    return parsed.rows, {part: whole if of is None else whole.select(of) for part, of in rows.items()}


def _reusable(folder: Path, key: dict[str, Any]) -> EncodedData | None:
    """What the folder holds, if that is what was asked for and undamaged.

    Raises:
        UserError: it holds something else than a preparation.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / _FILE).is_file():
        raise UserError(f"{folder}: holds something else than encoded rows; name another folder")
    found = read_sealed(folder / _FILE)
    # Damaged rows are encoded again, not mourned.
    with contextlib.suppress(UserError, OSError):
        if found.get("key") == key:
            return _open(folder, found, reused=True)
    return None


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
        encoder=Encoder.load(folder / "encoder", check=reused),
        fingerprint=found["fingerprint"],
        reused=reused,
        rejected=found["rejected"],
    )
