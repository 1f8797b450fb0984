"""Which dialects of clients and protocols of servers have a translation."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from manager.domain.roles import RequestKind
from manager.domain.target import Protocol
from manager.wire.translate.anthropic_client import MessagesClient
from manager.wire.translate.anthropic_server import MessagesServer
from manager.wire.translate.chat_client import ChatClient, CompletionClient
from manager.wire.translate.responses_client import ResponsesClient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from manager.wire.translate.codec import ClientCodec, ServerCodec, Traits

# By the path of a route (`wire.routes`).
CLIENTS: Mapping[str, Callable[[], ClientCodec]] = MappingProxyType(
    {
        "/v1/chat/completions": ChatClient,
        "/v1/completions": CompletionClient,
        "/v1/responses": ResponsesClient,
        "/v1/messages": MessagesClient,
    }
)
# By the protocol of the server and the kind of the request.
SERVERS: Mapping[tuple[Protocol, RequestKind], Callable[[Traits], ServerCodec]] = MappingProxyType(
    {(Protocol.ANTHROPIC, RequestKind.GENERATE): MessagesServer}
)
