"""The metrics of a server of several processes: the sum of theirs, those of processes that have ended included.

Without these a counter would fall when a process ends, which Prometheus takes for a restart from 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# (name, documentation, type, [(series, labels, value)])
Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
_Key = tuple[str, tuple[tuple[str, str], ...]]
_GROWING = ("counter", "histogram")


def snapshot(registry: CollectorRegistry) -> list[Family]:
    """All that a process has counted, as JSON can hold it."""
    return [
        (
            family.name,
            family.documentation,
            family.type,
            [(each.name, dict(each.labels), each.value) for each in family.samples],
        )
        for family in registry.collect()
    ]


class Totals:
    """Adds up the processes' metrics."""

    def __init__(self) -> None:
        self._ended: list[Family] = []

    def end(self, last: Sequence[Family]) -> None:
        """Keeps what a process that has ended had counted."""
        growing = [family for family in last if family[2] in _GROWING]
        self._ended = [_family(metric) for metric in _added([self._ended, growing])]

    def forget(self, served: Collection[tuple[str, str]]) -> None:
        """Drops the series of models and versions that are not among those served."""
        self._ended = [_only(family, served) for family in self._ended]

    def text(self, running: Iterable[Sequence[Family]], own: Sequence[Family] = ()) -> bytes:
        """Everything, in Prometheus' format.

        Args:
            running: the snapshots of processes that work.
            own: what only the whole server has.
        """
        return generate_latest(_Found(_added([*running, self._ended, own])))


class _Found(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def _added(snapshots: Iterable[Sequence[Family]]) -> list[Metric]:
    metrics: dict[str, Metric] = {}
    values: dict[str, dict[_Key, float]] = {}
    for families in snapshots:
        for name, documentation, kind, samples in families:
            metrics.setdefault(name, Metric(name, documentation, kind))
            known = values.setdefault(name, {})
            for series, labels, value in samples:
                key = series, tuple(labels.items())
                if key not in known:
                    known[key] = value
                elif series.endswith("_created"):
                    known[key] = min(known[key], value)
                else:
                    known[key] += value
    for name, metric in metrics.items():
        # Series of one histogram must stand together, whichever process had them first.
        ordered = sorted(values[name].items(), key=lambda each: _without_bucket(each[0][1]))
        for (series, pairs), value in ordered:
            metric.add_sample(series, dict(pairs), value)
    return list(metrics.values())


def _without_bucket(pairs: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [pair for pair in pairs if pair[0] != "le"]


def _family(metric: Metric) -> Family:
    samples = [(each.name, dict(each.labels), each.value) for each in metric.samples]
    return metric.name, metric.documentation, metric.type, samples


def _only(family: Family, served: Collection[tuple[str, str]]) -> Family:
    """A family without the series of versions that are served no more."""
    name, documentation, kind, samples = family
    return (
        name,
        documentation,
        kind,
        [
            each
            for each in samples
            if "version" not in each[1] or (each[1]["model"], each[1]["version"]) in served
        ],
    )
