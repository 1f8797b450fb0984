"""The routes of Ollama and OpenAI beside inference, above all the lists of all instances."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

import structlog

from manager.api.answers import TEXT, answer, answer_error, answer_json, answer_wrong_method
from manager.api.granted import permit_of
from manager.api.management import Management
from manager.api.raw import RawPassing
from manager.api.transcription import Transcription
from manager.domain.wording import model_not_found
from manager.wire.listing import (
    Alias,
    alias_document,
    model_document,
    models_document,
    ps_document,
    tags_document,
)
from manager.wire.ollama_routes import (
    MODEL_PREFIX,
    RECOMMENDATIONS,
    STATUS,
    TRANSCRIPTIONS,
    methods_of,
    spoken_at,
)
from manager.wire.routes import Dialect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

    from manager.api.backend import Backend

    Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = structlog.get_logger("gateway")

_PAGES = "/ui"


class OllamaApi:
    """ASGI middleware: answers what is Ollama's, and passes everything else on.

    Args:
        app: everything else.
        backend: what the routes need of the daemon.
        routes: what that consists of; pages for people may be among it.
    """

    def __init__(self, app: ASGIApp, *, backend: Backend, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._catalogue = backend.passing.catalogue
        self._management = Management(backend.passing)
        self._raw = RawPassing(backend.passing)
        transcription = Transcription(backend.passing)
        self._routes = routes
        self._handlers: dict[str, Handler] = {
            "/": self._root,
            "/api/version": self._version,
            "/api/tags": self._tags,
            "/api/ps": self._ps,
            STATUS: self._status,
            RECOMMENDATIONS: self._recommendations,
            "/v1/models": self._models,
            TRANSCRIPTIONS: transcription,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._raw.may_serve(scope) and not self._is_for_page(scope):
            body = await self._raw.serve(scope, receive, send)
            if body is None:
                return
            receive = body
        methods = methods_of(scope["path"]) if scope["type"] == "http" else None
        if methods is None:
            await self._app(scope, receive, send)
            return
        if scope["method"] not in methods:
            await answer_wrong_method(send, methods)
            return
        handler = self._handler(scope["path"])
        if handler is None:
            await self._app(scope, receive, send)
            return
        try:
            await handler(scope, receive, send)
        except Exception as error:  # noqa: BLE001  (a defect: the caller gets an answer in its own words)
            _log.error("request_failed", path=scope["path"], exc_info=error)
            dialect = spoken_at(scope["path"]) or Dialect.NATIVE
            await answer_error(send, dialect, 500, "the manager failed; its log says more")

    def _handler(self, path: str) -> Handler | None:
        if path.startswith(MODEL_PREFIX):
            return self._model
        if self._management.serves(path):
            return self._management
        return self._handlers.get(path)

    def _is_for_page(self, scope: Scope) -> bool:
        """Return whether a browser asks for the page of the manager."""
        return (
            scope["path"] == "/"
            and _wants_page(scope)
            and any(getattr(route, "path", None) == _PAGES for route in self._routes)
        )

    async def _root(self, scope: Scope, _receive: Receive, send: Send) -> None:
        if self._is_for_page(scope):
            await answer(send, 307, None, b"", [(b"Location", _PAGES.encode())])
            return
        await answer(send, 200, TEXT, b"Ollama is running")

    async def _version(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await answer_json(send, {"version": self._catalogue.version()}, Dialect.NATIVE)

    async def _status(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Whether models of ollama.com can be used; command lines and menus ask."""
        disabled = self._catalogue.is_cloud_disabled()
        cloud = {"disabled": disabled, "source": "env" if disabled else "none"}
        await answer_json(send, {"cloud": cloud}, Dialect.NATIVE)

    async def _recommendations(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """None: the ones of ollama.com are not asked for, and menus add the models that are installed."""
        await answer_json(send, {"recommendations": []}, Dialect.NATIVE)

    async def _tags(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await self._catalogue.refresh(lists=True)
        permit = permit_of(scope)
        document = tags_document(self._catalogue.models(permit), self._catalogue.listed_aliases(permit))
        await answer_json(send, document, Dialect.NATIVE)

    async def _ps(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await self._catalogue.refresh(lists=False)
        await answer_json(send, ps_document(self._catalogue.loaded(permit_of(scope))), Dialect.NATIVE)

    async def _models(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await self._catalogue.refresh(lists=True)
        permit = permit_of(scope)
        document = models_document(self._catalogue.models(permit), self._catalogue.aliases(permit))
        await answer_json(send, document, Dialect.OPENAI)

    async def _model(self, scope: Scope, _receive: Receive, send: Send) -> None:
        # Names hold slashes, which clients may escape.
        name = unquote(scope["raw_path"].decode()).removeprefix(MODEL_PREFIX)
        await self._catalogue.refresh(lists=True)
        found = self._catalogue.find(name, permit_of(scope))
        if found is None:
            await answer_error(send, Dialect.OPENAI, 404, model_not_found(name))
        elif isinstance(found, Alias):
            await answer_json(send, alias_document(found), Dialect.OPENAI)
        else:
            await answer_json(send, model_document(name, found), Dialect.OPENAI)


def _wants_page(scope: Scope) -> bool:
    """Whether the caller would rather have a page than anything else, as browsers do."""
    accepted = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    first: bytes = accepted.split(b",")[0].split(b";")[0]
    return first.strip().lower() == b"text/html"
