"""States of an unfinished run on disk: atomic, the last few kept, no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mldcn.model import save_tensors
from mldcn.run import checksum, sync_folder, write_text

TENSOR = "$tensor"


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> None:
    """Writes nested plain data and tensors as ``step-N``; older ones beyond ``keep`` are removed."""
    tensors: dict[str, Tensor] = {}
    plain = _flatten(dict(state), tensors, "")
    target = folder / f"step-{step:012d}"
    temporary = folder / f".{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(tensors, temporary / "state.safetensors")
    crc = checksum(temporary / "state.safetensors")
    write_text(temporary / "state.json", json.dumps({"crc32": crc, "state": plain}))
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    sync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest undamaged state; None where there is none."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            saved = json.loads((candidate / "state.json").read_text(encoding="utf-8"))
            if checksum(candidate / "state.safetensors") != saved["crc32"]:
                continue
            tensors = load_file(candidate / "state.safetensors")
            state: dict[str, Any] = _restore(saved["state"], tensors)
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
        return state
    return None


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
