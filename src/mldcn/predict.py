"""From a finished run and raw rows to probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mldcn.config import Config, load_config
from mldcn.data.encoder import EncodedBlock, Encoder
from mldcn.data.parsing import salvage
from mldcn.data.pipeline import ahead
from mldcn.data.reading import RawBlock, open_log, table_blocks
from mldcn.data.rejects import Reject, RejectsFile
from mldcn.data.shards import EncodedRows, ShardWriter
from mldcn.errors import UserError
from mldcn.files import atomic
from mldcn.metrics import Isotonic, Platt, calibrator_from_json
from mldcn.model import Ranker, load_weights, pick_device
from mldcn.run import RunFolder

PROBABILITY = "p_"  # prefix of the columns that a prediction adds


class Predictor:
    """A trained model with its preprocessing.

    Args:
        run: a finished run.
        device: where to compute; ``auto`` is a GPU where there is one.

    Raises:
        UserError: the run is unfinished, damaged or of another version.
    """

    def __init__(self, run: RunFolder, device: str = "auto") -> None:
        self.run = run
        self.config: Config = load_config(run.config)
        self.encoder = Encoder.load(run.encoder)
        self.device = pick_device(device)
        self.model = Ranker(self.config.model, self.config.log_schema, self.encoder.layout)
        load_weights(self.model, run.weights)
        self.model.to(self.device).eval()
        self.calibrators: dict[str, Platt | Isotonic] = {}
        if self.config.evaluation.calibration != "none":
            saved = run.read_json("calibrators.json")
            self.calibrators = {task: calibrator_from_json(raw) for task, raw in saved.items()}

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Predictor:
        """Opens a run's folder and checks it."""
        return cls(RunFolder.open(path), device)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.model.tasks

    def predict_table(self, table: pa.Table) -> NDArray[np.float32]:
        """Probabilities ``(n, T)`` of the rows of a table, as served.

        The position is the serving position; the run's calibrators are applied, then sampled negatives are
        corrected for. Only the features' columns are read.
        """
        blocks = table_blocks(table, self.config.data.block_rows)
        parts = [self.predict_block(block) for block in blocks]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.tasks)), np.float32)

    def predict_block(self, block: RawBlock) -> NDArray[np.float32]:
        """Probabilities ``(n, T)`` of one block of raw rows."""
        return self.predict_encoded(self.encoder.encode(block, labels=False))

    @torch.no_grad()
    def predict_encoded(self, block: EncodedBlock) -> NDArray[np.float32]:
        """Probabilities ``(n, T)`` of encoded rows."""
        parts = []
        size = self.config.training.eval_batch_size
        for start in range(0, len(block.ids), size):
            ids = torch.from_numpy(block.ids[start : start + size]).to(self.device)
            dense = torch.from_numpy(block.dense[start : start + size]).to(self.device)
            logits = self.model.relevance(ids, dense)
            if self.model.position_bias is not None:
                logits = logits + self.model.position_logit(None)
            parts.append(torch.sigmoid(logits.float()).cpu().numpy())
        scores = np.concatenate(parts) if parts else np.zeros((0, len(self.tasks)), np.float32)
        # The calibrators were fitted on the log as it is, so they come before its sampling is undone.
        scores = calibrated(scores, self.tasks, self.calibrators)
        rates = [label.negative_sampling_rate for label in self.config.log_schema.labels]
        return unsampled(scores, rates)


