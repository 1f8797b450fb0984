"""Heads of HTTP messages: what must not pass, and what goes on to the other side."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from manager.wire.keys import PATH_KEY

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# RFC 9110 section 7.6.1, and what older software takes for such.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# What is for us and not for the server: who the caller is, how the body is framed (it is framed anew), where
# a page came from (it was looked at), and an encoding in which no tokens could be counted.
_OURS = frozenset(
    {
        PATH_KEY,
        b"accept-encoding",
        b"authorization",
        b"content-length",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"origin",
        b"referer",
        b"traceparent",
        b"tracestate",
        b"x-api-key",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-real-ip",
        b"x-request-id",
    }
)
# Of an answer: what frames the message, and what is said anew here whatever a server says.
# The last ones would tell a browser something about this address, which the server knows nothing of.
NOT_RETURNED = HOP_BY_HOP | {
    b"access-control-allow-credentials",
    b"access-control-allow-origin",
    b"access-control-expose-headers",
    b"content-length",
    b"x-accel-buffering",
    b"x-budget-soft",
    b"x-cost-usd",
    b"x-fallback-reason",
    b"x-instance",
    b"x-model",
    b"x-provider",
    b"x-queue-ms",
    b"x-request-id",
    b"x-start-ms",
    b"alt-svc",
    b"clear-site-data",
    b"set-cookie",
    b"strict-transport-security",
}
_NEVER_FORWARDED = HOP_BY_HOP | _OURS
Header = tuple[bytes, bytes]


def status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: status_line(status) for status in range(100, 600)}


def ambiguity(headers: list[Header]) -> str | None:
    """Return why two readers could frame this request differently, or None.

    The parser (llhttp, strict) refuses folded lines, a second or malformed Content-Length, one beside a
    Transfer-Encoding, bare line ends and bad chunks. This is the rest. `Access` counts the Host headers; of
    other repeated headers the first one counts, as for Go's `Header.Get`.

    Args:
        headers: names in lower case.
    """
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if len(codings) > 1:
        return "transfer-encoding is given more than once"
    if codings and codings[0].strip().lower() != b"chunked":
        return "the only transfer-encoding that is understood is chunked"
    return None


def forwarded(headers: Iterable[Header], withheld: Collection[bytes]) -> list[bytes]:
    """Return the lines of a request that go to the upstream; of several Content-Types only the first.

    Args:
        headers: as they came, names in lower case.
        withheld: names of further headers that do not go there.
    """
    lines: list[bytes] = []
    named = b""
    has_type = False
    for name, value in headers:
        if name == b"connection":
            named += value + b","
        elif name not in _NEVER_FORWARDED and name not in withheld:
            if name == b"content-type":
                if has_type:
                    continue
                has_type = True
            lines.append(b"%b: %b\r\n" % (name, value))
    return without_named(lines, named) if named else lines


def without_named(lines: Iterable[bytes], connection: bytes) -> list[bytes]:
    """`lines` without those that the value of a Connection header names."""
    named = _named_by_connection(connection)
    return [line for line in lines if line.partition(b":")[0].lower() not in named]


def _named_by_connection(value: bytes) -> set[bytes]:
    # Nobody may have the framing of the message taken away with this.
    return {token.strip().lower() for token in value.split(b",")} - {b"content-type", b"content-length"}
