"""Who may ask: the Host a request names, the page it comes from, the key it carries."""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from manager.wire.head import Header

WITHOUT_KEY = ("/healthz",)
# A name or a bracketed address, perhaps with the dot of the root, perhaps with a port.
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s\[\]:@/]+?)\.?(?::[0-9]{1,5})?")
_MOST_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    code: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)


class Access:
    """The one check of every request, whichever way it is served.

    A page in a browser can send requests to this machine: under a name of its own that resolves to it
    (hence the Host check), or across origins (hence the Origin check).

    Args:
        allowed_hosts: names without a port, IPv6 in brackets, in lower case.
        key: what an operator must present, None when none is configured.
    """

    def __init__(self, *, allowed_hosts: Collection[str], key: str | None) -> None:
        self._allowed_hosts = frozenset(allowed_hosts)
        self._key = key.encode() if key is not None else None
        self._seen: set[bytes] = set()

    @property
    def wants_key(self) -> bool:
        return self._key is not None

    def refusal(self, path: str, headers: list[Header]) -> Refusal | None:
        """Why a request must not be served; None when it may.

        Args:
            path: without the query.
            headers: names in lower case.
        """
        hosts = [value for name, value in headers if name == b"host"]
        # The parser lets a missing and a doubled Host pass.
        if len(hosts) != 1 or not self._allows(hosts[0]):
            named = ", ".join(host.decode("latin-1") for host in hosts)
            return Refusal(
                403,
                "host_not_allowed",
                f"Host {named!r} is not in server.allowed_hosts of the configuration",
            )
        for name, value in headers:
            if name == b"origin" and not self._allows_origin(value):
                origin = value.decode("latin-1")
                return Refusal(403, "origin_not_allowed", f"Origin {origin!r} is not in server.allowed_hosts")
        if self._key is not None and path not in WITHOUT_KEY and not _has_key(headers, self._key):
            return Refusal(
                401,
                "key_required",
                "present the operator key as `Authorization: Bearer …` or `X-API-Key: …`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _allows_origin(self, origin: bytes) -> bool:
        scheme, separator, name = origin.partition(b"://")
        return scheme in (b"http", b"https") and bool(separator) and self._allows(name)

    def _allows(self, host: bytes) -> bool:
        if host in self._seen:
            return True
        match = _HOST.fullmatch(host.decode("latin-1").strip().lower())
        if match is None or match["name"] not in self._allowed_hosts:
            return False
        if len(self._seen) < _MOST_REMEMBERED:
            self._seen.add(host)
        return True


def _has_key(headers: list[Header], key: bytes) -> bool:
    presented = next((value for name, value in headers if name == b"x-api-key"), b"")
    for name, value in headers:
        scheme, _, bearer = value.partition(b" ")
        if name == b"authorization" and scheme.lower() == b"bearer":
            presented = bearer.strip()
    # Its time must not tell how much of a guess was right.
    return hmac.compare_digest(presented, key)
