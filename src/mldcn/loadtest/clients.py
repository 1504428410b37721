"""A server's callers: ``/v1/rank`` with JSON or Arrow, and the Open Inference Protocol by gRPC."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import aiohttp
import grpc
import pyarrow as pa

from mldcn.errors import UserError
from mldcn.loadtest.traffic import Ask, Columns
from mldcn.serving.server.grpc_messages import MESSAGES, SERVICE
from mldcn.serving.server.ranking import ARROW_KEY, ARROW_TYPE

Transport = Literal["json", "arrow", "grpc"]
_REMEDY = "is 'mldcn serve' running there?"


class Client(Protocol):
    """Sends bodies that it made before; gives None, or the kind of the error."""

    def body(self, ask: Ask) -> Any:
        """A request as it is sent."""

    async def send(self, body: Any) -> str | None:
        """Sends it and reads its answer."""

    async def close(self) -> None:
        """Closes its connections."""


class Target:
    """The server under test.

    Args:
        url: its address.
        model: the model's name; None for the only one.
        token: that the server wants.
        timeout: seconds after which a caller gives up.
    """

    def __init__(self, url: str, model: str | None, token: str | None, timeout: float) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url}: is no address of a server; write http://127.0.0.1:8000 for example")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.host = parts.hostname
        self.secure = parts.scheme == "https"
        self.model = model
        self.token = token
        self.timeout = timeout

    @property
    def headers(self) -> dict[str, str]:
        """That every request has."""
        return {} if self.token is None else {"authorization": f"Bearer {self.token}"}

    async def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The sample request and the model's description.

        Raises:
            UserError: the server cannot be reached, or has no such model.
        """
        chosen = {} if self.model is None else {"model": self.model}
        try:
            async with aiohttp.ClientSession(self.url, headers=self.headers) as session:
                sample = await _answer(session, "/v1/sample", chosen)
                return sample, await _answer(session, f"/v2/models/{sample['model']}", {})
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise UserError(f"{self.url}: no answer ({error}); {_REMEDY}") from None


async def _answer(session: aiohttp.ClientSession, path: str, query: dict[str, str]) -> Any:
    async with session.get(path, params=query) as response:
        answer = await response.json(content_type=None)
        if response.status != 200:
            raise UserError(f"{path}: {response.status}, {answer.get('error', '')}")
        return answer


class RankClient:
    """``POST /v1/rank``.

    Args:
        target: the server.
        model: its model.
        arrow: sends and takes Arrow streams in place of JSON.
    """

    def __init__(self, target: Target, model: str, *, arrow: bool) -> None:
        kind = ARROW_TYPE if arrow else "application/json"
        self._model = model
        self._arrow = arrow
        self._session = aiohttp.ClientSession(
            target.url,
            headers={**target.headers, "content-type": kind, "accept": kind},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=target.timeout),
            auto_decompress=False,
        )

    def body(self, ask: Ask) -> bytes:
        """A request as it is sent."""
        head: dict[str, Any] = {"model": self._model, "user": ask.user, "context": ask.context}
        if not self._arrow:
            return json.dumps({**head, "candidates": ask.candidates}).encode()
        table = pa.table({name: pa.array(values) for name, values in ask.candidates.items()})
        sink = pa.BufferOutputStream()
        schema = table.schema.with_metadata({ARROW_KEY: json.dumps(head)})
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(table.cast(schema))
        return bytes(sink.getvalue())

    async def send(self, body: bytes) -> str | None:
        """Sends it and reads its answer."""
        try:
            async with self._session.post("/v1/rank", data=body) as response:
                await response.read()
                return None if response.status == 200 else f"HTTP {response.status}"
        except TimeoutError:
            return "no answer in time"
        except aiohttp.ClientError as error:
            return type(error).__name__

    async def close(self) -> None:
        """Closes its connections."""
        await self._session.close()


class InferClient:
    """``ModelInfer`` by gRPC: all columns in each row, as raw contents.

    Args:
        target: the server.
        address: ``host:port`` of its gRPC.
        metadata: the model's description.
    """

    def __init__(self, target: Target, address: str, metadata: dict[str, Any]) -> None:
        self._model = metadata["name"]
        self._types = {each["name"]: each["datatype"] for each in metadata["inputs"]}
        self._timeout = target.timeout
        self._metadata = tuple(target.headers.items())
        options = [("grpc.max_receive_message_length", -1)]
        self._channel = (
            grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options)
            if target.secure
            else grpc.aio.insecure_channel(address, options)
        )
        # Messages are serialised beforehand, so that the test's own work is small.
        self._call = self._channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=None,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )

    def body(self, ask: Ask) -> bytes:
        """A request as it is sent."""
        request = MESSAGES["ModelInferRequest"](model_name=self._model)
        for name, values in ask.columns().items():
            datatype = "BYTES" if _texts_wanted(values) else self._types.get(name, "BYTES")
            request.inputs.add(name=name, datatype=datatype, shape=[ask.rows])
            request.raw_input_contents.append(_raw(values, datatype))
        message: bytes = request.SerializeToString()
        return message

    async def send(self, body: bytes) -> str | None:
        """Sends it and reads its answer."""
        try:
            await self._call(body, timeout=self._timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            return (
                "no answer in time"
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                else error.code().name
            )
        return None

    async def close(self) -> None:
        """Closes its connections."""
        await self._channel.close()


def _texts_wanted(values: Columns | Sequence[Any]) -> bool:
    return any(isinstance(value, list | str) for value in values)


def _raw(values: Sequence[Any], datatype: str) -> bytes:
    if datatype == "FP64":
        return b"".join(struct.pack("<d", float("nan") if value is None else value) for value in values)
    parts = []
    for value in values:
        each = "|".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
        text = each.encode()
        parts += [len(text).to_bytes(4, "little"), text]
    return b"".join(parts)
