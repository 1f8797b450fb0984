"""The one map from errors to HTTP status, and the one shape in which the control API tells them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import structlog
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from manager.api.schemas import ErrorBody
from manager.errors import (
    ConflictError,
    InvalidRequestError,
    ManagerError,
    NoRouteError,
    NotAnsweredError,
    NotInstalledError,
    Reason,
    RunsFullError,
    UnavailableError,
    UnknownCollectionError,
    UnknownGpuError,
    UnknownInstanceError,
    UnknownKeyError,
    UnknownModelError,
    UnknownPullError,
    UnknownRequestError,
    UnknownRunError,
)
from manager.settings.problems import described
from manager.wire import statuses
from manager.wire.dialect import error_body
from manager.wire.keys import without_secrets
from manager.wire.ollama_routes import CLUSTER_PREFIX, spoken_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastapi import FastAPI
    from pydantic_core import ErrorDetails
    from starlette.requests import Request
    from starlette.routing import BaseRoute

_log = structlog.get_logger("api")

# Below these all errors have the control API's shape, those of paths that do not exist too.
_OWN_PREFIXES = ("/api/runtime", "/api/settings", "/api/v1", CLUSTER_PREFIX)

_STATUS: tuple[tuple[type[ManagerError], int], ...] = (
    (UnknownInstanceError, 404),
    (UnknownModelError, 404),
    (UnknownRequestError, 404),
    (UnknownPullError, 404),
    (UnknownRunError, 404),
    (UnknownKeyError, 404),
    (UnknownGpuError, 404),
    (UnknownCollectionError, 404),
    (NotInstalledError, 501),
    (RunsFullError, 429),
    (ConflictError, 409),
    (InvalidRequestError, 422),
    (UnavailableError, 503),
    (ManagerError, 500),
)

_REFUSAL = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the description of a route: what the gate and the checks of a request answer, and `statuses`.

    FastAPI builds a serializer for each model of each route, 1 ms apiece in a start. One of them brings
    `ErrorBody` into the description; the others refer to it.
    """
    return {401: {"model": ErrorBody}, **dict.fromkeys((403, 413, 422, *statuses), _REFUSAL)}


def text(media_type: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """For the description of a route: an answer that is no JSON document."""
    return {"content": {media_type: {"schema": schema or {"type": "string"}}}}


def status_of(error: ManagerError) -> int:
    if isinstance(error, NotAnsweredError):
        return statuses.status_of(error.reason, error.refused)
    if isinstance(error, NoRouteError):
        return 404  # whatever the reason: nothing was asked of an instance
    code = error.code
    if code in (Reason.CANCELLED, Reason.NAME_CONFLICT, Reason.HOST_DENIED):
        return 409
    if code in (Reason.START_TIMEOUT, Reason.ATTEMPT_TIMEOUT):
        return 504
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def error_response(
    status: int,
    code: str,
    message: str,
    *,
    instance: str | None = None,
    details: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    body: dict[str, Any] = {"code": code, "message": message}
    if instance is not None:
        body["instance"] = instance
    if details:
        body["details"] = details
    return JSONResponse({"error": body}, status_code=status, headers=headers)


def manager_error_response(error: ManagerError) -> JSONResponse:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return error_response(
        status_of(error),
        error.code,
        error.message,
        instance=error.instance,
        details=error.details,
        headers=headers,
    )


def _problems(request: Request, error: RequestValidationError) -> Iterator[dict[str, str]]:
    """Yield each field with what was given and what is allowed, in the words of the configuration file."""
    route = request.scope.get("route")
    models = _models(route) if isinstance(route, APIRoute) else {}
    for one in error.errors():
        part, *inner = one["loc"]
        relative = cast("ErrorDetails", {**one, "loc": tuple(inner)})
        for path, message in described(relative, models.get(part), mapping="an object"):
            yield {"field": ".".join(map(str, (part, *path))), "message": message}


def _models(route: APIRoute) -> dict[str | int, Any]:
    """The models of what a route takes, by the part of a request; of a single value there is none."""
    models: dict[str | int, Any] = {}
    if route.body_field is not None:
        models["body"] = route.body_field.field_info.annotation
    for parameter in route.dependant.query_params:
        models["query"] = parameter.field_info.annotation
    return models


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def add_error_handlers(app: FastAPI, routes: list[BaseRoute]) -> None:
    """Every error becomes the documented shape; a traceback goes to the log only.

    Args:
        app: gets the handlers.
        routes: all that there are, to say which methods a path has.
    """

    @app.exception_handler(ManagerError)
    async def _(_request: Request, error: ManagerError) -> JSONResponse:
        return manager_error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = list(_problems(request, error))
        if error.errors()[0]["type"] == "json_invalid":
            problems = [{"field": "body", "message": "it is not JSON"}]
        elif problems[0]["field"] == "body" and not _is_json(request):
            problems[0]["message"] = "expected JSON, with the header `Content-Type: application/json`"
        first = problems[0]
        return error_response(
            422, "invalid_request", f"{first['field']}: {first['message']}", details={"fields": problems}
        )

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 400:  # noqa: PLR2004  (the framework's word for a body it cannot decode)
            return error_response(422, "invalid_request", "body: it is not JSON in UTF-8")
        path = request.url.path
        if error.status_code == 404 and not path.startswith(_OWN_PREFIXES):  # noqa: PLR2004
            return _nothing_there(request.method, path)
        if error.status_code == 405:  # noqa: PLR2004  (the framework names one of its routes' methods only)
            headers["Allow"] = ", ".join(_methods(routes, path))
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(
            error.status_code, "http_error"
        )
        return error_response(error.status_code, code, _message(request, error, headers), headers=headers)

    app.add_exception_handler(ClientDisconnect, _left)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        _log.error("request_failed", path=request.url.path, exc_info=error)
        return error_response(500, "internal_error", "the daemon failed; its log says more")


def _message(request: Request, error: HTTPException, headers: Mapping[str, str]) -> str:
    """Return what is wrong with a request; the framework's own words name neither path nor method."""
    path = without_secrets(request.url.path)
    if error.status_code == 404:  # noqa: PLR2004
        return f"there is no {request.method} {path}"
    if error.status_code == 405:  # noqa: PLR2004
        return f"{path} is not for {request.method}; allowed: {headers['Allow']}"
    return str(error.detail)


async def _left(_request: Request, _error: Exception) -> Response:
    """End a request whose client left while it sent the body: nobody gets this answer."""
    return Response(status_code=400)


def _nothing_there(method: str, path: str) -> Response:
    """What a caller of Ollama or OpenAI is told where neither has anything."""
    dialect = spoken_at(path)
    if dialect is None:
        return Response(b"404 page not found", 404, media_type=None, headers={"Content-Type": "text/plain"})
    body, kind = error_body(dialect, 404, f"there is no {method} {without_secrets(path)}")
    return Response(body, 404, headers={"Content-Type": kind.decode()})


def _methods(routes: list[BaseRoute], path: str) -> list[str]:
    matching = [route for route in routes if isinstance(route, APIRoute) and route.path_regex.match(path)]
    return sorted({method for route in matching for method in route.methods or ()})
