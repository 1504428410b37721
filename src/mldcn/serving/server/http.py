"""The HTTP transport: the Open Inference Protocol, ``/v1/rank``, metrics, and the page that describes them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mldcn.serving.refused import Reason, Refused, invalid
from mldcn.serving.server import effects, http_body, pages, ranking, wire
from mldcn.serving.server.calls import REQUEST_ID, ROUTING_KEY, Call, check_token
from mldcn.serving.server.repository import Version
from mldcn.serving.server.service import EXTENSIONS, NAME, Service

log = logging.getLogger("mldcn.serving")

Parsed = TypeVar("Parsed")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = ("/v2/health/live", "/v2/health/ready")  # probes carry no token
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ranking.ErrorAnswer, "description": words}
    for status, words in (
        (400, "not a request that the model can answer; says what to mend"),
        (401, "the token is lacking or another"),
        (404, "no such model or version"),
        (413, "too long, or too many rows"),
        (503, "too many requests wait (see Retry-After), or the models are being loaded"),
        (504, "the deadline has passed"),
    )
}


_FORMS = (http_body.InferForm, ranking.RankRequest, effects.EffectsRequest)
_REFERENCE = "#/components/schemas/{model}"


def _body(form: type[BaseModel], *others: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": _REFERENCE.format(model=form.__name__)}}
    }
    content |= {other: {"schema": {"type": "string", "format": "binary"}} for other in others}
    return {"requestBody": {"required": True, "content": content}}


class _App(FastAPI):
    """Describes bodies too that it does not read itself."""

    def openapi(self) -> dict[str, Any]:
        """The description."""
        described = super().openapi()
        forms = [(form, "validation") for form in _FORMS]
        _, found = models_json_schema(forms, ref_template=_REFERENCE)  # type: ignore[arg-type]
        described["components"]["schemas"].update(found["$defs"])
        return described


def build(service: Service) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application of a service."""
    app = _App(
        title="mldcn",
        version=service.version,
        summary="Ranking models by the Open Inference Protocol, and ranking requests.",
        docs_url=None,  # both would load scripts from elsewhere
        redoc_url=None,
    )
    _add_protocol(app, service)
    _add_repository(app, service)
    _add_rank(app, service)
    pages.add(app)

    @app.get("/metrics", summary="Prometheus' metrics")
    async def metrics() -> Response:
        return Response(
            await service.fleet.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        request.scope["call"].refused(error)
        return _refusal(error)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return answer({"error": str(error.detail)}, error.status_code, dict(error.headers or {}))

    async def broken(request: Request, error: Exception) -> Response:
        # It is raised again after this answer, and logged by Around.
        return _internal(request.scope["call"])

    app.add_exception_handler(Exception, broken)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, no_route)
    return Around(app, service)


