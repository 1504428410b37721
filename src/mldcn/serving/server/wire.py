"""Tensors of the Open Inference Protocol to columns of raw values, and probabilities to tensors.

A tensor's first dimension is the row. A feature with one value a row takes ``[n]`` or ``[n, 1]``; one with a list
a row takes ``[n]`` texts, cut at the feature's delimiter, or ``[n, k]``.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mldcn.predict import PROBABILITY
from mldcn.serving.engine import Engine, Scores
from mldcn.serving.refused import Reason, Refused, invalid
from mldcn.serving.server.options import Limits

_NUMBERS: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
DATATYPES = (*_NUMBERS, "BYTES")
SCORE_TYPE = "FP32"


@dataclass(frozen=True)
class Tensor:
    """A named array. ``values`` are flat, in row-major order; missing ones are None (JSON's null)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any] | NDArray[Any]


@dataclass(frozen=True)
class InferRequest:
    """A request of the protocol, however it came.

    Attributes:
        model: its name.
        version: the version asked for; empty for whichever serves.
        id: the caller's name of the request, given back.
        tensors: the inputs.
        outputs: the tensors asked for; none means all.
        timeout: seconds until nobody waits for the answer any more.
        routing_key: whom the request is for; see ``Repository.pick``.
    """

    model: str
    version: str
    tensors: tuple[Tensor, ...]
    id: str = ""
    outputs: tuple[str, ...] = ()
    timeout: float | None = None
    routing_key: str | None = None


def parameters_of(parameters: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """The timeout in seconds (the protocol's is in microseconds) and the routing key of a request's parameters.

    Raises:
        Refused: one of them is of a wrong type.
    """
    timeout, key = parameters.get("timeout"), parameters.get("routing_key")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0):
        raise invalid("parameters.timeout: must be a whole number of microseconds, 0 for none")
    if key is not None and (isinstance(key, bool) or not isinstance(key, str | int)):
        raise invalid("parameters.routing_key: must be a text or a whole number")
    return timeout / 1e6 if timeout else None, None if key is None else str(key)


def elements(name: str, datatype: str, shape: Sequence[Any], limits: Limits) -> int:
    """How many values a tensor has.

    Raises:
        Refused: its type or shape is none that a model takes, or it has too many rows.
    """
    if datatype not in DATATYPES:
        raise invalid(f"input {name!r}: unknown datatype {datatype!r}; send one of {', '.join(DATATYPES)}")
    if not 1 <= len(shape) <= 2 or any(
        isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape
    ):
        raise invalid(f"input {name!r}: shape must be [rows] or [rows, values], of whole numbers")
    check_rows(shape[0], limits)
    return math.prod(shape)


def check_rows(rows: int, limits: Limits) -> None:
    """Refuses a request of too many rows."""
    if rows > limits.rows:
        raise Refused(
            Reason.TOO_LARGE, f"{rows} rows are more than {limits.rows}; send them in several requests"
        )


def from_bytes(
    name: str, datatype: str, data: bytes | memoryview, count: int
) -> Sequence[Any] | NDArray[Any]:
    """The values of a tensor's raw bytes: little-endian numbers, or texts each behind its length as a uint32.

    Raises:
        Refused: the bytes are not those of ``count`` values.
    """
    if datatype != "BYTES":
        kind = np.dtype(_NUMBERS[datatype]).newbyteorder("<")
        if len(data) != count * kind.itemsize:
            raise invalid(f"input {name!r}: {len(data)} bytes are not {count} values of {datatype}")
        array = np.frombuffer(data, np.uint8 if datatype == "BOOL" else kind)
        return array != 0 if datatype == "BOOL" else array
    texts: list[bytes] = []
    place = 0
    while place < len(data):
        if place + 4 > len(data) or len(texts) == count:
            break
        (length,) = struct.unpack_from("<I", data, place)
        place += 4
        if place + length > len(data):
            break
        texts.append(bytes(data[place : place + length]))
        place += length
    if place != len(data) or len(texts) != count:
        raise invalid(f"input {name!r}: its bytes are not {count} texts, each behind its length in 4 bytes")
    return decoded(name, texts)


def decoded(name: str, texts: Iterable[bytes]) -> list[str]:
    """UTF-8 as text."""
    try:
        return [text.decode() for text in texts]
    except UnicodeDecodeError:
        raise invalid(f"input {name!r}: holds a text that is not UTF-8") from None


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> Sequence[Any]:
    """The flat values of a tensor's JSON data, nested or flat.

    Raises:
        Refused: there are too many or too few, or one is of another type.
    """
    if not isinstance(data, list):
        raise invalid(f"input {name!r}: data must be a list of values")
    if len(shape) == 2 and data and all(isinstance(row, list) for row in data):
        if len(data) != shape[0] or any(len(row) != shape[1] for row in data):
            raise invalid(f"input {name!r}: data is not of shape {list(shape)}")
        data = list(itertools.chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise invalid(f"input {name!r}: {len(data)} values are not of shape {list(shape)}")
    allowed = _JSON_TYPES[datatype if datatype in _JSON_TYPES else "INT"]
    found = set(map(type, data)) - {type(None)}
    if not found <= allowed:
        raise invalid(f"input {name!r}: data holds values that are not of datatype {datatype}")
    values: list[Any] = data
    return values


_JSON_TYPES: dict[str, set[type]] = {
    "BYTES": {str},
    "BOOL": {bool},
    "FP16": {int, float},
    "FP32": {int, float},
    "FP64": {int, float},
    "INT": {int},
}


def columns_of(tensors: Sequence[Tensor], engine: Engine, limits: Limits) -> dict[str, Sequence[Any]]:
    """The tensors as columns of raw values.

    Raises:
        Refused: a tensor is given twice, or has several values a row where the feature takes one.
    """
    lists = {each.name for each in engine.inputs if each.delimiter}
    found: dict[str, Sequence[Any]] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise invalid(f"input {tensor.name!r}: is given twice")
        values = tensor.values.tolist() if isinstance(tensor.values, np.ndarray) else tensor.values
        check_values(tensor.name, values, limits)
        if len(tensor.shape) == 2 and tensor.name in lists:
            width = tensor.shape[1]
            values = [values[start * width : (start + 1) * width] for start in range(tensor.shape[0])]
        elif len(tensor.shape) == 2 and tensor.shape[1] != 1:
            raise invalid(
                f"input {tensor.name!r}: takes one value a row; its shape must be [rows] or [rows, 1]"
            )
        found[tensor.name] = values
    return found


def check_values(name: str, values: Sequence[Any], limits: Limits) -> None:
    """Refuses texts that are too long, and values that are neither plain nor lists of plain ones."""
    kinds = set(map(type, values))
    if list in kinds:
        values = list(
            itertools.chain.from_iterable(each if type(each) is list else (each,) for each in values)
        )
        kinds = set(map(type, values))
    if kinds & {list, dict}:
        raise invalid(f"{name!r}: a value is a text, a number, true, false, null or a list of these")
    if str not in kinds:
        return
    longest = max(map(len, values if kinds == {str} else filter(_is_text, values)))
    if longest > limits.text_bytes:
        raise Refused(
            Reason.TOO_LARGE,
            f"{name!r}: a text of {longest} characters is longer than {limits.text_bytes}",
        )


def _is_text(value: object) -> bool:
    return type(value) is str


def output_names(engine: Engine, asked: Sequence[str]) -> list[str]:
    """The outputs of an answer.

    Raises:
        Refused: the model has no such output.
    """
    names = [f"{PROBABILITY}{task}" for task in engine.tasks]
    for name in asked:
        if name not in names:
            raise invalid(f"output {name!r}: the model has only {', '.join(names)}")
    return list(dict.fromkeys(asked)) or names


def outputs_of(engine: Engine, scores: Scores, asked: Sequence[str]) -> list[tuple[str, NDArray[np.float32]]]:
    """The probabilities ``(n,)`` of each output."""
    places = {f"{PROBABILITY}{task}": i for i, task in enumerate(engine.tasks)}
    return [(name, scores.probabilities[:, places[name]]) for name in output_names(engine, asked)]


@dataclass(frozen=True)
class TensorFacts:
    """A tensor that a model takes or gives."""

    name: str
    datatype: str
    shape: list[int] = field(default_factory=lambda: [-1])


def input_facts(engine: Engine) -> list[TensorFacts]:
    """What a model takes. Numbers may be sent in every datatype; ids as texts or whole numbers."""
    return [
        TensorFacts(each.name, "FP64" if each.kind in ("numeric", "bucketised", "time") else "BYTES")
        for each in engine.inputs
    ]


def output_facts(engine: Engine) -> list[TensorFacts]:
    """What a model gives."""
    return [TensorFacts(name, SCORE_TYPE) for name in output_names(engine, ())]
