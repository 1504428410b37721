"""Bodies of HTTP requests and answers: sizes, compression, JSON with raw tensors behind it."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from mldcn.serving.refused import Reason, Refused, invalid
from mldcn.serving.server import wire
from mldcn.serving.server.options import Limits
from mldcn.serving.server.ranking import load_json, validated

HEADER_LENGTH = "Inference-Header-Content-Length"
# From here on a body is decoded in a thread, so that it does not keep other requests waiting.
LARGE_BODY = 1 << 17


class _Form(BaseModel):
    # The protocol has extensions; what they add is passed over.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class InputForm(_Form):
    """A tensor given: its values are in ``data`` or, with ``binary_data_size``, behind the JSON."""

    name: str = Field(..., max_length=256)
    shape: list[int] = Field(..., max_length=2)
    datatype: str = Field(..., description=f"one of {', '.join(wire.DATATYPES)}")
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


class OutputForm(_Form):
    """A tensor asked for."""

    name: str = Field(..., max_length=256)
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferForm(_Form):
    """An inference request of the Open Inference Protocol."""

    id: str = Field("", max_length=1024)
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[InputForm]
    outputs: list[OutputForm] = Field(default_factory=list)


class OutputTensor(_Form):
    """A tensor of an answer."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float] | None = None


class InferAnswer(_Form):
    """An inference answer of the Open Inference Protocol."""

    model_name: str
    model_version: str
    id: str = ""
    outputs: list[OutputTensor]


async def read(request: Request, limits: Limits) -> bytes:
    """A request's body, unpacked.

    Raises:
        Refused: it is too long, packed in an unknown way, or does not come to an end.
    """
    too_large = Refused(Reason.TOO_LARGE, f"the body is longer than {limits.body_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limits.body_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refused(Reason.LATE, "the body did not come to its end in time") from None
    body = b"".join(parts)
    packing = request.headers.get("content-encoding", "identity").lower()
    if packing == "identity":
        return body
    if packing not in ("gzip", "deflate"):
        raise Refused(Reason.NO_SUCH_TYPE, "content-encoding: only gzip and deflate are known")
    try:
        unpacker = zlib.decompressobj(wbits=47)  # either format's header
        unpacked = unpacker.decompress(body, limits.body_bytes + 1)
    except zlib.error:
        raise invalid(f"the body is no {packing}") from None
    if len(unpacked) > limits.body_bytes:
        raise too_large
    if not unpacker.eof:
        raise invalid("the packed body is cut off")
    return unpacked


def parse_infer(
    body: bytes, header_length: str | None, model: str, version: str, key: str | None, limits: Limits
) -> tuple[wire.InferRequest, dict[str, bool] | bool]:
    """A request of the protocol, and which outputs are wanted as raw bytes.

    Args:
        body: JSON, with the tensors' raw bytes behind it.
        header_length: the JSON's length, where there is something behind it.
        model: of the URL.
        version: of the URL.
        key: the routing key that the headers gave.
        limits: on rows and texts.

    Raises:
        Refused: it is none.
    """
    length = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length[:20]) > length:
            raise invalid(f"{HEADER_LENGTH}: must be the length of the body's JSON")
        length = int(header_length)
    form = validated(InferForm, load_json(memoryview(body)[:length]))
    raw = memoryview(body)[length:]
    tensors = []
    for each in form.inputs:
        count = wire.elements(each.name, each.datatype, each.shape, limits)
        size = each.parameters.get("binary_data_size")
        values: Sequence[Any] | NDArray[Any]
        if size is None:
            values = wire.from_json(each.name, each.datatype, each.shape, each.data)
        else:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(raw):
                raise invalid(f"input {each.name!r}: binary_data_size is not what lies behind the JSON")
            values = wire.from_bytes(each.name, each.datatype, raw[:size], count)
            raw = raw[size:]
        tensors.append(wire.Tensor(each.name, each.datatype, tuple(each.shape), values))
    if len(raw):
        raise invalid(f"{len(raw)} bytes lie behind the tensors; is a binary_data_size wrong?")
    timeout, routing_key = wire.parameters_of(form.parameters)
    request = wire.InferRequest(
        model,
        version,
        tuple(tensors),
        form.id,
        tuple(each.name for each in form.outputs),
        timeout,
        key if routing_key is None else routing_key,
    )
    default = form.parameters.get("binary_data_output") is True
    chosen = {each.name: each.parameters.get("binary_data", default) is True for each in form.outputs}
    return request, chosen or default


def infer_answer(
    model: str,
    version: str,
    request_id: str,
    outputs: Sequence[tuple[str, NDArray[np.float32]]],
    binary: dict[str, bool] | bool,
) -> Response:
    """The answer of the protocol."""
    tensors: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name, values in outputs:
        tensor: dict[str, Any] = {"name": name, "datatype": wire.SCORE_TYPE, "shape": [len(values)]}
        if binary if isinstance(binary, bool) else binary.get(name, False):
            raw.append(values.astype("<f4").tobytes())
            tensor["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensor["data"] = values.tolist()
        tensors.append(tensor)
    answer = {"model_name": model, "model_version": version, "id": request_id, "outputs": tensors}
    head = json.dumps(answer, allow_nan=False).encode()
    if not raw:
        return Response(head, media_type="application/json")
    return Response(
        b"".join([head, *raw]),
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(head))},
    )
