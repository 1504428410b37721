"""Tuning by Optuna: what to try next, and when to stop a trial.

Nothing is kept but the rows of finished trials: each proposal is drawn from them anew, with a seed of its own, so
that a study that was killed tries what it would have tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mldcn.errors import UserError
from mldcn.study.recipe import Range, Space
from mldcn.study.rows import RunRow
from mldcn.training.history import evaluations
from mldcn.training.observers import Metrics, Observer

STARTUP = 4  # trials drawn at random, and never stopped, before there is something to learn from
WARM_UP = 1  # evaluations that no trial is stopped at


class Pruned(Exception):
    """The trial was stopped: it stayed below the median of those before it."""


def propose(space: Space, done: Sequence[RunRow], seed: int, *, higher: bool) -> dict[str, Any]:
    """Settings to try, drawn by TPE from what was tried.

    Args:
        space: config key -> choices or a range.
        done: the rows of the rival's trials.
        seed: of this draw.
        higher: whether more of the monitored metric is better.
    """
    study = _study(space, done, seed, higher=higher)
    drawn = study.ask(_distributions(space)).params
    return {key: _choice(space[key], drawn[key]) for key in space}


def inside(space: Space, settings: Mapping[str, Any]) -> bool:
    """Whether settings are some that the space holds."""
    return set(settings) == set(space) and all(_holds(space[key], settings[key]) for key in space)


class Pruning(Observer):
    """Stops a trial by the median rule.

    Args:
        monitor: the (task, metric) that is looked at.
        space: config key -> choices or a range.
        done: the rows of the rival's trials before this one.
        history: the run's, for the evaluations before it was interrupted.
        higher: whether more of the metric is better.
    """

    def __init__(
        self, monitor: tuple[str, str], space: Space, done: Sequence[RunRow], history: Path, *, higher: bool
    ) -> None:
        self.task, self.metric = monitor
        self.history = history
        # Only its values count for the median rule, not where they were had.
        self.trial: Any = _study(space, done, 0, higher=higher).ask()
        self.count = 0

    def started(self, title: str, total_steps: int, step: int) -> None:
        """Takes up the evaluations that an interrupted trial had."""
        for at, metrics in evaluations(self.history):
            if at <= step:
                self._report(metrics)

    def evaluated(self, step: int, metrics: Metrics, *, best: bool) -> None:
        """Judges the trial.

        Raises:
            Pruned: it is stopped.
        """
        self._report(metrics)
        if self.trial.should_prune():
            raise Pruned

    def _report(self, metrics: Metrics) -> None:
        self.count += 1
        self.trial.report(metrics[self.task][self.metric], self.count)


def _study(space: Space, done: Sequence[RunRow], seed: int, *, higher: bool) -> Any:
    """An Optuna study that knows the trials so far."""
    optuna = _optuna()
    study = optuna.create_study(
        direction="maximize" if higher else "minimize",
        sampler=optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=WARM_UP + 1),
    )
    distributions = _distributions(space)
    for row in done:
        # The config as it stands may hold a value that the space does not: it teaches the pruner alone.
        known = inside(space, row.settings)
        study.add_trial(
            optuna.trial.create_trial(
                state=_state(row),
                value=row.best(higher=higher) if _state(row).name == "COMPLETE" else None,
                params={key: _index(space[key], row.settings[key]) for key in space} if known else {},
                distributions=distributions if known else {},
                intermediate_values={i: value for i, (_, value) in enumerate(row.curve, 1)},
            )
        )
    return study


def _state(row: RunRow) -> Any:
    states = _optuna().trial.TrialState
    if row.diverged or not row.curve or all(value != value for _, value in row.curve):
        return states.FAIL
    return states.PRUNED if row.pruned else states.COMPLETE


def _distributions(space: Space) -> dict[str, Any]:
    """Choices are drawn by their place, since Optuna wants plain values and a config holds lists too."""
    distributions = _optuna().distributions
    found: dict[str, Any] = {}
    for key, spec in space.items():
        if not isinstance(spec, Range):
            found[key] = distributions.CategoricalDistribution(range(len(spec)))
        elif spec.integer:
            found[key] = distributions.IntDistribution(int(spec.low), int(spec.high), log=spec.log)
        else:
            found[key] = distributions.FloatDistribution(spec.low, spec.high, log=spec.log)
    return found


def _choice(spec: tuple[Any, ...] | Range, drawn: Any) -> Any:
    return drawn if isinstance(spec, Range) else spec[drawn]


def _index(spec: tuple[Any, ...] | Range, value: Any) -> Any:
    return value if isinstance(spec, Range) else spec.index(value)


def _holds(spec: tuple[Any, ...] | Range, value: Any) -> bool:
    if not isinstance(spec, Range):
        return value in spec
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = not spec.integer or isinstance(value, int)
    return number and whole and spec.low <= value <= spec.high


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("tuning in a recipe needs the extra: pip install 'mldcn[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
