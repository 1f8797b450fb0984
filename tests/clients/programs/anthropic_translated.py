"""What one version of the Python client of Anthropic gets of a server of another dialect: argument URL."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tests.clients.programs.report import report

if TYPE_CHECKING:
    from tests.clients.programs.report import Cases

anthropic: Any = import_module("anthropic")

TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
QUESTION: dict[str, Any] = {"role": "user", "content": "hi"}
ASK: dict[str, Any] = {"model": "ours", "max_tokens": 2000, "messages": [QUESTION], "tools": [TOOL]}


def cases(url: str) -> Cases:
    client = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=60)
    create = client.messages.create
    return {
        "whole": lambda: _told(create(**ASK)),
        "stream": lambda: _streamed(client),
        "round": lambda: _told(create(**{**ASK, "messages": [QUESTION, *_answered(create(**ASK))]})),
        "refused": lambda: create(**{**ASK, "tools": [{"type": "bash_20250124", "name": "bash"}]}),
    }


def _told(message: Any) -> dict[str, Any]:
    told: dict[str, Any] = message.to_dict()
    return told


def _streamed(client: Any) -> dict[str, Any]:
    with client.messages.stream(**ASK) as stream:
        return _told(stream.get_final_message())


def _answered(message: Any) -> list[dict[str, Any]]:
    (call,) = (block for block in message.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    return [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]


if __name__ == "__main__":
    report(cases(sys.argv[1]), sys.argv[2:])
