"""Which dialects of clients and protocols of servers have a translation."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from manager.domain.roles import RequestKind
from manager.domain.target import Protocol
from manager.wire.translate.anthropic_client import MessagesClient
from manager.wire.translate.anthropic_server import MessagesServer
from manager.wire.translate.chat_client import ChatClient, CompletionClient
from manager.wire.translate.native_client import NativeChat, NativeEmbedding
from manager.wire.translate.native_request import chat_of, prompt_of
from manager.wire.translate.openai_server import OpenAIChat, OpenAIEmbedding
from manager.wire.translate.responses_client import ResponsesClient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from manager.wire.translate.codec import ClientCodec, ServerCodec, Traits

# By the path of a route (`wire.routes`).
CLIENTS: Mapping[str, Callable[[], ClientCodec[Any, Any]]] = MappingProxyType(
    {
        "/api/chat": partial(NativeChat, chat_of, is_chat=True),
        "/api/generate": partial(NativeChat, prompt_of, is_chat=False),
        "/api/embed": partial(NativeEmbedding, is_old=False),
        "/api/embeddings": partial(NativeEmbedding, is_old=True),
        "/v1/chat/completions": ChatClient,
        "/v1/completions": CompletionClient,
        "/v1/responses": ResponsesClient,
        "/v1/messages": MessagesClient,
    }
)
# By the protocol of the server and the kind of the request.
SERVERS: Mapping[tuple[Protocol, RequestKind], Callable[[Traits], ServerCodec[Any, Any]]] = MappingProxyType(
    {
        (Protocol.OPENAI, RequestKind.GENERATE): OpenAIChat,
        (Protocol.OPENAI, RequestKind.EMBED): OpenAIEmbedding,
        (Protocol.ANTHROPIC, RequestKind.GENERATE): MessagesServer,
    }
)
