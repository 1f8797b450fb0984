"""Access control: the Host a request names, the page it comes from, the key it presents."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manager.wire.hosts import host_name, is_fixed, is_local
from manager.wire.ollama_routes import spoken_at
from manager.wire.origins import Origins

if TYPE_CHECKING:
    from collections.abc import Collection

    from manager.wire.head import Header

WITHOUT_KEY = ("/healthz",)
# Every `Refusal.reason`: they are labels of a metric.
REASONS = (
    "ambiguous",
    "host_missing",
    "host_repeated",
    "host_not_allowed",
    "origin_not_allowed",
    "key_missing",
    "key_wrong",
)
_MOST_REMEMBERED = 256
# A request may present so many keys: one guess in each of a thousand headers would be a thousand guesses.
_MOST_KEYS = 8
_BAD_REQUEST = 400
_UNAUTHORIZED = 401
_FORBIDDEN = 403
_METHODS = b"GET, HEAD, POST, DELETE"
_READABLE = b"X-Request-Id, X-Instance, X-Model, X-Provider, X-Fallback-Reason, X-Queue-Ms, X-Start-Ms"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a request that is not served; `reason` is one of `REASONS`, for logs and metrics."""

    status: int
    code: str
    message: str
    reason: str
    headers: dict[str, str] = field(default_factory=dict)


