"""What the best possible model reaches on a log whose true probabilities are known."""

from __future__ import annotations

import numpy as np

from mldcn.datasets.pinads.world import TASKS, Floats

BINS = 1 << 16


class BayesMeter:
    """Bayes-optimal AUC and log loss by task, summed up chunk by chunk in bounded memory.

    Two kinds of figure for each task, over the rows whose label is known:

    - ``auc``, ``logloss``: expected over the labels, given the rows,
      AUC = sum_ij p_i (1 - p_j) [p_i > p_j] / (sum_i p_i sum_j (1 - p_j)), log loss = mean entropy of p;
    - ``auc_on_labels``, ``logloss_on_labels``: what the true probabilities score on the labels that fell. A
      model evaluated on the same rows is best compared with these: both share the labels' luck.

    AUC is taken over 65,536 equal bins of the probability, ties within a bin counting one half; with the
    smooth distributions at hand this is within 1e-5 of exact.
    """

    def __init__(self) -> None:
        tasks = len(TASKS)
        # Mass of positives and negatives by bin: expected, then fallen.
        self._mass = np.zeros((2, tasks, 2, BINS))
        self._loss = np.zeros((2, tasks))
        self._rows = np.zeros(tasks, dtype=np.int64)

    def add(self, probability: Floats, labels: Floats) -> None:
        """Counts rows: probabilities ``(n, 4)`` and labels ``(n, 4)``, NaN where unknown."""
        for task in range(len(TASKS)):
            known = ~np.isnan(labels[:, task])
            p, y = probability[known, task], labels[known, task]
            at = np.minimum((p * BINS).astype(np.int64), BINS - 1)
            q = np.clip(p, 1e-15, 1 - 1e-15)
            for kind, positive in enumerate((p, y)):
                self._mass[kind, task, 0] += np.bincount(at, positive, BINS)
                self._mass[kind, task, 1] += np.bincount(at, 1 - positive, BINS)
                self._loss[kind, task] -= (positive * np.log(q) + (1 - positive) * np.log1p(-q)).sum()
            self._rows[task] += len(p)

    def result(self) -> dict[str, dict[str, float | None]]:
        """By task: rows, rate, auc, logloss, auc_on_labels, logloss_on_labels (None where undefined)."""
        told: dict[str, dict[str, float | None]] = {}
        for task, name in enumerate(TASKS):
            rows = int(self._rows[task])
            entry: dict[str, float | None] = {"rows": rows}
            entry["rate"] = float(self._mass[1, task, 0].sum() / rows) if rows else None
            for kind, suffix in enumerate(("", "_on_labels")):
                entry["auc" + suffix] = _auc(*self._mass[kind, task])
                entry["logloss" + suffix] = float(self._loss[kind, task] / rows) if rows else None
            told[name] = entry
        return told


def bayes(probability: Floats, labels: Floats) -> dict[str, dict[str, float | None]]:
    """Bayes-optimal AUC and log loss of some rows (:class:`BayesMeter` says how).

    Args:
        probability: true probabilities ``(n, 4)``.
        labels: ``(n, 4)``, NaN where null.
    """
    meter = BayesMeter()
    meter.add(probability, labels)
    return meter.result()


def _auc(positive: Floats, negative: Floats) -> float | None:
    """P(a positive's bin is above a negative's) + half of P(the same bin)."""
    below = np.cumsum(negative) - negative
    pairs = positive.sum() * negative.sum()
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs > 0 else None
