"""The headers by which servers know their clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.target import Protocol

if TYPE_CHECKING:
    from manager.wire.head import Header

# https://docs.anthropic.com/en/api/versioning
_ANTHROPIC_VERSION = b"2023-06-01"


def credentials(protocol: Protocol, key: str | None) -> tuple[Header, ...]:
    """Return the headers for a server of this protocol; `key` is None where it wants none."""
    version = ((b"anthropic-version", _ANTHROPIC_VERSION),) if protocol is Protocol.ANTHROPIC else ()
    if key is None:
        return version
    secret = key.encode("ascii")
    if protocol is Protocol.ANTHROPIC:
        return ((b"x-api-key", secret), *version)
    return ((b"authorization", b"Bearer " + secret),)
