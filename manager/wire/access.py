"""Access control: the Host a request names, the page it comes from, the key it presents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.keys import Scope
from manager.wire.hosts import host_name, is_fixed, is_local
from manager.wire.keys import Keys, digest_of, presented, session_of, without_secrets
from manager.wire.ollama_routes import spoken_at
from manager.wire.origins import Origins
from manager.wire.scopes import FILES_WITHOUT_KEY, WITHOUT_KEY, methods_at, scopes_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from manager.domain.keys import Grant
    from manager.wire.head import Header

# Every `Refusal.reason`: they are labels of a metric.
REASONS = (
    "ambiguous",
    "host_missing",
    "host_repeated",
    "host_not_allowed",
    "origin_not_allowed",
    "key_missing",
    "key_wrong",
    "keys_differ",
    "scope_missing",
    "no_route",
)
# A page may read these answers: its origin was checked before.
_READABLE_REASONS = frozenset({"key_missing", "key_wrong", "keys_differ", "scope_missing", "no_route"})
_MOST_REMEMBERED = 256
_BAD_REQUEST = 400
_UNAUTHORIZED = 401
_FORBIDDEN = 403
_NOT_FOUND = 404
_NOT_ALLOWED = 405
_SAFE = frozenset({"GET", "HEAD"})
_OPEN = Keys()
_METHODS = b"GET, HEAD, POST, DELETE"
_READABLE = (
    b"X-Request-Id, X-Instance, X-Model, X-Provider, X-Fallback-Reason, X-Queue-Ms, X-Start-Ms, X-Cost-USD, "
    b"X-Budget-Soft"
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a request that is not served; `reason` is one of `REASONS`, for logs and metrics."""

    status: int
    code: str
    message: str
    reason: str
    headers: dict[str, str] = field(default_factory=dict)


class Checked(NamedTuple):
    """The result of a check: why a request is refused, or the key that it is served for.

    `grant` is None where none is needed.
    """

    refusal: Refusal | None
    grant: Grant | None = None


_SERVED = Checked(None)


