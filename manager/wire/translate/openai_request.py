"""Requests in the words of OpenAI's API, from the neutral form.

Source: OpenAI's reference of chat completions; vLLM `entrypoints/openai/chat_completion/protocol.py` and
llama.cpp `tools/server/README.md` for what they take beyond it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.wire.translate.codec import Untranslatable
from manager.wire.translate.hub import Image, Text
from manager.wire.translate.media import IMAGE_TYPES, media_type_of
from manager.wire.translate.schemas import closed

if TYPE_CHECKING:
    from manager.wire.translate.codec import Traits
    from manager.wire.translate.hub import Conversation, Message, Part, Tool
    from manager.wire.translate.vectors import EmbeddingRequest

# The words for a tool that has failed: OpenAI's API has no field for it.
FAILED_TOOL = "The tool failed: "
# The server's word for `think: true`, which names no degree.
_USUAL_EFFORT = "medium"


def chat_request(asked: Conversation, traits: Traits) -> dict[str, Any]:
    """Return the body of a request to /v1/chat/completions.

    Raises:
        Untranslatable: the server has no word for a part of it.
    """
    document: dict[str, Any] = {
        "model": asked.model,
        "messages": [_message(one, at, traits) for at, one in enumerate(asked.messages)],
        "stream": asked.stream,
    }
    if asked.stream and asked.wants_usage:
        document["stream_options"] = {"include_usage": True}
    said = {
        traits.max_tokens_field: asked.max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "stop": list(asked.stop) or None,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
        "parallel_tool_calls": asked.parallel_calls,
        "user": asked.user,
        "tools": [_tool(one) for one in asked.tools] or None,
        "tool_choice": _choice(asked.tool_choice),
        "response_format": _format(asked, traits),
    }
    document.update((name, value) for name, value in said.items() if value is not None)
    document.update(_beyond(asked, traits))
    document.update(_thinking(asked, traits))
    return document


def embedding_request(asked: EmbeddingRequest) -> dict[str, Any]:
    """Return the body of a request to /v1/embeddings.

    The form of the vectors is left open: numbers are the default everywhere, and not every server takes the
    field that names it.
    """
    document: dict[str, Any] = {"model": asked.model, "input": list(asked.inputs)}
    if asked.dimensions is not None:
        document["dimensions"] = asked.dimensions
    return document


# --- helpers --------------------------------------------------------------------------------------


def _message(message: Message, at: int, traits: Traits) -> dict[str, Any]:
    if message.role != "user" and any(isinstance(part, Image) for part in message.parts):
        raise Untranslatable(
            f"messages[{at}]: OpenAI's API takes images from the user only, not in messages of the role"
            f" {message.role}"
        )
    text = "".join(part.text for part in message.parts if isinstance(part, Text))
    if message.role == "tool":
        content = FAILED_TOOL + text if message.is_error else text
        return {"role": "tool", "tool_call_id": message.call_id, "content": content}
    if message.role != "assistant":
        return {"role": message.role, "content": _content(message.parts, at)}
    said: dict[str, Any] = {"role": "assistant", "content": text or (None if message.calls else "")}
    if message.thinking and traits.extended:
        # vLLM and Ollama read the one, llama.cpp and LM Studio the other. OpenAI takes no earlier thinking.
        said["reasoning"] = said["reasoning_content"] = message.thinking
    if message.calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    return said


def _content(parts: tuple[Part, ...], at: int) -> str | list[dict[str, Any]]:
    if not any(isinstance(part, Image) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, Text))
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        else:
            content.append({"type": "image_url", "image_url": {"url": _url(part, at)}})
    return content


def _url(image: Image, at: int) -> str:
    if image.url is not None:
        return image.url
    data = image.data or ""
    kind = image.media_type or media_type_of(data)
    if kind is None:
        raise Untranslatable(f"messages[{at}]: an image must be {IMAGE_TYPES} in base64")
    return f"data:{kind};base64,{data}"


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters}
    if tool.description:
        function["description"] = tool.description
    if tool.is_strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _choice(choice: str | None) -> str | dict[str, Any] | None:
    if choice is None or not choice.startswith("tool:"):
        return choice
    return {"type": "function", "function": {"name": choice.removeprefix("tool:")}}


def _format(asked: Conversation, traits: Traits) -> dict[str, Any] | None:
    if asked.schema is None:
        return None
    if not asked.schema:
        return {"type": "json_object"}
    # `strict`: OpenAI refuses a schema that it cannot enforce, instead of treating it as a hint.
    schema = asked.schema if traits.extended else closed(asked.schema)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def _beyond(asked: Conversation, traits: Traits) -> dict[str, Any]:
    """Return the samplers that OpenAI's API has no word for."""
    found: dict[str, Any] = {}
    for name, value in (("top_k", asked.top_k), ("min_p", asked.min_p)):
        if not value:
            continue  # 0 leaves a sampler out
        if not traits.extended:
            raise Untranslatable(f"{name}: OpenAI's API has no word for it; leave it out")
        found[name] = value
    return found


def _thinking(asked: Conversation, traits: Traits) -> dict[str, Any]:
    """Return what switches thinking.

    OpenAI, Gemini, Ollama, llama.cpp (since 2026) and vLLM (since 0.12) read `reasoning_effort`, where `none`
    is off; a model that cannot do it is refused by the server. Older servers, and templates of models that
    know a switch only, read `chat_template_kwargs`: vLLM passes those on that a template declares.
    """
    think = asked.think
    if think is None:
        return {}
    effort = think if isinstance(think, str) else _USUAL_EFFORT if think else "none"
    if not traits.extended:
        return {"reasoning_effort": effort}
    switches = {"chat_template_kwargs": {"enable_thinking": bool(think), "thinking": bool(think)}}
    # On means the model's own degree there, and a template may know no `medium`.
    return switches if think is True else {"reasoning_effort": effort, **switches}
