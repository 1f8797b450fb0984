"""Every route of Ollama, and in whose words a caller of a path expects its errors."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from manager.wire.routes import INFERENCE, Dialect, dialect_of

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOB_PREFIX = "/api/blobs/"
MODEL_PREFIX = "/v1/models/"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
_OPENAI_PREFIX = "/v1/"
# Nothing that a server could take for a way to another route: these paths are passed on as they came.
_DIGEST = re.compile(r"[A-Za-z0-9:_-]+")

# In the order in which `Allow` names them.
_READ = ("GET", "HEAD")
_METHODS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "/": _READ,
        "/api/version": _READ,
        "/api/tags": _READ,
        "/api/ps": ("GET",),
        "/api/show": ("POST",),
        "/api/pull": ("POST",),
        "/api/push": ("POST",),
        "/api/create": ("POST",),
        "/api/copy": ("POST",),
        "/api/delete": ("DELETE",),
        "/v1/models": ("GET",),
        TRANSCRIPTIONS: ("POST",),
        **{path.decode(): ("POST",) for path in INFERENCE},
    }
)


def methods_of(path: str) -> tuple[str, ...] | None:
    """What may be done with a path of Ollama's, None when Ollama has no such path.

    Source: Ollama 0.33, `server/routes.go` GenerateRoutes.
    """
    if path.startswith(BLOB_PREFIX):
        return ("POST", "HEAD") if _DIGEST.fullmatch(path, len(BLOB_PREFIX)) else None
    if path.startswith(MODEL_PREFIX):
        return ("GET",) if path != MODEL_PREFIX else None
    return _METHODS.get(path)


def spoken_at(path: str) -> Dialect | None:
    """The dialect of a path, None where it belongs to the manager's own API or to nobody."""
    if path.startswith(_OPENAI_PREFIX) or methods_of(path) is not None:
        return dialect_of(path)
    return None
