"""The headers by which servers know their clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.target import Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.wire.head import Header

# https://docs.anthropic.com/en/api/versioning
_ANTHROPIC_VERSION = b"2023-06-01"
_SECRET = (b"authorization", b"x-api-key")


def credentials(protocol: Protocol, key: str | None) -> tuple[Header, ...]:
    """Return the headers for a server of this protocol; `key` is None where it wants none."""
    version = ((b"anthropic-version", _ANTHROPIC_VERSION),) if protocol is Protocol.ANTHROPIC else ()
    if key is None:
        return version
    secret = key.encode("ascii")
    if protocol is Protocol.ANTHROPIC:
        return ((b"x-api-key", secret), *version)
    return ((b"authorization", b"Bearer " + secret),)


def secrets_in(headers: Iterable[Header]) -> tuple[bytes, ...]:
    """Return the keys among the headers of a request to a server."""
    return tuple(value.rpartition(b" ")[2] for name, value in headers if name.lower() in _SECRET)
