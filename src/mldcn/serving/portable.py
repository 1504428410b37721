"""Exported programs as JSON beside safetensors: what ``torch.export`` made, read without unpickling anything.

``torch.export.save`` makes an archive whose weights and constants ``torch.load`` may unpickle, at the archive's
own word. Here the list of operations alone is kept as PyTorch serialises it; the tensors lie in safetensors.

PyTorch's reader of that list resolves an operation's name attribute by attribute from ``torch``, hands expressions
of sizes to SymPy, which evaluates them, and compiles guards. So before it reads anything, every name must be one
of the operations of :func:`_is_allowed`, every expression be a sum or product of symbols and whole numbers, and
guards be absent.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mldcn.errors import UserError
from mldcn.files import atomic, write_text

_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.[A-Za-z0-9_]+")
_ARITHMETIC = frozenset(
    f"_operator.{name}"
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "le", "lt", "ge", "gt")
)
# Operations of the tensor library that read or write files, or take memory as it lies.
_REFUSED = frozenset({"from_file", "save", "set_", "set_data", "as_strided", "as_strided_"})
# Of its internal operations, whose names begin so, exported models use these.
_INTERNAL = frozenset({"_assert_scalar", "_assert_tensor_metadata", "_softmax", "_to_copy", "_unsafe_view"})
# What sizes are made of: the batch's symbol, whole numbers, their sums and products.
_SIZES = frozenset({"Symbol", "Integer", "Add", "Mul"})
_SYMBOL = re.compile(r"[su][0-9]+")


def save_portable(program: torch.export.ExportedProgram, file: Path) -> None:
    """Writes a program: its operations into ``file``, its tensors beside it, as ``.safetensors``.

    Raises:
        UserError: it holds what :func:`load_portable` would refuse.
    """
    from torch._export.serde.serialize import EnumEncoder, ExportedProgramSerializer, _dataclass_to_dict

    made = ExportedProgramSerializer().serialize(program)
    raw = json.loads(json.dumps(_dataclass_to_dict(made.exported_program), cls=EnumEncoder))  # type: ignore[no-untyped-call]
    raw["guards_code"] = []  # the shapes of inputs; ours are always right
    for node in raw["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}  # where the code stood that made it
    _vet(raw, file)
    tensors = {f"constant:{name}": value for name, value in program.constants.items()}
    for name, value in program.state_dict.items():
        tensors[f"{'parameter' if isinstance(value, nn.Parameter) else 'buffer'}:{name}"] = value
    with atomic(file.with_suffix(".safetensors")) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, temporary
        )
    write_text(file, json.dumps(raw) + "\n")


def load_portable(file: Path, device: torch.device) -> nn.Module:
    """The module of a program that :func:`save_portable` wrote.

    Raises:
        UserError: a file is missing or damaged, of another version of PyTorch, or asks for an operation that no
            exported model needs.
    """
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass
    from torch.export.passes import move_to_device_pass

    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(file.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export the run again") from None
    _vet(raw, file)
    state: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for key, value in tensors.items():
        role, _, name = key.partition(":")
        if role == "constant":
            constants[name] = value
        else:
            state[name] = nn.Parameter(value, requires_grad=False) if role == "parameter" else value
    try:
        described = _dict_to_dataclass(schema.ExportedProgram, raw)  # type: ignore[no-untyped-call]
        program = ExportedProgramDeserializer().deserialize(described, state, constants)
    except Exception as error:
        raise UserError(
            f"{file}: PyTorch {torch.__version__} cannot read it ({type(error).__name__}: {error}); it was "
            f"written by {raw.get('torch_version')}: export the run again"
        ) from None
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return program.module()


def _is_allowed(name: str) -> bool:
    """Whether an operation is one of PyTorch's tensor library that touches nothing but tensors, or arithmetic."""
    found = _ATEN.fullmatch(name)
    if found is None:
        return name in _ARITHMETIC
    return found[1] not in _REFUSED and (not found[1].startswith("_") or found[1] in _INTERNAL)


def _is_size(text: str) -> bool:
    """Whether an expression, as SymPy's ``srepr`` writes it, is a size; it is parsed and not evaluated."""
    try:
        return _sums_up(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _sums_up(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and _sums_up(node.operand)
    if isinstance(node, ast.Constant):
        return type(node.value) is int or (
            isinstance(node.value, str) and bool(_SYMBOL.fullmatch(node.value))
        )
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SIZES):
        return False
    assumed = all(isinstance(each.value, ast.Constant) and each.value.value is True for each in node.keywords)
    return assumed and all(_sums_up(each) for each in node.args)


def _vet(raw: Any, file: Path) -> None:
    if not isinstance(raw, dict) or raw.get("guards_code") != []:
        raise UserError(f"{file}: is no program of an export; export the run again")
    for key, value in _entries(raw):
        if key == "target" and not (isinstance(value, str) and _is_allowed(value)):
            raise UserError(f"{file}: asks for the operation {value!r}, which no exported model needs")
        if key == "expr_str" and not (isinstance(value, str) and _is_size(value)):
            raise UserError(f"{file}: holds the expression {value!r}, which no exported model needs")
        if key == "metadata" and value not in ({}, None):
            raise UserError(f"{file}: holds notes on its operations, which no export leaves")


def _entries(raw: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested plain data, with its value."""
    waiting = [raw]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
