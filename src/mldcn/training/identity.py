"""What of a config makes a run the run that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mldcn import interactions
from mldcn.config import Config
from mldcn.errors import UserError
from mldcn.metrics import metric_info

# What a resumed run may do otherwise: none of it is part of what is trained.
_FREE = {
    "data": {"encoded", "memory_mb"},
    "training": {"threads", "device", "checkpoint_minutes", "keep_checkpoints", "tensorboard", "mlflow"},
}


def what_counts(config: Config) -> dict[str, Any]:
    """The config as plain data, without what may change when a run is resumed."""
    raw: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude=_FREE)
    return raw


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which keys two of :func:`what_counts` differ, in words."""
    before, after = _flat(then), _flat(now)
    return [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def check_same(then: dict[str, Any], now: Config, file: Path) -> None:
    """Refuses to go on with a run under another config.

    Args:
        then: :func:`what_counts` of the config that it began with, :func:`spelled_out`.
        now: the config as it is.
        file: where that lies.

    Raises:
        UserError: the two differ, or the interaction has no such options.
    """
    try:
        changed = changes(then, what_counts(spelled_out(now)))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if changed:
        raise UserError(
            f"{file}: the config is not the one that this run began with: {'; '.join(changed)}. Set it back, or "
            "train anew"
        )


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings as dotted keys."""
    if isinstance(tree, dict):
        inside = [(f"{name}.{key}" if name else key, value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(each, dict) for each in tree):
        inside = [(f"{name}[{number}]", value) for number, value in enumerate(tree)]
    else:
        return {name: tree}
    return {key: leaf for below, value in inside for key, leaf in _flat(value, below).items()}


def spelled_out(config: Config) -> Config:
    """The config with every option of its interaction, so that a run outlives a change of defaults."""
    interaction = interactions.parse(config.model.interaction).model_dump(mode="json")
    return config.model_copy(update={"model": config.model.model_copy(update={"interaction": interaction})})


def monitored(config: Config) -> tuple[str, str]:
    """The task and metric that ``training.monitor`` names: ``auc`` is the first task's, or ``task/metric``.

    Raises:
        UserError: there is no such task or metric, or the schema and config do not have it measured.
    """
    schema, tasks = config.log_schema, config.log_schema.tasks
    task, slash, metric = config.training.monitor.rpartition("/")
    task = task if slash else tasks[0]
    if task not in tasks:
        raise UserError(f"training.monitor: no task {task!r}; the tasks are {', '.join(tasks)}")
    if metric_info(metric).higher_is_better is None:
        raise UserError(
            f"training.monitor: {metric!r} is best at 1, neither high nor low; use logloss or ece"
        )
    by_group, at, k = metric.partition("@")
    if by_group == "gauc" and not (schema.user or schema.request):
        raise UserError("training.monitor: gauc ranks within a user; name the column in schema.user")
    if at and not schema.request:
        raise UserError(
            f"training.monitor: {metric} ranks within a request; name the column in schema.request"
        )
    if at and int(k) not in config.evaluation.hit_at:
        raise UserError(f"training.monitor: {metric} is not measured; add {k} to evaluation.hit_at")
    return task, metric
