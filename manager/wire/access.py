"""Who may ask: the Host a request names, the page it comes from, the key it carries."""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manager.wire.ollama_routes import spoken_at

if TYPE_CHECKING:
    from collections.abc import Collection

    from manager.wire.head import Header

WITHOUT_KEY = ("/healthz",)
# A name or a bracketed address, perhaps with the dot of the root, perhaps with a port.
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s\[\]:@/]+?)\.?(?::[0-9]{1,5})?")
_MOST_REMEMBERED = 256
_FORBIDDEN = 403
_METHODS = b"GET, HEAD, POST, DELETE"
_READABLE = b"X-Request-Id, X-Instance, X-Model, X-Fallback-Reason, X-Queue-Ms, X-Start-Ms"


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    code: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)


class Access:
    """The one check of every request, whichever way it is served.

    A page in a browser can send requests to this machine: under a name of its own that resolves to it
    (hence the Host check), or across origins (hence the Origin check). Pages of this machine may use models
    and read the answers, as with Ollama itself; the control API is for pages that come from it.

    Args:
        allowed_hosts: names without a port, IPv6 in brackets, in lower case.
        key: what an operator must present, None when none is configured.
        allowed_origins: of other pages that may use models; a `*` at the end stands for anything.
    """

    def __init__(
        self, *, allowed_hosts: Collection[str], key: str | None, allowed_origins: Collection[str] = ()
    ) -> None:
        self._allowed_hosts = frozenset(allowed_hosts)
        self._allowed_origins = tuple(origin.encode() for origin in allowed_origins)
        self._key = key.encode() if key is not None else None
        self._seen: set[bytes] = set()

    @property
    def wants_key(self) -> bool:
        return self._key is not None

    def refusal(self, path: str, headers: list[Header], *, asks_first: bool = False) -> Refusal | None:
        """Why a request must not be served; None when it may.

        Args:
            path: without the query.
            headers: names in lower case.
            asks_first: a browser asks whether a page may send a request; it never shows a key for that.
        """
        hosts = [value for name, value in headers if name == b"host"]
        # The parser lets a missing and a doubled Host pass.
        if len(hosts) != 1 or not self._allows(hosts[0]):
            named = ", ".join(host.decode("latin-1") for host in hosts)
            return Refusal(
                _FORBIDDEN,
                "host_not_allowed",
                f"Host {named!r} is not in server.allowed_hosts of the configuration",
            )
        for name, value in headers:
            if name == b"origin" and not self._allows_origin(value, path, hosts[0]):
                origin = value.decode("latin-1")
                why = (
                    "is not in server.allowed_hosts or server.allowed_origins"
                    if spoken_at(path)
                    else "is not this server itself, whose control is open to no other page"
                )
                return Refusal(_FORBIDDEN, "origin_not_allowed", f"Origin {origin!r} {why}")
        if asks_first:
            return None
        if self._key is not None and path not in WITHOUT_KEY and not _has_key(headers, self._key):
            return Refusal(
                401,
                "key_required",
                "present the operator key as `Authorization: Bearer …` or `X-API-Key: …`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _allows_origin(self, origin: bytes, path: str, host: bytes) -> bool:
        scheme, separator, name = origin.partition(b"://")
        of_web = scheme in (b"http", b"https") and bool(separator)
        if spoken_at(path) is None:
            return of_web and name.lower() == host.strip().lower()
        return (of_web and self._allows(name)) or any(
            origin.startswith(allowed[:-1]) if allowed.endswith(b"*") else origin == allowed
            for allowed in self._allowed_origins
        )

    def _allows(self, host: bytes) -> bool:
        if host in self._seen:
            return True
        match = _HOST.fullmatch(host.decode("latin-1").strip().lower())
        if match is None or match["name"] not in self._allowed_hosts:
            return False
        if len(self._seen) < _MOST_REMEMBERED:
            self._seen.add(host)
        return True


def for_pages(headers: list[Header], refusal: Refusal | None) -> list[Header]:
    """What lets a page in a browser read an answer; nothing for others, and for pages that must not.

    Args:
        headers: of the request, names in lower case.
        refusal: what came of the check.
    """
    origin = next((value for name, value in headers if name == b"origin"), None)
    if origin is None or (refusal is not None and refusal.status == _FORBIDDEN):
        return []
    return [
        (b"Access-Control-Allow-Origin", origin),
        (b"Access-Control-Expose-Headers", _READABLE),
        (b"Vary", b"Origin"),
    ]


def permission(headers: list[Header]) -> list[Header] | None:
    """What a browser is told that asks whether a page may send a request, beside `for_pages`.

    None where none asks.

    Args:
        headers: of the request with the method OPTIONS, names in lower case.
    """
    given = dict(headers)
    if b"origin" not in given or b"access-control-request-method" not in given:
        return None
    return [
        (b"Access-Control-Allow-Methods", _METHODS),
        (b"Access-Control-Allow-Headers", given.get(b"access-control-request-headers", b"")),
        (b"Access-Control-Max-Age", b"600"),
    ]


def _has_key(headers: list[Header], key: bytes) -> bool:
    presented = next((value for name, value in headers if name == b"x-api-key"), b"")
    for name, value in headers:
        scheme, _, bearer = value.partition(b" ")
        if name == b"authorization" and scheme.lower() == b"bearer":
            presented = bearer.strip()
    # Its time must not tell how much of a guess was right.
    return hmac.compare_digest(presented, key)
