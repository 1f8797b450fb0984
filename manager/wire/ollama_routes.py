"""The route table of Ollama, and the dialect in which the client of a path expects its errors."""

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
USER_KEY_PREFIX = "/api/user/keys/"
# What an account of ollama.com is needed for: only an instance has the key pair that signs these requests.
ACCOUNT = frozenset(
    {"/api/me", "/api/signout", "/api/experimental/web_search", "/api/experimental/web_fetch"}
)
RECOMMENDATIONS = "/api/experimental/model-recommendations"
STATUS = "/api/status"
_OPENAI_PREFIX = "/v1/"
# The control API's own, beside those of OpenAI.
CLUSTER_PREFIX = "/v1/cluster/"
# These paths are passed on: nothing in them may lead an upstream to another route.
_DIGEST = re.compile(r"[A-Za-z0-9:_-]+")
_USER_KEY = re.compile(r"[A-Za-z0-9_=-]+")

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
        STATUS: ("GET",),
        RECOMMENDATIONS: ("GET",),
        "/v1/models": ("GET",),
        TRANSCRIPTIONS: ("POST",),
        **dict.fromkeys(sorted(ACCOUNT), ("POST",)),
        **{path.decode(): ("POST",) for path in INFERENCE},
    }
)


def methods_of(path: str) -> tuple[str, ...] | None:
    """Return the methods that a path of Ollama has, or None where Ollama has no such path.

    Source: Ollama at fb307609 (2026-08-21, after 0.33), `server/routes.go` GenerateRoutes.

    Args:
        path: in its normal form.
    """
    if path.startswith(BLOB_PREFIX):
        return ("POST", "HEAD") if _DIGEST.fullmatch(path, len(BLOB_PREFIX)) else None
    if path.startswith(USER_KEY_PREFIX):
        return ("DELETE",) if _USER_KEY.fullmatch(path, len(USER_KEY_PREFIX)) else None
    if path.startswith(MODEL_PREFIX):
        return ("GET",) if path != MODEL_PREFIX else None
    return _METHODS.get(path)


def spoken_at(path: str) -> Dialect | None:
    """Return the dialect of a path, or None where it belongs to the control API or does not exist."""
    if path.startswith(CLUSTER_PREFIX):
        return None
    if path.startswith(_OPENAI_PREFIX) or methods_of(path) is not None:
        return dialect_of(path)
    return None
