"""States of an unfinished run on disk: atomic, checksummed in all their parts, the last few kept, no pickle.

A state is a folder ``step-N``: ``state.json`` (plain data), ``state.safetensors`` (tensors) and
``checksums.json``. It gets its name when all of it is on the disk. Those written at steps that the config alone
fixes are anchors: training is rolled back to them and never to one that was written because some minutes had
passed or a signal had come, or the weights would depend on the time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mldcn.files import checksum, sync_folder, write_text
from mldcn.model import save_tensors

TENSOR = "$tensor"
_BETWEEN = "-between"  # ends the name of a state that is no anchor
_PLAIN, _TENSORS, _SUMS = "state.json", "state.safetensors", "checksums.json"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True)
class Loaded:
    """A state, and the names of newer ones that were passed over because they are damaged."""

    state: dict[str, Any]
    damaged: list[str] = field(default_factory=list)


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], *, keep: int, anchor: bool = True
) -> None:
    """Writes nested plain data and tensors as ``step-N``; others are removed.

    Args:
        folder: where all states of a run are.
        step: the step after which it is taken.
        state: plain data, tensors, and lists and mappings of them.
        keep: the newest so many stay; the newest anchor stays too.
        anchor: whether the config alone fixes this step.
    """
    tensors: dict[str, Tensor] = {}
    plain = _flatten(dict(state), tensors, "")
    target = folder / f"step-{step:012d}{'' if anchor else _BETWEEN}"
    temporary = folder / f".{target.name}"
    for left in folder.glob(".step-*"):  # of a killed process: the run is locked
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(tensors, temporary / _TENSORS)
    write_text(temporary / _PLAIN, json.dumps(plain))
    sums = {name: checksum(temporary / name) for name in (_PLAIN, _TENSORS)}
    write_text(temporary / _SUMS, json.dumps(sums))
    if target.exists():
        target.rename(folder / f".{target.name}.old")
    temporary.replace(target)
    sync_folder(folder)
    shutil.rmtree(folder / f".{target.name}.old", ignore_errors=True)
    states = _states(folder)
    anchors = [path for path in states if not path.name.endswith(_BETWEEN)]
    for old in set(states[keep:]) - set(anchors[:1]):
        shutil.rmtree(old)


def load_checkpoint(folder: Path, *, anchor: bool = False) -> Loaded | None:
    """The newest undamaged state (or anchor); None where there is none."""
    damaged = []
    for candidate in _states(folder):
        if anchor and candidate.name.endswith(_BETWEEN):
            continue
        try:
            saved = json.loads(_checked(candidate, _PLAIN).read_text(encoding="utf-8"))
            state: dict[str, Any] = _restore(saved, load_file(_checked(candidate, _TENSORS)))
        except _DAMAGE:
            damaged.append(candidate.name)
            continue
        return Loaded(state, damaged)
    return None


def noted(folder: Path, key: str) -> Any:
    """What the newest state says under a key of plain data, without its tensors; None where none is whole."""
    for candidate in _states(folder):
        try:
            saved = json.loads(_checked(candidate, _PLAIN).read_text(encoding="utf-8"))
            return _restore(dict(saved["$items"])[key], {})
        except _DAMAGE:
            continue
    return None


def drop_after(folder: Path, step: int) -> None:
    """Removes the states of later steps."""
    for path in _states(folder):
        if _step(path) > step:
            shutil.rmtree(path)


def _checked(candidate: Path, name: str) -> Path:
    """A file of a state; one of ``_DAMAGE`` where it is not the one that was written."""
    sums = json.loads((candidate / _SUMS).read_text(encoding="utf-8"))
    if checksum(candidate / name) != sums[name]:
        raise ValueError(name)
    return candidate / name


def _states(folder: Path) -> list[Path]:
    """The newest first; an anchor before another state of the same step."""
    found = [path for path in folder.glob("step-*") if path.is_dir()]
    return sorted(found, key=lambda path: (-_step(path), path.name))


def _step(path: Path) -> int:
    digits = path.name.split("-")[1]
    return int(digits) if digits.isdecimal() else -1


def _flatten(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, Mapping):
        return {"$items": [[key, _flatten(v, tensors, f"{path}/{key}")] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a checkpoint holds no {type(value).__name__}")


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: _restore(v, tensors) for key, v in value["$items"]}
    return value


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators' states that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
