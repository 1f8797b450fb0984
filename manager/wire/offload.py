"""Requests that ask for their model to be computed by the processor: `options.num_gpu` of zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from manager.wire.routes import Dialect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.roles import BodyChanges
    from manager.wire.body import Fields
    from manager.wire.routes import Route

_OPTIONS = "options"
# The number of layers on a GPU. Source: Ollama `api/types.go`, Runner; -1 leaves it to the server.
_LAYERS = "num_gpu"
_MOST_BYTES = 65536


def asks_for_cpu(fields: Fields, route: Route, changes: BodyChanges) -> bool:
    """Whether a request, as it is sent on with `changes`, asks for no layer on a GPU.

    Only Ollama's own routes read options. Options beyond 64 KiB are not looked into.
    """
    if route.dialect is not Dialect.NATIVE:
        return False
    for options in (changes.overrides.get(_OPTIONS), _client_options(fields), changes.defaults.get(_OPTIONS)):
        if isinstance(options, dict) and _LAYERS in options:
            layers = options[_LAYERS]
            return isinstance(layers, int | float) and not isinstance(layers, bool) and layers == 0
    return False


def _client_options(fields: Fields) -> Mapping[str, object] | None:
    value = fields.get(_OPTIONS)
    if value is None or len(value) > _MOST_BYTES:
        return None
    text = bytes(memoryview(value))
    if _LAYERS.encode() not in text:
        return None
    try:
        options = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None  # the server refuses the document for it
    return options if isinstance(options, dict) else None
