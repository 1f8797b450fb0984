"""What one generation of the Python client of OpenAI gets: argument URL; prints JSON, outcome by case."""

from __future__ import annotations

import io
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tests.clients.programs.report import report

if TYPE_CHECKING:
    from tests.clients.programs.report import Cases

warnings.filterwarnings("ignore")
openai: Any = import_module("openai")

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
NOBODYS: dict[str, Any] = {**ASK, "model": "nope"}
RECORDING = b"RIFF" + bytes(1000)
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True}}


def recording() -> io.BytesIO:
    file = io.BytesIO(RECORDING)
    file.name = "a.wav"
    return file


def before_1(url: str) -> Cases:
    openai.api_base, openai.api_key = f"{url}/v1", "unused"
    return {
        "stream": lambda: _text(openai.ChatCompletion.create(**ASK, stream=True)),
        "chat": lambda: openai.ChatCompletion.create(**ASK)["choices"][0]["message"]["content"],
        "models": lambda: sorted(model["id"] for model in openai.Model.list()["data"]),
        "model": lambda: openai.Model.retrieve("tiny")["id"],
        "completion": lambda: openai.Completion.create(model="tiny", prompt="x")["choices"][0]["text"],
        "embeddings": lambda: len(
            openai.Embedding.create(model="minilm", input="a", encoding_format="float")["data"]
        ),
        "functions": lambda: openai.ChatCompletion.create(**ASK, functions=[TOOL])["object"],
        "transcription": lambda: openai.Audio.transcribe("tiny", recording())["text"],
        "not found": lambda: openai.ChatCompletion.create(**NOBODYS),
        "stream not found": lambda: list(openai.ChatCompletion.create(**NOBODYS, stream=True)),
    }


def since_1(url: str) -> Cases:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
    chat = client.chat.completions
    return {
        "stream": lambda: _text(chat.create(**ASK, stream=True)),
        "chat": lambda: chat.create(**ASK).choices[0].message.content,
        "models": lambda: sorted(model.id for model in client.models.list()),
        "model": lambda: client.models.retrieve("tiny").id,
        "usage": lambda: chat.create(**ASK).usage.completion_tokens,
        "raw": lambda: chat.with_raw_response.create(**ASK).headers["content-type"],
        "tools": lambda: chat.create(**ASK, tools=[{"type": "function", "function": TOOL}]),
        "structured": lambda: chat.create(**ASK, response_format=SCHEMA).choices[0].finish_reason,
        "completion": lambda: client.completions.create(model="tiny", prompt="x").choices[0].text,
        "embeddings": lambda: [
            len(one.embedding) for one in client.embeddings.create(model="minilm", input=["a", "b"]).data
        ],
        "responses": lambda: client.responses.create(model="tiny", input="x").output_text,
        "responses, streamed": lambda: [
            event.type for event in client.responses.create(model="tiny", input="x", stream=True)
        ],
        "transcription": lambda: client.audio.transcriptions.create(model="tiny", file=recording()).text,
        "not found": lambda: chat.create(**NOBODYS),
        "stream not found": lambda: list(chat.create(**NOBODYS, stream=True)),
        "no messages": lambda: chat.create(model="tiny", messages=[]),
    }


def _text(stream: Any) -> str:
    deltas = (
        choice["delta"] if isinstance(choice, dict) else choice.delta
        for part in stream
        for choice in part.choices
    )
    return "".join(
        (delta.get("content") if isinstance(delta, dict) else delta.content) or "" for delta in deltas
    )


if __name__ == "__main__":
    report((since_1 if hasattr(openai, "OpenAI") else before_1)(sys.argv[1]), sys.argv[2:])
