"""What one version of the Python client of Anthropic gets: argument URL; prints JSON, outcome by case."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tests.clients.programs.report import report

if TYPE_CHECKING:
    from tests.clients.programs.report import Cases

anthropic: Any = import_module("anthropic")

ASK: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 20,
    "messages": [{"role": "user", "content": "hello"}],
}
NOBODYS: dict[str, Any] = {**ASK, "model": "nope"}


def cases(url: str) -> Cases:
    client = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=60)
    create = client.messages.create
    return {
        "stream": lambda: _streamed(client),
        "chat": lambda: create(**ASK).content[0].text,
        "events": lambda: [event.type for event in create(**ASK, stream=True)],
        "tools": lambda: create(**ASK, tools=[{"name": "w", "input_schema": {"type": "object"}}]),
        "not found": lambda: create(**NOBODYS),
        "stream not found": lambda: list(create(**NOBODYS, stream=True)),
    }


def _streamed(client: Any) -> str:
    with client.messages.stream(**ASK) as stream:
        return "".join(stream.text_stream)


if __name__ == "__main__":
    report(cases(sys.argv[1]), sys.argv[2:])
