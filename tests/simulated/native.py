"""The routes of Ollama's own API that deal with models and answers."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from . import bodies
from .http1 import MidStreamError
from .inference import (
    Inference,
    RequestError,
    as_doubles,
    count_tokens,
    message_tokens,
    normalised,
    vector,
)
from .library import BadNameError, Model, Name, described, renamed, timestamp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .http1 import Exchange
    from .inference import Piece

JSON = "application/json; charset=utf-8"
NDJSON = "application/x-ndjson"
VECTOR_DIMENSIONS = 384

_UNNORMALISED_SCALE = 2.5
"""Length of the vectors of /api/embeddings, so that mixing them with those of /api/embed shows."""


def dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


async def send_json(exchange: Exchange, value: object, status: int = 200) -> None:
    await exchange.answer(status, JSON, dumps(value))


async def send_error(exchange: Exchange, error: RequestError) -> None:
    await send_json(exchange, {"error": error.message}, error.status)


async def read(exchange: Exchange, struct: str) -> dict[str, Any]:
    try:
        return bodies.decode(await exchange.body(), struct)
    except bodies.MissingBodyError:
        raise RequestError(400, "missing request body") from None
    except bodies.BadBodyError as error:
        raise RequestError(400, str(error)) from None


def find_model(inference: Inference, name: str, missing: str = "model '{}' not found") -> Model:
    """Raises RequestError 404 with the words of `missing`."""
    try:
        model = inference.library.get(Name.parse(name))
    except BadNameError:
        model = None
    if model is None:
        raise RequestError(404, missing.format(name))
    return model


def wanted_tokens(request: dict[str, Any]) -> int:
    wanted = request.get("options", {}).get("num_predict", -1)
    return wanted if isinstance(wanted, int) else -1


def check_chat(inference: Inference, request: dict[str, Any]) -> Model:
    """The checks that a chat request gets before its model is loaded. Raises RequestError."""
    name = request.get("model", "")
    try:
        Name.parse(name)
    except BadNameError:
        raise RequestError(400, "model is required") from None
    model = find_model(inference, name)
    if request.get("tools"):
        raise RequestError(400, f"{model.parsed.full} does not support tools")
    if request.get("think"):
        raise RequestError(400, f'"{name}" does not support thinking')
    return model


async def chat(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "ChatRequest")
    model = check_chat(inference, request)
    messages = request.get("messages", [])
    if not messages and request.get("keep_alive") == 0:
        inference.scheduler.expire(model)
        await send_json(exchange, _chat_line(request, {"done": True, "done_reason": "unload"}))
        return
    if model.embedding:
        raise RequestError(400, f'"{request["model"]}" does not support chat')
    async with inference.running(model, request.get("keep_alive")) as load_ns:
        if not messages:
            await send_json(exchange, _chat_line(request, {"done": True, "done_reason": "load"}))
            return
        pieces = inference.pieces(message_tokens(messages), wanted_tokens(request), load_ns)
        await _send_answer(inference, exchange, request, pieces, _chat_line)


async def generate(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "GenerateRequest")
    model = find_model(inference, request.get("model", ""))
    prompt = request.get("prompt", "")
    if not prompt and request.get("keep_alive") == 0:
        inference.scheduler.expire(model)
        await send_json(exchange, _generate_line(request, {"done": True, "done_reason": "unload"}))
        return
    if model.embedding:
        raise RequestError(400, f'"{request["model"]}" does not support generate')
    if request.get("suffix"):
        raise RequestError(400, f"{model.parsed.full} does not support insert")
    if request.get("think"):
        raise RequestError(400, f'"{request["model"]}" does not support thinking')
    if not prompt and inference.knobs.false_load:
        end = (
            {"error": "llama runner process has terminated"} if inference.knobs.false_load == "error" else {}
        )
        await send_json(exchange, end or _generate_line(request, {"done": True, "done_reason": "load"}))
        return
    async with inference.running(model, request.get("keep_alive")) as load_ns:
        if not prompt:
            await send_json(exchange, _generate_line(request, {"done": True, "done_reason": "load"}))
            return
        pieces = inference.pieces(6 + count_tokens(prompt), wanted_tokens(request), load_ns)
        await _send_answer(inference, exchange, request, pieces, _generate_line)


def _chat_line(request: dict[str, Any], end: dict[str, Any], text: str = "") -> dict[str, Any]:
    return {
        "model": request["model"],
        "created_at": timestamp(time.time_ns()),
        "message": {"role": "assistant", "content": text},
        **end,
    }


def _generate_line(request: dict[str, Any], end: dict[str, Any], text: str = "") -> dict[str, Any]:
    line = {"model": request["model"], "created_at": timestamp(time.time_ns()), "response": text, **end}
    if "total_duration" in line and not request.get("raw"):
        line["context"] = list(range(end["prompt_eval_count"] + end["eval_count"] - 1))
    return line


def _end(piece: Piece) -> dict[str, Any]:
    if piece.metrics is None:
        return {"done": False}
    return {"done": True, "done_reason": piece.reason, **piece.metrics.as_dict()}


async def _send_answer(
    inference: Inference,
    exchange: Exchange,
    request: dict[str, Any],
    pieces: AsyncIterator[Piece],
    shape: Any,
) -> None:
    if request.get("stream") is False:
        text = ""
        async for piece in pieces:
            text += piece.text
        await send_json(exchange, shape(request, _end(piece), text))
        return
    await send_lines(inference, exchange, (shape(request, _end(piece), piece.text) async for piece in pieces))


async def send_lines(inference: Inference, exchange: Exchange, lines: AsyncIterator[dict[str, Any]]) -> None:
    """Stream NDJSON, with the error line where a knob wants one."""
    exchange.start_stream(NDJSON)
    last = b""
    try:
        async for line in lines:
            await exchange.write(dumps(line) + b"\n")
    except MidStreamError:
        last = dumps({"error": inference.knobs.error_text}) + b"\n"
    await exchange.end_stream(last)


async def embed(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "EmbedRequest")
    began = time.monotonic_ns()
    values, load_ns, tokens = await embedded(inference, request)
    answer: dict[str, Any] = {"model": request["model"], "embeddings": values}
    if values:
        answer |= {
            "total_duration": time.monotonic_ns() - began,
            "load_duration": max(load_ns, 1),
            "prompt_eval_count": tokens,
        }
    await send_json(exchange, answer)


async def embedded(inference: Inference, request: dict[str, Any]) -> tuple[list[list[float]], int, int]:
    """Vectors of the input, load time in nanoseconds and tokens read. Raises RequestError."""
    given = request.get("input", [])
    texts = [given] if isinstance(given, str) and given else given or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "invalid input type")
    model = find_model(inference, request.get("model", ""), 'model "{}" not found, try pulling it first')
    async with inference.running(model, request.get("keep_alive")) as load_ns:
        if texts and not model.embedding:
            raise RequestError(501, "this model does not support embeddings")
        await _take_time(inference)
        counts = [count_tokens(text) + 2 for text in texts]
        if request.get("truncate") is False and any(count > model.context_length for count in counts):
            raise RequestError(400, "the input length exceeds the context length")
        dimensions = request.get("dimensions", 0)
        values = [vector(text, VECTOR_DIMENSIONS) for text in texts]
        if 0 < dimensions < VECTOR_DIMENSIONS:
            values = [normalised(value[:dimensions]) for value in values]
        return values, load_ns, sum(min(count, model.context_length) for count in counts)


async def embeddings(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "EmbeddingRequest")
    model = find_model(inference, request.get("model", ""), 'model "{}" not found, try pulling it first')
    prompt = request.get("prompt", "")
    async with inference.running(model, request.get("keep_alive")):
        if not prompt:
            await send_json(exchange, {"embedding": []})
            return
        if not model.embedding:
            raise RequestError(500, "this model does not support embeddings")
        await _take_time(inference)
        await send_json(
            exchange, {"embedding": as_doubles(vector(prompt, VECTOR_DIMENSIONS), _UNNORMALISED_SCALE)}
        )


async def _take_time(inference: Inference) -> None:
    """An embedding takes as long as one token."""
    if inference.knobs.tokens_per_s > 0:
        await asyncio.sleep(1 / inference.knobs.tokens_per_s)


async def tags(inference: Inference, exchange: Exchange) -> None:
    models = [
        {
            "name": model.name,
            "model": model.name,
            "modified_at": model.modified_at,
            "size": model.size,
            "digest": model.digest,
            "details": model.details,
        }
        for model in inference.library.all()
    ]
    await send_json(exchange, {"models": models})


async def ps(inference: Inference, exchange: Exchange) -> None:
    await send_json(exchange, {"models": inference.scheduler.listing()})


async def version(inference: Inference, exchange: Exchange) -> None:
    await send_json(exchange, {"version": inference.knobs.version})


async def copy(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "CopyRequest")
    try:
        destination = Name.parse(request.get("destination", ""))
    except BadNameError as error:
        raise RequestError(400, f'destination "{error}" is invalid') from None
    source = find_model(inference, request.get("source", ""), 'model "{}" not found')
    inference.library.put(renamed(source, destination, timestamp(time.time_ns()), digest=source.digest))
    await exchange.answer(200)


async def delete(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "DeleteRequest")
    model = find_model(inference, request.get("model") or request.get("name", ""))
    inference.scheduler.expire(model)
    inference.library.remove(model.parsed)
    await exchange.answer(200)


async def create(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "CreateRequest")
    text = request.get("model") or request.get("name", "")
    try:
        name = Name.parse(text)
    except BadNameError:
        raise RequestError(400, "invalid model name") from None
    if not request.get("from"):
        raise RequestError(400, "neither 'from' or 'files' was specified")
    await _send_progress(inference, exchange, request, _created(inference, name, request))


async def _created(
    inference: Inference, name: Name, request: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    source = inference.library.get(Name.parse(request["from"]))
    if source is None:
        yield {"status": "pulling manifest"}
        yield {"error": _unreachable(Name.parse(request["from"]))}
        return
    made = renamed(
        source, name, timestamp(time.time_ns()), parent=source.name, system=request.get("system", "")
    )
    template_layer, parameters_layer = source.digest, source.layer[::-1]
    yield {"status": f"using existing layer sha256:{source.layer}"}
    yield {"status": f"using existing layer sha256:{template_layer}"}
    if made.system:
        yield {"status": f"creating new layer sha256:{made.digest}"}
    yield {"status": f"using existing layer sha256:{parameters_layer}"}
    yield {"status": "writing manifest"}
    inference.library.put(made)
    yield {"status": "success"}


async def pull(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "PullRequest")
    try:
        name = Name.parse(request.get("model") or request.get("name", ""))
    except BadNameError:
        raise RequestError(400, "invalid model name") from None
    await _send_progress(inference, exchange, request, _pulled(inference, name))


async def _pulled(inference: Inference, name: Name) -> AsyncIterator[dict[str, Any]]:
    yield {"status": "pulling manifest"}
    offered = (described(item) for item in inference.knobs.pullable.split(",") if item.strip())
    model = next((model for model in offered if model.parsed.key == name.key), None)
    if model is None:
        yield {"error": _unreachable(name)}
        return
    steps = 4
    progress = {
        "status": f"pulling {model.layer[:12]}",
        "digest": f"sha256:{model.layer}",
        "total": model.size,
    }
    yield progress
    for step in range(1, steps + 1):
        await asyncio.sleep(inference.knobs.pull_s / steps)
        yield {**progress, "completed": model.size * step // steps}
    yield {"status": "verifying sha256 digest"}
    yield {"status": "writing manifest"}
    inference.library.put(renamed(model, name, timestamp(time.time_ns()), digest=model.digest))
    yield {"status": "success"}


async def push(inference: Inference, exchange: Exchange) -> None:
    request = await read(exchange, "PushRequest")
    model = find_model(inference, request.get("model") or request.get("name", ""))
    await _send_progress(inference, exchange, request, _pushed(model))


async def _pushed(model: Model) -> AsyncIterator[dict[str, Any]]:
    yield {"status": "retrieving manifest"}
    yield {"error": f"dial tcp: lookup {model.parsed.host}: no such host"}


def _unreachable(name: Name) -> str:
    url = f"https://{name.host}/v2/{name.namespace}/{name.model}/manifests/{name.tag}"
    return f'pull model manifest: Get "{url}": dial tcp: lookup {name.host}: no such host'


async def _send_progress(
    inference: Inference, exchange: Exchange, request: dict[str, Any], lines: AsyncIterator[dict[str, Any]]
) -> None:
    """Progress as NDJSON, or, when the request wants no stream, the last of it."""
    if request.get("stream", True):
        await send_lines(inference, exchange, lines)
        return
    last: dict[str, Any] = {}
    async for line in lines:
        last = line
    await exchange.answer(500 if "error" in last else 200, "application/json", dumps(last))
