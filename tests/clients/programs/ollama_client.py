"""What one version of the Python client of Ollama gets: argument URL; prints JSON, outcome by case."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tests.clients.programs.report import report

if TYPE_CHECKING:
    from tests.clients.programs.report import Cases

ollama: Any = import_module("ollama")

MESSAGES = [{"role": "user", "content": "hello"}]


def cases(url: str) -> Cases:
    client = ollama.Client(url)
    return {
        "stream": lambda: "".join(
            part["message"]["content"] for part in client.chat(model="tiny", messages=MESSAGES, stream=True)
        ),
        "chat": lambda: client.chat(model="tiny", messages=MESSAGES)["message"]["content"],
        "generate": lambda: client.generate(model="tiny", prompt="x", format="json")["response"],
        "image": lambda: client.generate(model="tiny", prompt="x", images=[b"an image"])["done"],
        "embeddings": lambda: len(client.embeddings(model="minilm", prompt="x")["embedding"]),
        "models": lambda: sorted(model["digest"] for model in client.list()["models"]),
        "show": lambda: client.show("tiny")["details"]["family"],
        "pull": lambda: [part["status"] for part in client.pull("big", stream=True)][-1],
        "copy": lambda: str(client.copy("big", "copied")),
        "push": lambda: client.push("copied")["status"],
        "delete": lambda: str([client.delete(name) for name in ("big", "copied")]),
        "not found": lambda: client.chat(model="nope", messages=MESSAGES),
        "stream not found": lambda: list(client.chat(model="nope", messages=MESSAGES, stream=True)),
    }


if __name__ == "__main__":
    report(cases(sys.argv[1]), sys.argv[2:])
