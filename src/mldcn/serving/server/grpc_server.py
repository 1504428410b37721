"""The gRPC transport of the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from mldcn.serving.refused import Refused, invalid
from mldcn.serving.server import aging, wire
from mldcn.serving.server.calls import REQUEST_ID, ROUTING_KEY, Call, check_token
from mldcn.serving.server.grpc_messages import MESSAGES, SERVICE
from mldcn.serving.server.options import Limits
from mldcn.serving.server.service import EXTENSIONS, NAME, Service

log = logging.getLogger("mldcn.serving")

OPEN = ("ServerLive", "ServerReady")  # probes carry no token
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

Context = Any
Method = Callable[[Any, Call, Mapping[str, str]], Awaitable[Any]]


def build(service: Service, *, shared_port: bool = False) -> grpc.aio.Server:
    """A server that knows the protocol and listens nowhere yet.

    Args:
        service: what answers.
        shared_port: whether others may listen at its port.
    """
    limits = service.options.limits
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limits.body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 16 << 10),
            # Otherwise a second server would take half of the requests.
            ("grpc.so_reuseport", int(shared_port)),
            *([("grpc.max_connection_age_ms", int(1000 * aging.SECONDS))] if shared_port else []),
        ],
        maximum_concurrent_rpcs=limits.requests,
    )
    methods = _Methods(service)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _around(service, name, getattr(methods, name)),
            response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
        )
        for name in METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    return server


def listen(server: grpc.aio.Server, address: str, tls: tuple[bytes, bytes] | None) -> int:
    """Takes a port; with the certificate chain and key of ``tls``, encrypted.

    Raises:
        RuntimeError: it is taken.
    """
    if tls is None:
        return int(server.add_insecure_port(address))
    chain, key = tls
    return int(server.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)])))


def _around(service: Service, name: str, method: Method) -> Callable[[Any, Context], Awaitable[Any]]:
    """A method with what happens to every call.

    It is given the message's bytes: gRPC would answer those that are no message with UNKNOWN, and log a traceback.
    """
    form = MESSAGES[f"{name}Request"]

    async def handle(message: bytes, context: Context) -> Any:
        metadata = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        logged = name not in OPEN
        trace = service.trace(metadata) if logged else None
        call = Call(service.metrics, "grpc", metadata.get(REQUEST_ID), context.peer(), trace)
        call.name = name
        code = "CANCELLED"
        try:
            await context.send_initial_metadata(((REQUEST_ID, call.id),))
            if logged:
                check_token(service.options.token, metadata.get("authorization"))
            try:
                request = form.FromString(message)
            except DecodeError:
                raise invalid(f"the message is no {name}Request") from None
            reply = await method(request, call, metadata)
            code = "OK"
            return reply
        except Refused as error:
            call.refused(error)
            code = error.reason.code
            await context.abort(grpc.StatusCode[code], str(error), _trailing(error))
        except asyncio.CancelledError:
            raise
        except Exception:
            code = "INTERNAL"
            log.exception("request %s: internal error", call.id)
            await context.abort(
                grpc.StatusCode.INTERNAL,
                f"internal error; the server's log tells more of request {call.id}",
            )
        finally:
            call.done(code, logged=logged)

    return handle


def _trailing(error: Refused) -> tuple[tuple[str, str], ...]:
    if error.retry_after is None:
        return ()
    return (
        ("retry-after", str(error.retry_after)),
        ("grpc-retry-pushback-ms", str(1000 * error.retry_after)),
    )


METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)


class _Methods:
    """The protocol's methods, by their names in it."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        return MESSAGES["ServerLiveResponse"](live=True)

    async def ServerReady(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        return MESSAGES["ServerReadyResponse"](ready=self._service.ready)

    async def ModelReady(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        return MESSAGES["ModelReadyResponse"](ready=self._service.is_ready(request.name, request.version))

    async def ServerMetadata(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        return MESSAGES["ServerMetadataResponse"](
            name=NAME, version=self._service.version, extensions=EXTENSIONS
        )

    async def ModelMetadata(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        self._service.check_ready()
        version = self._service.repository.pick(request.name, request.version)
        reply = MESSAGES["ModelMetadataResponse"](
            name=version.model,
            versions=[each.label for each in self._service.repository.models[version.model]],
            platform="mldcn",
        )
        for facts, tensors in (
            (wire.input_facts(version.engine), reply.inputs),
            (wire.output_facts(version.engine), reply.outputs),
        ):
            for each in facts:
                tensors.add(name=each.name, datatype=each.datatype, shape=each.shape)
        return reply

    async def ModelInfer(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        service = self._service
        service.admit()
        with service.stage("decode"):
            asked = parse_infer(request, metadata.get(ROUTING_KEY), service.options.limits)
        # The caller's own gRPC deadline cancels this coroutine, and so its place in the queue.
        served, scores = await service.infer(asked, call.id)
        call.facts |= {"model": served.model, "version": served.label, "rows": len(scores)}
        with service.stage("answer"):
            reply = MESSAGES["ModelInferResponse"](
                model_name=served.model, model_version=served.label, id=asked.id
            )
            for name, values in wire.outputs_of(served.engine, scores, asked.outputs):
                reply.outputs.add(name=name, datatype=wire.SCORE_TYPE, shape=[len(values)])
                reply.raw_output_contents.append(values.astype("<f4").tobytes())
            return reply

    async def RepositoryIndex(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        reply = MESSAGES["RepositoryIndexResponse"]()
        for each in self._service.index():
            reply.models.add(**each)
        return reply

    async def RepositoryModelLoad(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        if len(request.parameters):
            raise invalid("parameters: none are known; models come from the server's own folders")
        await self._service.load(request.model_name)
        return MESSAGES["RepositoryModelLoadResponse"]()

    async def RepositoryModelUnload(self, request: Any, call: Call, metadata: Mapping[str, str]) -> Any:
        await self._service.unload(request.model_name)
        return MESSAGES["RepositoryModelUnloadResponse"]()


def parse_infer(request: Any, key: str | None, limits: Limits) -> wire.InferRequest:
    """A message as a request of the protocol.

    Raises:
        Refused: its tensors are not what they say.
    """
    raw = request.raw_input_contents
    if len(raw) and len(raw) != len(request.inputs):
        raise invalid(f"raw_input_contents: {len(raw)} do not go with {len(request.inputs)} inputs")
    tensors = []
    for i, each in enumerate(request.inputs):
        shape = tuple(each.shape)
        count = wire.elements(each.name, each.datatype, shape, limits)
        given = (
            wire.from_bytes(each.name, each.datatype, raw[i], count) if len(raw) else _contents(each, count)
        )
        tensors.append(wire.Tensor(each.name, each.datatype, shape, given))
    parameters = {
        name: getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")
        for name, parameter in request.parameters.items()
    }
    timeout, routing_key = wire.parameters_of(parameters)
    return wire.InferRequest(
        request.model_name,
        request.model_version,
        tuple(tensors),
        request.id,
        tuple(output.name for output in request.outputs),
        timeout,
        key if routing_key is None else routing_key,
    )


def _contents(tensor: Any, count: int) -> Sequence[Any] | NDArray[Any]:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise invalid(f"input {tensor.name!r}: {tensor.datatype} goes as raw contents only")
    values = getattr(tensor.contents, field)
    if len(values) != count:
        raise invalid(f"input {tensor.name!r}: {len(values)} values in {field} are not {count}")
    if tensor.datatype == "BYTES":
        return wire.decoded(tensor.name, values)
    return np.array(values, dtype=np.float64) if field.startswith("fp") else list(values)
