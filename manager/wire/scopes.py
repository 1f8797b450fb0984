"""The scope that each route needs: one table for the relay and all other routes."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.keys import Scope
from manager.wire.routes import INFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Open to everybody who may name this host.
WITHOUT_KEY = frozenset({"/healthz", "/sign-in"})
# The looks of the page: the form to sign in has them too.
FILES_WITHOUT_KEY = "/ui/static/"

_ANY: tuple[Scope, ...] = ()
_CLIENT, _READ, _OPERATOR, _ADMIN = (Scope.CLIENT,), (Scope.READ,), (Scope.OPERATOR,), (Scope.ADMIN,)
_LISTS = (Scope.CLIENT, Scope.READ)
# A key without the scope `operator` sees its own runs only (`api.runs`).
_RUN = (Scope.CLIENT, Scope.OPERATOR)
_COMPUTE = "/api/runtime/compute"
_INSTANCE = f"{_COMPUTE}/instances/{{id}}"
_RUNS = "/api/v1/runs"
_KEYS = "/api/v1/keys"
_COLLECTIONS = "/api/v1/collections"
_LLM = "/api/v1/llm"
_COLLECTION = f"{_COLLECTIONS}/{{name}}"
_CLUSTER = "/v1/cluster"

# Methods, path, and the scopes of which a key needs one; none is any key. `{name}` is one segment of a path,
# `{name*}` several. An account of ollama.com belongs to the operator: requests in its name need that scope.
TABLE: tuple[tuple[str, str, tuple[Scope, ...]], ...] = (
    ("GET HEAD", "/", _ANY),
    ("GET HEAD", "/api/version", _ANY),
    ("POST", "/sign-out", _ANY),
    *(("POST", path.decode(), _CLIENT) for path in INFERENCE),
    ("POST", "/v1/audio/transcriptions", _CLIENT),
    ("GET HEAD", "/api/tags", _LISTS),
    ("GET", "/api/ps", _LISTS),
    ("POST", "/api/show", _LISTS),
    ("GET", "/api/status", _LISTS),
    ("GET", "/api/experimental/model-recommendations", _LISTS),
    ("GET", "/v1/models", _LISTS),
    ("GET", "/v1/models/{model*}", _LISTS),
    ("POST", _RUNS, _CLIENT),
    ("GET", _RUNS, _RUN),
    ("DELETE GET", f"{_RUNS}/{{id}}", _RUN),
    ("GET", f"{_RUNS}/{{id}}/result", _RUN),
    # A client writes and finds items. What others use is made, changed and removed by operators.
    ("GET", _COLLECTIONS, _LISTS),
    ("POST", _COLLECTIONS, _OPERATOR),
    ("GET", _COLLECTION, _LISTS),
    ("DELETE", _COLLECTION, _OPERATOR),
    ("GET", f"{_COLLECTION}/items", _LISTS),
    ("PUT", f"{_COLLECTION}/items", _CLIENT),
    ("GET", f"{_COLLECTION}/items/{{id}}", _LISTS),
    ("DELETE", f"{_COLLECTION}/items/{{id}}", _CLIENT),
    ("POST", f"{_COLLECTION}/query", _CLIENT),
    ("GET", f"{_COLLECTION}/versions", _LISTS),
    ("DELETE", f"{_COLLECTION}/versions/{{version}}", _OPERATOR),
    ("POST", f"{_COLLECTION}/cutover", _OPERATOR),
    ("POST", f"{_COLLECTION}/rollback", _OPERATOR),
    ("GET", f"{_COLLECTION}/backfill", _LISTS),
    ("POST", f"{_COLLECTION}/backfill", _OPERATOR),
    *(("POST", f"{_COLLECTION}/backfill/{verb}", _OPERATOR) for verb in ("pause", "resume", "cancel")),
    *(("POST", f"{_LLM}/{name}", _CLIENT) for name in ("sentiment", "classify", "chat", "ensemble")),
    ("GET", f"{_LLM}/models", _LISTS),
    ("GET", f"{_LLM}/routing-stats", _READ),
    ("POST", "/api/pull", _OPERATOR),
    ("POST", "/api/push", _OPERATOR),
    ("POST", "/api/create", _OPERATOR),
    ("POST", "/api/copy", _OPERATOR),
    ("DELETE", "/api/delete", _OPERATOR),
    ("HEAD POST", "/api/blobs/{digest}", _OPERATOR),
    ("POST", "/api/me", _OPERATOR),
    ("POST", "/api/signout", _OPERATOR),
    ("POST", "/api/experimental/web_search", _OPERATOR),
    ("POST", "/api/experimental/web_fetch", _OPERATOR),
    ("DELETE", "/api/user/keys/{key}", _OPERATOR),
    ("GET", "/readyz", _READ),
    ("GET", "/metrics", _READ),
    ("GET HEAD", "/openapi.json", _READ),
    ("GET", "/docs", _READ),
    ("GET", "/docs/oauth2-redirect", _READ),
    ("GET HEAD", "/static-offline-docs/{file*}", _READ),
    # Pages: each shows what the key of its viewer may see (`web.page.Page.scope`).
    ("GET", "/ui", _ANY),
    ("GET", "/ui/live", _READ),
    ("GET", "/ui/instances", _READ),
    ("GET", "/ui/gpus", _READ),
    ("GET", "/ui/models", _READ),
    ("GET", "/ui/collections", _READ),
    ("GET", "/ui/roles", _READ),
    ("GET", "/ui/requests", _READ),
    # What the key may see of them: all, its own, or the schedules alone.
    ("GET", "/ui/runs", _ANY),
    ("GET", "/ui/usage", _READ),
    ("GET", "/ui/keys", _ADMIN),
    ("GET", "/ui/try", _CLIENT),
    ("GET", f"{_COMPUTE}/instances", _READ),
    ("GET", _INSTANCE, _READ),
    ("GET", f"{_INSTANCE}/logs", _READ),
    ("GET", f"{_COMPUTE}/gpus", _READ),
    ("GET", f"{_COMPUTE}/gpus/history", _READ),
    ("GET", f"{_COMPUTE}/orphans", _READ),
    ("GET", f"{_COMPUTE}/events", _READ),
    ("GET", f"{_COMPUTE}/live", _READ),
    ("GET", f"{_COMPUTE}/models", _READ),
    ("GET", f"{_COMPUTE}/lanes", _READ),
    ("GET", f"{_COMPUTE}/schedules", _READ),
    ("GET", f"{_COMPUTE}/routing", _READ),
    ("POST", f"{_COMPUTE}/routing/explain", _READ),
    ("GET", f"{_COMPUTE}/explain", _READ),
    ("GET", f"{_COMPUTE}/requests", _READ),
    ("GET", f"{_COMPUTE}/requests/{{id}}", _READ),
    *(("GET", f"{_CLUSTER}/{view}", _READ) for view in ("hosts", "services", "roles", "health")),
    ("POST", f"{_CLUSTER}/routes/match", _READ),
    ("GET", f"{_CLUSTER}/routes/resolve", _READ),
    ("GET", "/api/settings/models", _READ),
    ("GET", "/api/settings/models/effective", _READ),
    ("GET", "/api/v1/usage", _READ),
    ("GET", "/api/v1/budgets", _READ),
    ("PATCH", _INSTANCE, _OPERATOR),
    *(
        ("POST", f"{_INSTANCE}/{name}", _OPERATOR)
        for name in (
            "start",
            "stop",
            "drain",
            "resume",
            "lift",
            "load",
            "unload",
            "upgrade",
            "rollback",
            "restart",
            "breaker/reset",
        )
    ),
    ("DELETE", f"{_INSTANCE}/lift", _OPERATOR),
    ("POST", f"{_COMPUTE}/models/pulls", _OPERATOR),
    ("DELETE", f"{_COMPUTE}/models/pulls/{{id}}", _OPERATOR),
    ("POST", f"{_COMPUTE}/reap", _OPERATOR),
    ("POST", f"{_COMPUTE}/pull", _OPERATOR),
    ("POST", f"{_COMPUTE}/routing", _OPERATOR),
    ("DELETE", f"{_COMPUTE}/requests/{{id}}", _OPERATOR),
    ("POST", "/api/settings/models", _OPERATOR),
    ("GET POST", _KEYS, _ADMIN),
    ("DELETE", f"{_KEYS}/{{name}}", _ADMIN),
    ("POST", f"{_KEYS}/{{name}}/rotate", _ADMIN),
)


class _Pattern(NamedTuple):
    match: re.Pattern[str]
    scopes: Mapping[str, tuple[Scope, ...]]


def scopes_of(method: str, path: str) -> tuple[Scope, ...] | None:
    """Return the scopes of which a request needs one; none is any key, None is no such route.

    Args:
        method: in capitals.
        path: in its normal form, decoded.
    """
    methods = _methods(path)
    return None if methods is None else methods.get(method)


def methods_at(path: str) -> tuple[str, ...]:
    """Return the methods that a path has; none where there is no such path."""
    return tuple(_methods(path) or ())


def _methods(path: str) -> Mapping[str, tuple[Scope, ...]] | None:
    literal = _LITERAL.get(path)
    if literal is not None:
        return literal
    return next((one.scopes for one in _PATTERNS if one.match.fullmatch(path)), None)


def _by_path() -> dict[str, dict[str, tuple[Scope, ...]]]:
    found: dict[str, dict[str, tuple[Scope, ...]]] = {}
    for methods, path, scopes in TABLE:
        found.setdefault(path, {}).update(dict.fromkeys(methods.split(), scopes))
    return found


def _patterns() -> Iterator[_Pattern]:
    for path, scopes in _by_path().items():
        if "{" in path:
            regex = re.sub(r"\\\{\w+(\\\*)?\\\}", lambda part: ".+" if part[1] else "[^/]+", re.escape(path))
            yield _Pattern(re.compile(regex), scopes)


_LITERAL: Mapping[str, Mapping[str, tuple[Scope, ...]]] = MappingProxyType(
    {path: scopes for path, scopes in _by_path().items() if "{" not in path}
)
_PATTERNS = tuple(_patterns())