def calibrated(
    scores: NDArray[np.float32], tasks: Sequence[str], calibrators: dict[str, Platt | Isotonic]
) -> NDArray[np.float32]:
    """The scores ``(n, T)``, each task's through its calibrator where there is one."""
    if not calibrators:
        return scores
    columns = [
        calibrators[task].transform(scores[:, i]) if task in calibrators else scores[:, i]
        for i, task in enumerate(tasks)
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def unsampled(scores: NDArray[np.float32], rates: Sequence[float]) -> NDArray[np.float32]:
    """Probabilities before a log dropped negatives: ``p / (p + (1 - p) / w)`` (He et al. 2014, Section 6.3).

    Args:
        scores: ``(n, T)`` probabilities among the rows that the log kept.
        rates: for each task the share w of its negatives that the log kept.
    """
    if all(rate == 1.0 for rate in rates):
        return scores
    kept = np.asarray(rates, dtype=np.float32)
    return (scores / (scores + (1.0 - scores) / kept)).astype(np.float32, copy=False)


def encode_log(
    predictor: Predictor,
    files: Sequence[str | Path],
    folder: Path,
    encoding: Callable[[str, int, int, int], None] | None,
    rejects: RejectsFile,
) -> EncodedRows:
    """Another log's rows with their labels, encoded as a run's are, in a folder.

    Args:
        predictor: of the run.
        files: the log.
        folder: to be made.
        encoding: told of the progress.
        rejects: given the bad rows, where the run's config says ``data.on_error: skip``.

    Raises:
        UserError: the log cannot be read, or all its rows are bad.
    """
    config = predictor.config
    done = 0
    with ShardWriter(folder, predictor.encoder.layout) as writer:
        for raw in open_log(files, config.data, config.log_schema.columns()):
            encoded, good = salvage(raw, predictor.encoder.encode)
            rejects.add(good.rejects)
            writer.write(encoded)
            done += len(encoded)
            if encoding is not None:
                encoding("encode", done, 0, 0)
    rejects.refuse_all(done)
    return EncodedRows(folder)


@dataclass(frozen=True)
class Scored:
    """What :func:`predict_file` wrote: rows with scores, bad rows left out, the first of these, their file."""

    rows: int
    rejected: int
    first: Reject | None
    rejects: Path | None


def predict_file(
    predictor: Predictor,
    files: Sequence[str | Path],
    target: Path,
    keep: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """Scores a raw log row by row, in its order, and writes ``keep`` columns and one ``p_<task>`` a task.

    Where the run's config says ``data.on_error: skip``, bad rows are left out and written to a file beside the
    target, ``<name>.rejects.csv``.

    Args:
        predictor: the model.
        files: the log; only the features' columns need be there.
        target: ``.csv`` or ``.parquet``; written atomically.
        keep: columns of the log to copy, an id of the row for example.
        progress: told the rows done so far.

    Returns:
        How many rows were scored and left out.

    Raises:
        UserError: a row cannot be read, every row is bad, or the target's extension is another.
    """
    columns = list(dict.fromkeys([*predictor.config.log_schema.feature_columns(), *keep]))
    done = 0
    beside = target.with_name(f"{target.stem}.rejects.csv")

    def encode(block: RawBlock) -> EncodedBlock:
        return predictor.encoder.encode(block, labels=False)

    def scored(rejects: RejectsFile) -> Iterator[pa.Table]:
        nonlocal done
        # The next block is read and encoded while this one is scored.
        raw_blocks = open_log(files, predictor.config.data, columns)
        for rows, block in ahead((salvage(raw, encode) for raw in raw_blocks), lead=1):
            rejects.add(block.rejects)
            if not len(block):
                continue
            scores = predictor.predict_encoded(rows)
            kept = {name: block.table[name] for name in keep}
            named = {f"{PROBABILITY}{task}": scores[:, i] for i, task in enumerate(predictor.tasks)}
            yield pa.table({**kept, **named})
            done += len(scores)
            if progress is not None:
                progress(done)

        rejects.refuse_all(done)

    with atomic(target) as temporary, RejectsFile(beside) as rejects:
        _write_tables(scored(rejects), temporary, target.suffix)
    return Scored(done, rejects.count, rejects.first, beside if rejects.count else None)


def _write_tables(tables: Iterable[pa.Table], path: Path, suffix: str) -> None:
    from pyarrow import csv, parquet

    kinds = {".csv": csv.CSVWriter, ".parquet": parquet.ParquetWriter}
    if suffix not in kinds:
        raise UserError(f"--out: unknown extension {suffix!r}; use .csv or .parquet")
    writer = schema = None
    try:
        for table in tables:
            nested = [field.name for field in table.schema if pa.types.is_nested(field.type)]
            if suffix == ".csv" and nested:
                raise UserError(
                    f"--keep {nested[0]}: holds lists, which CSV cannot hold; write a .parquet file"
                )
            if writer is None:
                schema = table.schema
                writer = kinds[suffix](str(path), schema)
            writer.write_table(_of_schema(table, schema))
    finally:
        if writer is not None:
            writer.close()


def _of_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of a later file in the types of the first one's."""
    if table.schema.equals(schema):
        return table
    for name in table.column_names:
        kind, there = schema.field(name).type, table.schema.field(name).type
        try:
            table = table.set_column(
                table.column_names.index(name), schema.field(name), table[name].cast(kind)
            )
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise UserError(
                f"--keep {name}: holds {there} in one file of the log and {kind} in those before; score them apart"
            ) from None
    return table
