"""Which dialects of clients and protocols of servers have a translation."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from manager.domain.roles import RequestKind
    from manager.domain.target import Protocol
    from manager.wire.translate.codec import ClientCodec, ServerCodec, Traits

# By the path of a route (`wire.routes`).
CLIENTS: Mapping[str, Callable[[], ClientCodec]] = MappingProxyType({})
# By the protocol of the server and the kind of the request.
SERVERS: Mapping[tuple[Protocol, RequestKind], Callable[[Traits], ServerCodec]] = MappingProxyType({})