class Access:
    """The one check of every request, on the relay and on all other routes.

    A page in a browser can reach this machine in two ways: under a name of its own that it has resolved to
    this machine (the Host check refuses that), and across origins (the Origin check). Pages of this machine,
    and of the origins that Ollama allows, may use Ollama's routes and read the answers. The control API
    serves only pages that come from the daemon itself.

    Args:
        allowed_hosts: names without a port, IPv6 in brackets, in lower case. Names that only this machine or
            its network can mean are allowed besides (`manager.wire.hosts`).
        key: the operator's key; None when none is configured.
        allowed_origins: patterns of other pages that may use Ollama's routes (`manager.wire.origins`).
        own_names: names of this machine, allowed as hosts.
        any_host: allow every Host. Safe where a key is required, since no page has the key.

    Attributes:
        version: grows with each change of the rules.
    """

    version = 0

    def __init__(
        self,
        *,
        allowed_hosts: Collection[str],
        key: str | None,
        allowed_origins: Collection[str] = (),
        own_names: Collection[str] = (),
        any_host: bool = False,
    ) -> None:
        self.configure(
            allowed_hosts=allowed_hosts,
            key=key,
            allowed_origins=allowed_origins,
            own_names=own_names,
            any_host=any_host,
        )

    def configure(
        self,
        *,
        allowed_hosts: Collection[str],
        key: str | None,
        allowed_origins: Collection[str] = (),
        own_names: Collection[str] = (),
        any_host: bool = False,
    ) -> None:
        """Replace everything, for all requests from now on. The arguments are those of the class."""
        self._configured = frozenset(allowed_hosts)
        self._named = self._configured | {name.lower() for name in own_names}
        self._any_host = any_host and key is not None
        self._origins = Origins(tuple(allowed_origins))
        self._key = key.encode() if key is not None else None
        self._seen: set[bytes] = set()
        self.version += 1

    @property
    def wants_key(self) -> bool:
        return self._key is not None

    def refusal(
        self, path: str, headers: list[Header], *, preflight: bool = False, needs_host: bool = True
    ) -> Refusal | None:
        """Return why a request must not be served, or None.

        Args:
            path: in its normal form, without the query.
            headers: names in lower case.
            preflight: a browser asks whether a page may send a request; it presents no key for that.
            needs_host: False for HTTP/1.0, whose requests may come without a Host.
        """
        hosts = [value for name, value in headers if name == b"host"]
        host = hosts[0] if hosts else b""
        return (
            self._host_refusal(hosts, needs_host=needs_host)
            or self._origin_refusal(path, headers, host)
            or (None if preflight or path in WITHOUT_KEY else self._key_refusal(headers))
        )

    def addressed(self, headers: list[Header], authority: bytes, *, needs_host: bool = True) -> list[Header]:
        """Return the headers of a request with a target in absolute form, whose authority replaces Host.

        A Host that is not allowed stays, and a missing one is not supplied where one is needed, so that
        `refusal` finds them: both the Host and the authority have to be allowed.

        Args:
            headers: names in lower case.
            authority: of the target.
            needs_host: as for `refusal`.
        """
        if not needs_host and not any(name == b"host" for name, _ in headers):
            return [(b"host", authority), *headers]
        return [
            (name, authority if name == b"host" and self._allows(value) else value) for name, value in headers
        ]

    def _host_refusal(self, hosts: list[bytes], *, needs_host: bool) -> Refusal | None:
        if len(hosts) > 1:
            return _bad_request("host_repeated", "host is given more than once")
        if not hosts:
            return _bad_request("host_missing", "a request needs a Host header") if needs_host else None
        if self._allows(hosts[0]):
            return None
        named = hosts[0].decode("latin-1")
        return _forbidden(
            "host_not_allowed",
            f"Host {named!r} is not in server.allowed_hosts of the configuration, and is no name that only "
            "this machine can have",
        )

    def _origin_refusal(self, path: str, headers: list[Header], host: bytes) -> Refusal | None:
        for name, value in headers:
            if name == b"origin" and not self._allows_origin(value, path, host):
                why = (
                    "is not in server.allowed_hosts or server.allowed_origins"
                    if spoken_at(path)
                    else "is not this server itself, whose control is open to no other page"
                )
                return _forbidden("origin_not_allowed", f"Origin {value.decode('latin-1')!r} {why}")
        return None

    def _key_refusal(self, headers: list[Header]) -> Refusal | None:
        if self._key is None:
            return None
        presented = presented_keys(headers)
        # All are compared, and in constant time: the time must not tell how much of a guess was right.
        if any([hmac.compare_digest(one, self._key) for one in presented]):  # noqa: C419
            return None
        what, reason = ("the key is wrong", "key_wrong") if any(presented) else ("no key", "key_missing")
        return Refusal(
            _UNAUTHORIZED,
            "key_required",
            f"{what}: present the operator key as `Authorization: Bearer …` or `X-API-Key: …`",
            reason,
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _allows_origin(self, origin: bytes, path: str, host: bytes) -> bool:
        scheme, _, authority = origin.partition(b"://")
        of_web = scheme in (b"http", b"https") and bool(authority)
        is_here = of_web and authority.lower() == host.strip().lower()
        name = host_name(authority.decode("latin-1")) if of_web else None
        if spoken_at(path) is None:
            # A page of `x.local` is not trusted with this: another machine of the network may have the name.
            return is_here and name is not None and (self._any_host or self._is_certain(name))
        return is_here or name in self._configured or self._origins.allow(origin)

    def _allows(self, host: bytes) -> bool:
        if host in self._seen:
            return True
        text = host.decode("latin-1").strip()
        name = host_name(text)
        # No Host and an empty one come from no browser.
        if text and (name is None or not (self._any_host or self._is_certain(name) or is_local(name))):
            return False
        if len(self._seen) < _MOST_REMEMBERED:
            self._seen.add(host)
        return True

    def _is_certain(self, name: str) -> bool:
        return name in self._named or is_fixed(name)


def presented_keys(headers: list[Header]) -> list[bytes]:
    """Return the keys that a request presents, in the order of its headers; any of them may be the right one.

    Args:
        headers: names in lower case.
    """
    keys: list[bytes] = []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value)
        elif name == b"authorization":
            scheme, _, bearer = value.partition(b" ")
            if scheme.lower() == b"bearer":
                keys.append(bearer.strip())
    return keys[:_MOST_KEYS]


def for_pages(headers: list[Header], refusal: Refusal | None) -> list[Header]:
    """Return the headers that let a page in a browser read an answer; none where no page may.

    Args:
        headers: of the request, names in lower case.
        refusal: the result of the check.
    """
    origin = next((value for name, value in headers if name == b"origin"), None)
    if origin is None or (refusal is not None and refusal.status != _UNAUTHORIZED):
        return []
    return [
        (b"Access-Control-Allow-Origin", origin),
        (b"Access-Control-Expose-Headers", _READABLE),
        (b"Vary", b"Origin"),
    ]


def permission(headers: list[Header]) -> list[Header] | None:
    """Return the headers of the answer to a preflight request, beside `for_pages`; None if it is none.

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


def ambiguous(why: str) -> Refusal:
    """Return the refusal of a request that two readers could frame differently (`manager.wire.head`)."""
    return _bad_request("ambiguous", why)


def _bad_request(reason: str, message: str) -> Refusal:
    return Refusal(_BAD_REQUEST, "bad_request", message, reason)


def _forbidden(code: str, message: str) -> Refusal:
    return Refusal(_FORBIDDEN, code, message, code)
