"""What rounding a model's tables or cutting its ranks costs: the AUC on a labelled log, against the run's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mldcn.data.rejects import RejectsFile
from mldcn.data.shards import EncodedRows
from mldcn.errors import UserError
from mldcn.files import scratch
from mldcn.metrics import Difference, delong
from mldcn.predict import Predictor, calibrated, encode_log
from mldcn.serving.engine import Program, eager

# Differences by task; a is the run, b the program.
AucChange = dict[str, Difference]


class Validation:
    """A labelled log, encoded, and scored by a run: programs are compared with it.

    What differs is measured as ``mldcn evaluate`` measures the run: at the positions that the log has, calibrated,
    by DeLong's test of rows taken as independent. Encoded rows lie on the disk; 8 bytes a row and task in memory.

    Args:
        predictor: the run, whose model is not needed any more afterwards.
        rows: the log.
        name: of the log, for messages.

    Raises:
        UserError: no task has labels of both classes.
    """

    def __init__(self, predictor: Predictor, rows: EncodedRows, name: str) -> None:
        self._rows = rows
        self._tasks = predictor.tasks
        self._calibrators = predictor.calibrators
        self._size = predictor.config.training.eval_batch_size
        self._weighted = predictor.config.log_schema.weight is not None
        bias = predictor.model.position_bias
        self._bias = None if bias is None else bias.weight.detach().float().cpu().clone()
        self._at_top = None if bias is None else predictor.model.position_logit(None).detach().float().cpu()
        self._labels = self._column("labels")
        self._weights = self._column("weight") if self._weighted else None
        # With one class only nothing is ranked.
        self._judged = [
            task
            for i, task in enumerate(self._tasks)
            if len(np.unique(self._labels[:, i][~np.isnan(self._labels[:, i])])) > 1
        ]
        if not self._judged:
            raise UserError(
                f"{name}: no task has positive and negative labels there; name another --validation"
            )
        self._own = self._scores(eager(predictor.model, predictor.device))

    def __len__(self) -> int:
        return len(self._rows)

    def auc_change(self, program: Program) -> AucChange:
        """How the AUC of a program differs from the run's, by task; tasks without both classes are left out.

        Args:
            program: from encoded rows to logits at the serving position.

        Raises:
            UserError: it gives something that is no number.
        """
        scores = self._scores(program)
        if not np.isfinite(scores).all():
            raise UserError("the exported program gives scores that are no numbers on the validation log")
        at = [(task, self._tasks.index(task)) for task in self._judged]
        return {
            task: delong(self._labels[:, i], self._own[:, i], scores[:, i], self._weights) for task, i in at
        }

    def _scores(self, program: Program) -> NDArray[np.float32]:
        parts = []
        for batch in self._rows.batches(self._size):
            logits = torch.from_numpy(program(batch.ids.numpy(), batch.dense.numpy()))
            if self._bias is not None and self._at_top is not None:
                logits = logits + (self._bias[batch.position.long()] - self._at_top)
            parts.append(torch.sigmoid(logits).numpy())
        return calibrated(np.concatenate(parts), self._tasks, self._calibrators)

    def _column(self, name: str) -> NDArray[np.float32]:
        return np.concatenate([piece[name] for piece in self._rows.pieces((name,), self._size)])


@contextlib.contextmanager
def validation(predictor: Predictor, files: Sequence[str | Path]) -> Iterator[Validation]:
    """A :class:`Validation` on a log; the encoded rows are removed when the block ends.

    Raises:
        UserError: the log cannot be read, has no rows, or no task has labels of both classes.
    """
    with scratch("validation") as folder:
        rows = encode_log(predictor, files, folder / "encoded", None, RejectsFile(None))
        if not len(rows):
            raise UserError(f"{files[0]}: has no rows to validate on")
        yield Validation(predictor, rows, str(files[0]))


def described(change: AucChange) -> Iterator[str]:
    """A line for each task, as the command prints it."""
    for task, d in change.items():
        interval = f"95 % interval {d.low:+.6f} to {d.high:+.6f}" if d.low == d.low else "no interval"
        yield f"{task} AUC: {d.b:.6f}, the run's {d.a:.6f}: {d.delta:+.6f} ({interval})"