def answer(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON."""
    return Response(json.dumps(data, allow_nan=False), status, headers, media_type="application/json")


def _called(request: Request, name: str) -> Call:
    call: Call = request.scope["call"]
    call.name = name
    return call


def _add_protocol(app: FastAPI, service: Service) -> None:
    repository = service.repository

    @app.get("/v2", summary="The server's name and version")
    async def server() -> Response:
        facts = {"name": NAME, "version": service.version, "extensions": list(EXTENSIONS)}
        return answer(facts)

    @app.get("/v2/health/live", summary="Whether the process works")
    async def live(request: Request) -> Response:
        _called(request, "live")
        return answer({"live": True})

    @app.get("/v2/health/ready", summary="Whether requests are wanted", responses={503: {}})
    async def ready(request: Request) -> Response:
        _called(request, "ready")
        return answer({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/v2/models/{model}", summary="What a model takes and gives", responses=_only(404))
    @app.get("/v2/models/{model}/versions/{version}", include_in_schema=False)
    async def metadata(request: Request, model: str, version: str = "") -> Response:
        _called(request, "metadata")
        service.check_ready()
        return answer(_metadata(repository.pick(model, version), repository.models[model]))

    @app.get("/v2/models/{model}/ready", summary="Whether a model answers", responses={**_only(404), 503: {}})
    @app.get("/v2/models/{model}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(request: Request, model: str, version: str = "") -> Response:
        _called(request, "model_ready")
        if repository.ready:
            repository.pick(model, version)
        is_ready = service.is_ready(model, version)
        return answer({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    @app.post(
        "/v2/models/{model}/infer",
        summary="Scores rows of raw values",
        response_model=http_body.InferAnswer,
        responses=_ERRORS,
        openapi_extra=_body(http_body.InferForm, "application/octet-stream"),
    )
    @app.post(
        "/v2/models/{model}/versions/{version}/infer",
        response_model=http_body.InferAnswer,
        include_in_schema=False,
    )
    async def infer(request: Request, model: str, version: str = "") -> Response:
        call = _called(request, "infer")
        service.admit()
        body = await http_body.read(request, service.options.limits)
        with service.stage("decode"):
            length, key = request.headers.get(http_body.HEADER_LENGTH), request.headers.get(ROUTING_KEY)
            asked, binary = await _decoded(
                body, lambda: http_body.parse_infer(body, length, model, version, key, service.options.limits)
            )
        served, scores = await service.infer(asked, call.id)
        call.facts |= {"model": served.model, "version": served.label, "rows": len(scores)}
        with service.stage("answer"):
            outputs = wire.outputs_of(served.engine, scores, asked.outputs)
            return http_body.infer_answer(served.model, served.label, asked.id, outputs, binary)


def _metadata(version: Version, versions: list[Version]) -> dict[str, Any]:
    def shown(tensors: list[wire.TensorFacts]) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in tensors]

    return {
        "name": version.model,
        "versions": [each.label for each in versions],
        "platform": "mldcn",
        "inputs": shown(wire.input_facts(version.engine)),
        "outputs": shown(wire.output_facts(version.engine)),
    }


def _add_repository(app: FastAPI, service: Service) -> None:
    @app.post("/v2/repository/index", summary="The models and versions that are there")
    async def index(request: Request) -> Response:
        _called(request, "repository")
        return answer(service.index())

    @app.post(
        "/v2/repository/models/{model}/load",
        summary="Looks at a model's folder again",
        responses=_only(400, 403, 404, 413),
    )
    async def load(request: Request, model: str) -> Response:
        _called(request, "repository")
        body = await http_body.read(request, service.options.limits)
        form = ranking.load_json(body) if body else {}
        if not isinstance(form, dict) or form.get("parameters"):
            raise invalid("parameters: none are known; models come from the server's own folders")
        await service.load(model)
        return answer({})

    @app.post(
        "/v2/repository/models/{model}/unload", summary="Serves a model no more", responses=_only(403, 404)
    )
    async def unload(request: Request, model: str) -> Response:
        _called(request, "repository")
        await service.unload(model)
        return answer({})


def _add_rank(app: FastAPI, service: Service) -> None:
    limits = service.options.limits

    @app.post(
        "/v1/rank",
        summary="Ranks the candidates of one user and context",
        description="JSON, or an Arrow stream whose rows are the candidates and whose schema has the rest of the "
        "request as JSON in its metadata, under the key 'mldcn'. Accept: "
        f"{ranking.ARROW_TYPE} asks for the answer as an Arrow stream.",
        response_model=ranking.RankAnswer,
        responses=_ERRORS,
        openapi_extra=_body(ranking.RankRequest, ranking.ARROW_TYPE),
    )
    async def rank(request: Request) -> Response:
        call = _called(request, "rank")
        service.admit()
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        parsers = {"application/json": ranking.parse_json, ranking.ARROW_TYPE: ranking.parse_arrow}
        if kind not in parsers:
            raise Refused(Reason.NO_SUCH_TYPE, f"content-type: send {' or '.join(parsers)}")
        body = await http_body.read(request, limits)
        with service.stage("decode"):
            head, candidates = await _decoded(body, lambda: parsers[kind](body))
        if head.routing_key is None and (key := request.headers.get(ROUTING_KEY)) is not None:
            head = head.model_copy(update={"routing_key": key})
        served, found = await service.rank(head, candidates, call.id)
        call.facts |= {"model": served.model, "version": served.label, "rows": found.rows}
        with service.stage("answer"):
            arrow = ranking.ARROW_TYPE in request.headers.get("accept", "")
            form = ranking.to_arrow if arrow else ranking.to_json
            made = form(head, served.model, served.label, served.engine.tasks, found)
            return Response(made, media_type=ranking.ARROW_TYPE if arrow else "application/json")

    @app.post(
        "/v1/effects",
        summary="Ranks candidates, and tells what moved each score",
        description="The effect of a group of features is a candidate's score less its score with the group's "
        f"values missing. At most {effects.CANDIDATES} candidates: each is scored once more for each group.",
        response_model=effects.EffectsAnswer,
        responses=_ERRORS,
        openapi_extra=_body(effects.EffectsRequest),
    )
    async def moved(request: Request) -> Response:
        call = _called(request, "effects")
        service.admit()
        body = await http_body.read(request, limits)
        with service.stage("decode"):
            form = ranking.validated(effects.EffectsRequest, ranking.load_json(body))
        served, found = await service.effects(form, ranking.columns_of(form))
        call.facts |= {"model": served.model, "version": served.label, "rows": found.ranked.rows}
        return answer(effects.to_answer(form, served.model, served.label, served.engine.tasks, found))

    @app.get("/v1/sample", summary="A ranking request that works", responses=_only(404))
    async def sample(request: Request, model: str | None = None) -> Response:
        _called(request, "sample")
        service.check_ready()
        version = service.repository.pick(model)
        return answer({"model": version.model, **ranking.sample_of(version.engine)})


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: _ERRORS.get(status, {"model": ranking.ErrorAnswer, "description": "not allowed here"})
        for status in statuses
    }


async def _decoded(body: bytes, parse: Callable[[], Parsed]) -> Parsed:
    return parse() if len(body) < http_body.LARGE_BODY else await asyncio.to_thread(parse)


class Around:
    """Everything that happens to every request: id, token, number at a time, log, counts; errors of ours.

    Args:
        app: the application.
        service: what it serves.
    """

    def __init__(self, app: FastAPI, service: Service) -> None:
        self._app = app
        self._service = service
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        client = (scope.get("client") or ("",))[0]
        trace = None if scope["path"] in OPEN else self._service.trace(headers)
        call = Call(self._service.metrics, "http", headers.get(REQUEST_ID), client, trace)
        scope["call"] = call
        status: int | str = "gone"

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (REQUEST_ID.encode(), call.id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        self._under_way += 1
        try:
            early = self._early(scope["path"], headers)
            if early is None:
                await self._app(scope, receive, sending)
            else:
                call.refused(early)
                await _refusal(early)(scope, receive, sending)
        except ClientDisconnect:
            status = "gone"
        except Exception:
            log.exception("request %s: internal error", call.id)
            if status == "gone":
                await _internal(call)(scope, receive, sending)
        finally:
            self._under_way -= 1
            call.done(status, logged=scope["path"] not in OPEN)

    def _early(self, path: str, headers: dict[str, str]) -> Refused | None:
        """Why a request is refused before anything is done for it."""
        if path in OPEN or path in pages.PATHS:
            return None
        try:
            check_token(self._service.options.token, headers.get("authorization"))
        except Refused as error:
            return error
        # A page of another site, open in a browser on this machine, could ask what its site may not.
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            return Refused(Reason.FORBIDDEN, "pages of other sites may not ask this server")
        if self._under_way > self._service.options.limits.requests:
            return Refused(Reason.BUSY, "too many requests are under way; try again later", 1)
        return None


def _internal(call: Call) -> Response:
    return answer({"error": f"internal error; the server's log tells more of request {call.id}"}, 500)


def _refusal(error: Refused) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.reason is Reason.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return answer({"error": str(error)}, error.reason.status, headers)
