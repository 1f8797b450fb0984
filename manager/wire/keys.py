"""Keys as requests present them: in a header, in the path, or through the session of a page."""

from __future__ import annotations

import re
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.keys import Grant
    from manager.wire.head import Header

SESSION_COOKIE = "ollama_manager_session"
_PORT = re.compile(rb":([0-9]{1,5})")
# The key of a path travels as a header from where the path is read. No client can send one of this name: a
# parser of HTTP refuses a colon in it.
PATH_KEY = b":key"
_PREFIX = b"/key/"
# A request may present so many keys: one guess in each of a thousand headers would be a thousand guesses.
_MOST_KEYS = 8
_SECRET = re.compile(r"om_[A-Za-z0-9_-]{43}")
_HIDDEN = "om_…"
_NONE: Mapping[bytes, Grant] = MappingProxyType({})


class Keys(NamedTuple):
    """The keys in force.

    `grants` are the keys by the digest of each of their secrets, `sessions` those of pages by the digest of
    the id of each session. `are_required` is whether a request needs one, although there may be none left.
    """

    grants: Mapping[bytes, Grant] = _NONE
    sessions: Mapping[bytes, Grant] = _NONE
    are_required: bool = False


class Presented(NamedTuple):
    """The keys of one request: that of its path, and those of its headers."""

    in_path: tuple[bytes, ...]
    in_headers: tuple[bytes, ...]


def digest_of(secret: bytes) -> bytes:
    """Return the SHA-256 by which a secret is stored and looked up."""
    return sha256(secret).digest()


def presented(headers: list[Header]) -> Presented:
    """Return the keys that a request presents, each once, in the order of its headers.

    Args:
        headers: names in lower case.
    """
    in_path: list[bytes] = []
    in_headers: list[bytes] = []
    for name, value in headers:
        if name == b"x-api-key":
            in_headers.append(value)
        elif name == b"authorization":
            scheme, _, bearer = value.partition(b" ")
            if scheme.lower() == b"bearer":
                in_headers.append(bearer.strip())
        elif name == PATH_KEY:
            in_path.append(value)
    return Presented(tuple(dict.fromkeys(in_path)), tuple(dict.fromkeys(in_headers[:_MOST_KEYS])))


def without_path_key(path: bytes) -> tuple[bytes, list[Header]]:
    """Return a path without the keys at its beginning, and a header for each of them.

    Whatever stands in the place of a key is taken for one, so that a mistyped one goes nowhere either.

    Args:
        path: in its normal form.
    """
    found: list[Header] = []
    while path.startswith(_PREFIX):
        key, slash, rest = path[len(_PREFIX) :].partition(b"/")
        found.append((PATH_KEY, key))
        path = slash + rest or b"/"
    return path, found


def session_cookie(host: bytes) -> str:
    """Return the name of the cookie of a session.

    Browsers send the cookies of a host to all of its ports: daemons on several have one of their own each.

    Args:
        host: as the request names it.
    """
    port = _PORT.search(host.rpartition(b"]")[2])
    return f"{SESSION_COOKIE}_{port[1].decode()}" if port else SESSION_COOKIE


def session_of(headers: list[Header]) -> bytes | None:
    """Return the id of the session in the cookies of a request; None without one.

    Args:
        headers: names in lower case; with the Host, which says which cookie it is (`session_cookie`).
    """
    host = next((value for name, value in headers if name == b"host"), b"")
    wanted = session_cookie(host).encode()
    for name, value in headers:
        if name == b"cookie":
            for cookie in value.split(b";"):
                key, _, session = cookie.strip().partition(b"=")
                if key == wanted:
                    return session
    return None


def without_secrets(text: str) -> str:
    """Return a text in which the secret of a key is hidden, whatever its context."""
    return _SECRET.sub(_HIDDEN, text) if "om_" in text else text
