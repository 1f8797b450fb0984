"""Request targets: one spelling for every path, so that access checks and routing see the same one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

# A path in its normal form: no empty segment, dot segment, escape, or byte that a URL must escape.
_NORMAL = re.compile(rb"/|(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]+)+")
_ABSOLUTE = re.compile(rb"https?://(?P<authority>[^/?#]*)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# What RFC 3986 section 3.3 does not allow in a path, a percent sign that begins no escape included.
_NOT_IN_PATH = re.compile(rb"[^A-Za-z0-9._~!$&'()*+,;=:@/%-]|%(?![0-9A-Fa-f]{2})")
# Below this path segments are names that clients have chosen.
_NAMES = [b"api", b"v1", b"collections"]
_DOTS = {b".": b"%2E", b"..": b"%2E%2E"}
_KEY = b"key"
_SLASH = "%2F"
_ASTERISK = b"*"


@dataclass(frozen=True, slots=True)
class Target:
    """A request target in origin form.

    `authority` is that of a target in absolute form, else None; it takes precedence over Host (RFC 9112
    section 3.2.2).
    """

    path: bytes
    query: bytes
    authority: bytes | None = None

    @property
    def raw(self) -> bytes:
        return self.path + b"?" + self.query if self.query else self.path


def read_target(raw: bytes) -> Target | None:
    """Return the normal form of a request target, or None where it names no path of this server.

    Args:
        raw: the target of the request line: origin form, absolute form, or an asterisk.
    """
    if raw == _ASTERISK:
        return Target(raw, b"")
    authority = None
    absolute = _ABSOLUTE.fullmatch(raw)
    if absolute is not None:
        authority, raw = absolute["authority"], absolute["rest"]
        if not authority or b"@" in authority:
            return None
        if not raw.startswith(b"/"):
            raw = b"/" + raw
    if not raw.startswith(b"/"):
        return None
    path, _, query = raw.partition(b"#")[0].partition(b"?")
    return Target(normalised(path), query, authority)


def normalised(path: bytes) -> bytes:
    """Return the normal form of a path; idempotent.

    Escapes of unreserved characters are decoded, other escapes are written in upper case, bytes that a path
    cannot hold are escaped, empty segments and a slash at the end are dropped, dot segments are resolved.
    An escaped slash (`%2F`) stays one: it never separates segments.

    Below `/api/v1/collections/` segments are names: empty ones stay, and dots are escaped. A step up would
    lead from an item to its collection, which a request would remove in its place.
    """
    if _NORMAL.fullmatch(path):
        return path
    path = _NOT_IN_PATH.sub(lambda match: b"%%%02X" % match[0][0], path)
    path = _ESCAPE.sub(_plain_escape, path)
    segments: list[bytes] = []
    given = path.split(b"/")
    for place, segment in enumerate(given):
        if segments[-3:] == _NAMES and any(given[place:]) and _is_behind_keys(segments):
            segments += [_DOTS.get(name, name) for name in given[place:]]
            break
        if segment == b"..":
            del segments[-1:]
        elif segment not in (b"", b"."):
            segments.append(segment)
    return b"/" + b"/".join(segments)


def decoded(path: bytes) -> str:
    """Return the text of a path in its normal form; an escaped slash stays escaped."""
    text = path.decode("ascii")
    if "%" not in text:
        return text
    return _SLASH.join(unquote(part) for part in text.split(_SLASH))


def _is_behind_keys(segments: list[bytes]) -> bool:
    """Return whether nothing but keys stands before the last three segments: `/key/SECRET/api/v1/…`."""
    before = segments[:-3]
    return len(before) % 2 == 0 and all(segment == _KEY for segment in before[::2])


def _plain_escape(match: re.Match[bytes]) -> bytes:
    byte = int(match[1], 16)
    return bytes((byte,)) if byte in _UNRESERVED else match[0].upper()