class Access:
    """The one check of every request, on the relay and on all other routes.

    A page in a browser can reach this machine in two ways: under a name of its own that it has resolved to
    this machine (the Host check refuses that), and across origins (the Origin check). Pages of this machine,
    and of the origins that Ollama allows, may use Ollama's routes and read the answers. The control API
    serves only pages that come from the daemon itself.

    A key is looked up by its digest: the time that takes says nothing about any secret.

    Args:
        allowed_hosts: names without a port, IPv6 in brackets, in lower case. Names that only this machine or
            its network can mean are allowed besides (`manager.wire.hosts`).
        keys: those in force.
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
        keys: Keys = _OPEN,
        allowed_origins: Collection[str] = (),
        own_names: Collection[str] = (),
        any_host: bool = False,
    ) -> None:
        self._keys = keys
        self.configure(
            allowed_hosts=allowed_hosts,
            allowed_origins=allowed_origins,
            own_names=own_names,
            any_host=any_host,
        )

    def configure(
        self,
        *,
        allowed_hosts: Collection[str],
        allowed_origins: Collection[str] = (),
        own_names: Collection[str] = (),
        any_host: bool = False,
    ) -> None:
        """Replace all but the keys, for all requests from now on. The arguments are those of the class."""
        self._configured = frozenset(allowed_hosts)
        self._named = self._configured | {name.lower() for name in own_names}
        self._any_host = any_host
        self._origins = Origins(tuple(allowed_origins))
        self._forget()

    def use(self, keys: Keys) -> None:
        """Replace the keys, for all requests from now on."""
        self._keys = keys
        self._forget()

    @property
    def wants_key(self) -> bool:
        return self._keys.are_required

    def check(
        self,
        method: str,
        path: str,
        headers: list[Header],
        *,
        preflight: bool = False,
        needs_host: bool = True,
    ) -> Checked:
        """Return whether a request is served, and for which key.

        Args:
            method: in capitals.
            path: in its normal form, without the query and without a key.
            headers: names in lower case; a key in the path is one of them (`keys.without_path_key`).
            preflight: a browser asks whether a page may send a request; it presents no key for that.
            needs_host: False for HTTP/1.0, whose requests may come without a Host.
        """
        hosts = [value for name, value in headers if name == b"host"]
        host = hosts[0] if hosts else b""
        refusal = self._host_refusal(hosts, needs_host=needs_host) or self._origin_refusal(
            path, headers, host
        )
        if refusal is not None:
            return Checked(refusal)
        if preflight or not self._keys.are_required or path in WITHOUT_KEY:
            return _SERVED
        if path.startswith(FILES_WITHOUT_KEY):
            return _SERVED
        return self._check_key(method, path, headers, host)

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

    def _check_key(self, method: str, path: str, headers: list[Header], host: bytes) -> Checked:
        in_path, in_headers = presented(headers)
        if len(in_path) > 1 or (in_path and any(one not in in_path for one in in_headers)):
            return Checked(_unauthorized("the path and a header present different keys", "keys_differ"))
        found = {
            grant.name: grant
            for one in in_path or in_headers
            if (grant := self._keys.grants.get(digest_of(one))) is not None
        }
        if len(found) > 1:
            return Checked(_unauthorized("two headers present different keys", "keys_differ"))
        if not found and not any(in_path or in_headers):
            grant = self._grant_of_page(method, headers, host)
            if grant is None:
                return Checked(_unauthorized("no key", "key_missing"))
        elif not found:
            return Checked(_unauthorized("the key is wrong, revoked or expired", "key_wrong"))
        else:
            (grant,) = found.values()
        return Checked(_scope_refusal(method, path, grant), grant)

    def _grant_of_page(self, method: str, headers: list[Header], host: bytes) -> Grant | None:
        """Return the key of the session of a page; None where the page is not the daemon's own.

        A browser sends the cookie along with requests of pages of other ports of this host too.
        """
        session = session_of(headers)
        grant = None if session is None else self._keys.sessions.get(digest_of(session))
        return grant if grant is not None and _is_own_page(method, dict(headers), host) else None

    def _forget(self) -> None:
        """Have everything that was remembered of earlier requests checked again."""
        self._seen: set[bytes] = set()
        self.version += 1

    @property
    def _serves_any_host(self) -> bool:
        return self._any_host and self._keys.are_required

    def _allows_origin(self, origin: bytes, path: str, host: bytes) -> bool:
        scheme, _, authority = origin.partition(b"://")
        of_web = scheme in (b"http", b"https") and bool(authority)
        is_here = of_web and authority.lower() == host.strip().lower()
        name = host_name(authority.decode("latin-1")) if of_web else None
        if spoken_at(path) is None:
            # A page of `x.local` is not trusted with this: another machine of the network may have the name.
            return is_here and name is not None and (self._serves_any_host or self._is_certain(name))
        return is_here or name in self._configured or self._origins.allow(origin)

    def _allows(self, host: bytes) -> bool:
        if host in self._seen:
            return True
        text = host.decode("latin-1").strip()
        name = host_name(text)
        # No Host and an empty one come from no browser.
        if text and (name is None or not (self._serves_any_host or self._is_certain(name) or is_local(name))):
            return False
        if len(self._seen) < _MOST_REMEMBERED:
            self._seen.add(host)
        return True

    def _is_certain(self, name: str) -> bool:
        return name in self._named or is_fixed(name)


def for_pages(headers: list[Header], refusal: Refusal | None) -> list[Header]:
    """Return the headers that let a page in a browser read an answer; none where no page may.

    Args:
        headers: of the request, names in lower case.
        refusal: the result of the check.
    """
    origin = next((value for name, value in headers if name == b"origin"), None)
    if origin is None or (refusal is not None and refusal.reason not in _READABLE_REASONS):
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


def _forbidden(reason: str, message: str, *, code: str | None = None) -> Refusal:
    return Refusal(_FORBIDDEN, code or reason, message, reason)


def _unauthorized(what: str, reason: str) -> Refusal:
    return Refusal(
        _UNAUTHORIZED,
        "unauthorized",
        f"{what}: present a key as `Authorization: Bearer …` or `X-API-Key: …`",
        reason,
        headers={"WWW-Authenticate": "Bearer"},
    )


def _scope_refusal(method: str, path: str, grant: Grant) -> Refusal | None:
    """Return why a key does not open a route, or None. Only admins reach a route that the table lacks."""
    needed = scopes_of(method, path)
    if needed is None:
        return None if grant.may(Scope.ADMIN) else _no_route(method, path)
    if not needed or any(map(grant.may, needed)):
        return None
    return _forbidden(
        "scope_missing",
        f"the key {grant.name!r} has the scope {', '.join(sorted(grant.scopes))}; "
        f"{method} {without_secrets(path)} needs {' or '.join(needed)}",
        code="forbidden",
    )


def _no_route(method: str, path: str) -> Refusal:
    methods = methods_at(path)
    if not methods:
        return Refusal(_NOT_FOUND, "not_found", f"there is no {method} {without_secrets(path)}", "no_route")
    allow = ", ".join(methods)
    message = f"{path} has no method {method}; allowed: {allow}"
    return Refusal(_NOT_ALLOWED, "method_not_allowed", message, "no_route", headers={"Allow": allow})


def _is_own_page(method: str, headers: dict[bytes, bytes], host: bytes) -> bool:
    """Return whether a browser sends a request for a page of the daemon itself, or for its user."""
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if origin is not None and origin.partition(b"://")[2].lower() != host.strip().lower():
        return False
    if site is not None:
        return site == b"same-origin" or (site == b"none" and method in _SAFE)
    return method in _SAFE or origin is not None
