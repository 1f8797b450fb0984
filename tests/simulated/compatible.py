"""The /v1 routes: the same models and answers in the shapes of OpenAI and Anthropic."""

from __future__ import annotations

import time
from base64 import b64encode
from binascii import hexlify
from datetime import datetime
from os import urandom
from typing import TYPE_CHECKING, Any

from . import bodies
from .http1 import MidStreamError
from .inference import RequestError, as_float32_bytes, count_tokens, message_tokens
from .native import JSON, check_chat, dumps, embedded, find_model
from .responses import ResponsesStream, response_object

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .http1 import Exchange
    from .inference import Inference, Piece
    from .library import Model

PLAIN_JSON = "application/json"
SSE = "text/event-stream"

_ANTHROPIC_ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip


class EarlyError(RequestError):
    """An error found before the request reaches the native handler: it says `charset` in its content type."""


async def send_openai_error(exchange: Exchange, error: RequestError) -> None:
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(error.status, "api_error")
    body = {"error": {"message": error.message, "type": kind, "param": None, "code": None}}
    await _send_error(exchange, error, body)


async def send_anthropic_error(exchange: Exchange, error: RequestError) -> None:
    kind = _ANTHROPIC_ERRORS.get(error.status, "api_error")
    body = {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": f"req_{_hex(12)}",
    }
    await _send_error(exchange, error, body)


async def _send_error(exchange: Exchange, error: RequestError, body: dict[str, Any]) -> None:
    if isinstance(error, EarlyError):
        await exchange.answer(error.status, JSON, dumps(body))
    else:
        await _send(exchange, body, error.status)


async def _send(exchange: Exchange, value: object, status: int = 200) -> None:
    await exchange.answer(status, PLAIN_JSON, dumps(value) + b"\n")


async def _read(exchange: Exchange, struct: str) -> dict[str, Any]:
    try:
        return bodies.decode(await exchange.body(), struct)
    except bodies.BadBodyError as error:
        raise EarlyError(400, str(error)) from None


async def models(inference: Inference, exchange: Exchange) -> None:
    data = [_model_entry(model, model.name) for model in inference.library.all()]
    await _send(exchange, {"object": "list", "data": data})


async def model(inference: Inference, exchange: Exchange) -> None:
    name = exchange.path.removeprefix("/v1/models/")
    await _send(exchange, _model_entry(find_model(inference, name), name))


def _model_entry(model: Model, name: str) -> dict[str, Any]:
    made = datetime.fromisoformat(model.modified_at[:19] + "+00:00")
    return {
        "id": name,
        "object": "model",
        "created": int(made.timestamp()),
        "owned_by": model.parsed.namespace,
    }


async def chat_completions(inference: Inference, exchange: Exchange) -> None:
    request = await _read(exchange, "ChatCompletionRequest")
    messages = request.get("messages", [])
    if not messages:
        raise EarlyError(400, "[] is too short - 'messages'")
    model = _chat_model(inference, request)
    head = _head(request, "chatcmpl", "chat.completion")
    async with inference.running(model, None) as load_ns:
        pieces = inference.pieces(message_tokens(messages), request.get("max_tokens", -1), load_ns)
        if request.get("stream"):
            await _send_events(exchange, pieces, lambda piece: _chat_events(request, head, piece))
            return
        text, last = await _whole(pieces)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": last.reason}
        await _send(exchange, {**head, "choices": [choice], "usage": _usage(last)})


