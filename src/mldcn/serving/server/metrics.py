"""What a server tells Prometheus: where the time goes, and what shows drift and training-serving skew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # a supervising process, which computes nothing, does without PyTorch
    from mldcn.serving.engine import Scores

SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
SIZES = tuple(float(2**i) for i in range(15))
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 11)))
STAGES = ("decode", "encode", "queue", "look_up", "score", "answer")


class Metrics:
    """A server's counters; several servers of one process do not share them."""

    def __init__(self) -> None:
        # By model and version: the series of features, whose finding takes longer than counting.
        self._served: dict[tuple[str, str], dict[tuple[Counter, str], Counter]] = {}
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "mldcn_requests",
            "Requests answered, by HTTP status or gRPC code.",
            ("transport", "call", "status"),
            registry=r,
        )
        self.seconds = Histogram(
            "mldcn_request_seconds",
            "Seconds of a request.",
            ("transport", "call"),
            buckets=SECONDS,
            registry=r,
        )
        stages = Histogram(
            "mldcn_stage_seconds",
            "Seconds of scoring requests by stage: decode (bytes to values), encode (values to table rows), "
            "queue, look_up (rows of a bundle's tables), score, answer (probabilities to bytes).",
            ("stage",),
            buckets=SECONDS,
            registry=r,
        )
        self.stages = {stage: stages.labels(stage) for stage in STAGES}
        self.batch_rows = Histogram("mldcn_batch_rows", "Rows of a scored batch.", buckets=SIZES, registry=r)
        self.batch_requests = Histogram(
            "mldcn_batch_requests", "Requests of a scored batch.", buckets=SIZES, registry=r
        )
        self.queue_rows = Gauge("mldcn_queue_rows", "Rows that wait to be scored.", registry=r)
        self.under_way = Gauge("mldcn_requests_under_way", "Requests not answered yet.", registry=r)
        self.refused = Counter("mldcn_refused", "Requests refused, by reason.", ("reason",), registry=r)
        self.rows = Counter("mldcn_rows", "Rows scored.", ("model", "version"), registry=r)
        self.unseen = Counter(
            "mldcn_unseen_ids",
            "Ids that training did not see.",
            ("model", "version", "feature"),
            registry=r,
        )
        self.missing = Counter(
            "mldcn_missing_values", "Missing values.", ("model", "version", "feature"), registry=r
        )
        self.loads = Counter(
            "mldcn_model_loads",
            "Versions that were loaded, or failed to.",
            ("model", "result"),
            registry=r,
        )
        self.logged = Counter(
            "mldcn_logged_requests",
            "Requests taken for the request log: written, or dropped as there was no_room or writing failed.",
            ("result",),
            registry=r,
        )
        self.scores = ScoreHistogram()
        r.register(self.scores)

    def scored(self, model: str, version: str, tasks: Iterable[str], scores: Scores) -> None:
        """Counts one answer. One of a version that is served no more would bring its series back."""
        series = self._served.get((model, version))
        if series is None:
            return
        self.rows.labels(model, version).inc(len(scores))
        for counter, found in ((self.unseen, scores.unseen), (self.missing, scores.missing)):
            for feature, count in found.items():
                if (counter, feature) not in series:
                    series[counter, feature] = counter.labels(model, version, feature)
                if count:
                    series[counter, feature].inc(count)
        for place, task in enumerate(tasks):
            self.scores.add((model, version, task), scores.probabilities[:, place])

    def serve(self, model: str, version: str) -> None:
        """Begins the series of a version."""
        self._served.setdefault((model, version), {})

    def forget(self, model: str, version: str) -> None:
        """Drops the series of a version that is served no more, or they would pile up."""
        self._served.pop((model, version), None)
        for counter in (self.rows, self.unseen, self.missing):
            counter.remove_by_labels({"model": model, "version": version})
        self.scores.forget(model, version)

    def text(self) -> bytes:
        """Everything, in Prometheus' format."""
        return generate_latest(self.registry)


class RemoteRows(Collector):
    """How many rows of tables on another machine were asked for, and how many of them were in memory.

    Args:
        asked: gives ``(model, version, rows by where they came from)``.
    """

    def __init__(self, asked: Callable[[], Iterable[tuple[str, str, Mapping[str, int]]]]) -> None:
        self._asked = asked

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The series."""
        family = CounterMetricFamily(
            "mldcn_table_rows",
            "Rows of tables on another machine: found in the cache, or asked of the server.",
            labels=("model", "version", "source"),
        )
        for model, version, rows in self._asked():
            for source, count in rows.items():
                family.add_metric((model, version, source), count)
        yield family


class ScoreHistogram(Collector):
    """How probabilities are distributed; counts whole arrays at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str, str], NDArray[np.int64]] = {}
        self._sums: dict[tuple[str, str, str], float] = {}

    def add(self, labels: tuple[str, str, str], values: NDArray[np.float32]) -> None:
        """Counts probabilities of a model, version and task."""
        # A bucket's upper end belongs to it.
        counts = np.bincount(np.searchsorted(_EDGES, values), minlength=len(_EDGES))
        with self._lock:
            self._counts[labels] = self._counts.get(labels, 0) + counts
            self._sums[labels] = self._sums.get(labels, 0.0) + float(values.sum(dtype=np.float64))

    def forget(self, model: str, version: str) -> None:
        """Drops a version's series."""
        with self._lock:
            for found in (self._counts, self._sums):
                for labels in [each for each in found if each[:2] == (model, version)]:
                    del found[labels]

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """The series' name, without counts."""
        yield self._family()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The series."""
        family = self._family()
        with self._lock:
            counted: Mapping[tuple[str, str, str], NDArray[np.int64]] = dict(self._counts)
            sums = dict(self._sums)
        for labels, counts in counted.items():
            totals = np.cumsum(counts)
            ends = [*(str(share) for share in SHARES), "+Inf"]
            totals[-2] = totals[-1]  # rounding may lift a probability a little above 1
            buckets = [(end, float(total)) for end, total in zip(ends, totals, strict=True)]
            family.add_metric(labels, buckets, sums[labels])
        yield family

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(
            "mldcn_score", "Probabilities given.", labels=("model", "version", "task")
        )


_EDGES = np.array([*SHARES, np.inf], np.float32)
