"""Servers that speak OpenAI's API: vLLM, llama.cpp, LM Studio, OpenAI, Gemini and others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.wire.translate.openai_answer import OpenAIAnswer
from manager.wire.translate.openai_request import chat_request, embedding_request
from manager.wire.translate.openai_vectors import OpenAIVectors

if TYPE_CHECKING:
    from manager.wire.translate.codec import Traits
    from manager.wire.translate.hub import AnswerEvent, Conversation, Failed
    from manager.wire.translate.vectors import EmbeddingRequest, VectorsCame


class OpenAIChat:
    """One chat at /v1/chat/completions."""

    path = "/v1/chat/completions"
    _answer: OpenAIAnswer

    def __init__(self, traits: Traits) -> None:
        self._traits = traits

    def document(self, asked: Conversation) -> dict[str, Any]:
        self._answer = OpenAIAnswer(stream=asked.stream)
        return chat_request(asked, self._traits)

    def feed(self, data: bytes) -> list[AnswerEvent]:
        return self._answer.feed(data)

    def end(self) -> list[AnswerEvent]:
        return self._answer.end()


class OpenAIEmbedding:
    """The vectors of some texts at /v1/embeddings."""

    path = "/v1/embeddings"
    _answer: OpenAIVectors

    def __init__(self, traits: Traits) -> None:
        del traits  # all servers take the same

    def document(self, asked: EmbeddingRequest) -> dict[str, Any]:
        self._answer = OpenAIVectors(len(asked.inputs))
        return embedding_request(asked)

    def feed(self, data: bytes) -> list[VectorsCame | Failed]:
        return self._answer.feed(data)

    def end(self) -> list[VectorsCame | Failed]:
        return self._answer.end()
