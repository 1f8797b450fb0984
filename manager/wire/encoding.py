"""Encodings of request bodies, decoded as a server does it."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING

from manager.wire.errors import BadBodyError, BodyTooLargeError, NoRoomError
from manager.wire.routes import Dialect
from manager.wire.steps import STEP_BYTES

if sys.version_info >= (3, 14):  # pragma: no cover
    from compression import zstd
else:
    from backports import zstd

__all__ = ["CONTENT_ENCODING", "Encoding", "encoding_of", "gathered", "holds_any", "zstd"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from manager.wire.head import Header
    from manager.wire.routes import Route
    from manager.wire.steps import Steps

# The header of a request that is not forwarded with a decoded body.
CONTENT_ENCODING = b"content-encoding"

_WINDOW_LOG_MAX = 23  # 8 MiB, as Ollama's decoder takes at most
_MOST_FRAMES = 64
_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}


class Encoding(StrEnum):
    """An encoding that is decoded here."""

    ZSTD = "zstd"


def encoding_of(route: Route, headers: Iterable[Header]) -> Encoding | None:
    """Return the encoding in which the body of a request is to be decoded, or None.

    Source: Ollama `server/cloud_proxy.go` cloudPassthroughMiddleware: below /v1, and the value exactly. Every
    other body is read as it came, whatever the header says.

    Args:
        route: where the request goes.
        headers: names in lower case; the first of a name counts.
    """
    if route.dialect is Dialect.NATIVE:
        return None
    for name, value in headers:
        if name == CONTENT_ENCODING:
            return Encoding.ZSTD if value == b"zstd" else None
    return None


def holds_any(_count: int) -> bool:
    """Hold whatever a body decodes to."""
    return True


def gathered(
    parts: list[bytes],
    encoding: Encoding | None,
    most_bytes: int,
    holds: Callable[[int], bool] = holds_any,
) -> Steps[bytes | bytearray]:
    """Join the parts of a body, decoded, and empty the list meanwhile.

    Args:
        parts: the body as it was received.
        encoding: what the parts are decoded from.
        most_bytes: how large the decoded body may be.
        holds: counts further bytes that decoding adds; whether they may be held.

    Raises:
        BodyTooLargeError: the decoded body has more than `most_bytes`.
        NoRoomError: `holds` has said no.
        BadBodyError: it cannot be decoded.
    """
    if encoding is not None:
        return (yield from _decoded(parts, most_bytes, holds))
    if len(parts) == 1:
        return parts.pop()
    # It grows in place (mremap); a buffer of the whole size would be zeroed in one long step.
    data = bytearray()
    taken = 0
    parts.reverse()
    while parts:
        data += parts.pop()
        if len(data) - taken >= STEP_BYTES:
            taken = len(data)
            yield
    return data


def _decoded(parts: list[bytes], most_bytes: int, holds: Callable[[int], bool]) -> Steps[bytearray]:
    data = bytearray()
    frames, decoder = 1, zstd.ZstdDecompressor(options=_OPTIONS)
    parts.reverse()
    while parts:
        piece = parts.pop()
        if decoder.eof:
            if frames == _MOST_FRAMES:
                raise BadBodyError(f"the zstd body has more than {_MOST_FRAMES} frames")
            frames, decoder = frames + 1, zstd.ZstdDecompressor(options=_OPTIONS)
        more = True
        while more:
            try:
                decoded = decoder.decompress(piece, max_length=STEP_BYTES)
            except zstd.ZstdError:
                raise _undecodable() from None
            if len(data) + len(decoded) > most_bytes:
                raise BodyTooLargeError(most_bytes)
            if not holds(len(decoded)):
                raise NoRoomError
            data += decoded
            piece = b""
            more = not (decoder.needs_input or decoder.eof)
            yield
        if decoder.unused_data:
            parts.append(decoder.unused_data)
    if not decoder.eof:
        raise _undecodable()
    return data


def _undecodable() -> BadBodyError:
    return BadBodyError("failed to decompress zstd body")