async def transcriptions(inference: Inference, exchange: Exchange) -> None:
    """What it hears is how much there was; nobody has recorded the real one's answers yet."""
    kind, _, boundary = exchange.headers.get("content-type", "").partition("boundary=")
    if not kind.startswith("multipart/form-data") or not boundary:
        raise EarlyError(400, "request Content-Type isn't multipart/form-data")
    fields: dict[str, bytes] = {}
    body = b"\r\n" + await exchange.body()
    for part in body.split(b"\r\n--" + boundary.strip('"').encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        fields[head.partition(b'name="')[2].partition(b'"')[0].decode()] = content
    if "file" not in fields:
        raise EarlyError(400, "file is required")
    model = find_model(inference, fields.get("model", b"").decode())
    async with inference.running(model, None):
        await _send(exchange, {"text": f"{len(fields['file'])} bytes heard by {model.name}"})


def _chat_events(request: dict[str, Any], head: dict[str, Any], piece: Piece) -> Iterator[bytes]:
    head = {**head, "object": "chat.completion.chunk"}
    delta = {"role": "assistant", "content": piece.text}
    yield _data({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": piece.reason or None}]})
    if piece.metrics is not None:
        if request.get("stream_options", {}).get("include_usage"):
            yield _data({**head, "choices": [], "usage": _usage(piece)})
        yield b"data: [DONE]\n\n"


async def completions(inference: Inference, exchange: Exchange) -> None:
    request = await _read(exchange, "CompletionRequest")
    model = find_model(inference, request.get("model", ""))
    if model.embedding:
        raise RequestError(400, f'"{request["model"]}" does not support generate')
    head = _head(request, "cmpl", "text_completion")
    prompt_tokens = 6 + count_tokens(request.get("prompt", ""))
    async with inference.running(model, None) as load_ns:
        pieces = inference.pieces(prompt_tokens, request.get("max_tokens", -1), load_ns)
        if request.get("stream"):
            await _send_events(exchange, pieces, lambda piece: _completion_events(request, head, piece))
            return
        text, last = await _whole(pieces)
        choice = {"text": text, "index": 0, "finish_reason": last.reason}
        await _send(exchange, {**head, "choices": [choice], "usage": _usage(last)})


def _completion_events(request: dict[str, Any], head: dict[str, Any], piece: Piece) -> Iterator[bytes]:
    with_usage = request.get("stream_options", {}).get("include_usage")
    zero = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    usage = {"usage": zero} if with_usage else {}
    choice = {"text": piece.text, "index": 0, "finish_reason": piece.reason or None}
    yield _data({**head, "choices": [choice], **usage})
    if piece.metrics is not None:
        if with_usage:
            yield _data({**head, "choices": [], "usage": _usage(piece)})
        yield b"data: [DONE]\n\n"


async def embeddings(inference: Inference, exchange: Exchange) -> None:
    request = await _read(exchange, "EmbedRequest.openai")
    encoding = request.get("encoding_format", "float")
    if encoding.lower() not in ("float", "base64"):
        raise EarlyError(
            400, f"Invalid value for 'encoding_format' = {encoding}. Supported values: ['float', 'base64']."
        )
    if request.get("input") in (None, []):
        raise EarlyError(400, "invalid input")
    values, _, tokens = await embedded(inference, request)
    data = [
        {
            "object": "embedding",
            "embedding": b64encode(as_float32_bytes(value)).decode()
            if encoding.lower() == "base64"
            else value,
            "index": index,
        }
        for index, value in enumerate(values)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    await _send(exchange, {"object": "list", "data": data, "model": request["model"], "usage": usage})


async def responses(inference: Inference, exchange: Exchange) -> None:
    request = await _read(exchange, "ResponsesRequest")
    given = request.get("input", "")
    messages = given if isinstance(given, list) else [{"role": "user", "content": given}]
    if not given:
        raise EarlyError(400, "input is required")
    model = _chat_model(inference, request)
    async with inference.running(model, None) as load_ns:
        pieces = inference.pieces(message_tokens(messages), request.get("max_output_tokens", -1), load_ns)
        if request.get("stream"):
            stream = ResponsesStream(request)
            await _send_events(exchange, pieces, lambda piece: _named_events(stream.events(piece)))
            return
        text, last = await _whole(pieces)
        await _send(exchange, response_object(request, "completed", text, last.metrics))


async def messages(inference: Inference, exchange: Exchange) -> None:
    request = await _read(exchange, "MessagesRequest")
    if not request.get("model"):
        raise EarlyError(400, "model is required")
    if request.get("max_tokens", 0) <= 0:
        raise EarlyError(400, "max_tokens is required and must be positive")
    given = request.get("messages", [])
    if not given:
        raise EarlyError(400, "messages is required")
    model = _chat_model(inference, request)
    async with inference.running(model, None) as load_ns:
        pieces = inference.pieces(message_tokens(given), request["max_tokens"], load_ns)
        if request.get("stream"):
            events = _message_events(request)
            headers = {"Cache-Control": "no-cache", "Connection": "keep-alive"}
            await _send_events(exchange, pieces, lambda piece: _named_events(events(piece)), headers)
            return
        text, last = await _whole(pieces)
        answer = _message(request, [{"type": "text", "text": text}])
        usage = {
            "input_tokens": _usage(last)["prompt_tokens"],
            "output_tokens": _usage(last)["completion_tokens"],
        }
        await _send(exchange, {**answer, "stop_reason": _stop_reason(last), "usage": usage})


def _message(request: dict[str, Any], content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": request["model"],
        "content": content,
    }


def _stop_reason(last: Piece) -> str:
    return "max_tokens" if last.reason == "length" else "end_turn"


def _message_events(request: dict[str, Any]) -> Callable[[Piece], Iterator[dict[str, Any]]]:
    started = False

    def events(piece: Piece) -> Iterator[dict[str, Any]]:
        nonlocal started
        if not started:
            started = True
            usage = {"input_tokens": max(message_tokens(request["messages"]) - 5, 1), "output_tokens": 0}
            yield {"type": "message_start", "message": {**_message(request, []), "usage": usage}}
            yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        if piece.metrics is None:
            yield {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": piece.text},
            }
            return
        usage = {"input_tokens": piece.metrics.prompt_tokens, "output_tokens": piece.metrics.tokens}
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "delta": {"stop_reason": _stop_reason(piece)}, "usage": usage}
        yield {"type": "message_stop"}

    return events


def _chat_model(inference: Inference, request: dict[str, Any]) -> Model:
    model = check_chat(inference, {"model": request.get("model", ""), "tools": request.get("tools")})
    if model.embedding:
        raise RequestError(400, f'"{request["model"]}" does not support chat')
    return model


def _head(request: dict[str, Any], prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{urandom(1)[0]}",
        "object": kind,
        "created": int(time.time()),
        "model": request["model"],
        "system_fingerprint": "fp_ollama",
    }


def _usage(last: Piece) -> dict[str, int]:
    assert last.metrics is not None
    prompt, answer = last.metrics.prompt_tokens, last.metrics.tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


async def _whole(pieces: AsyncIterator[Piece]) -> tuple[str, Piece]:
    parts = [piece async for piece in pieces]
    return "".join(piece.text for piece in parts), parts[-1]


async def _send_events(
    exchange: Exchange,
    pieces: AsyncIterator[Piece],
    events: Callable[[Piece], Iterator[bytes]],
    headers: dict[str, str] | None = None,
) -> None:
    """Stream SSE. An error in mid-stream is lost on the way, as it is in Ollama: the stream just ends,
    without its terminator."""  # noqa: D205, D209
    exchange.start_stream(SSE, headers)
    try:
        async for piece in pieces:
            for event in events(piece):
                await exchange.write(event)
    except MidStreamError:
        pass
    await exchange.end_stream()


def _named_events(events: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    return (f"event: {event['type']}\n".encode() + _data(event) for event in events)


def _data(value: object) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


def _hex(count: int) -> str:
    return hexlify(urandom(count)).decode()
