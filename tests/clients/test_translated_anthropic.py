"""Anthropic's own clients at a server of OpenAI's API. `make test-clients` installs them."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.target import Protocol
from tests.clients.others import CLIENTS, ROOT
from tests.support.translated import Stand, standing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.clients.others import Client

_MODULE = "tests.clients.programs.anthropic_translated"
ANTHROPICS = [client for client in CLIENTS if client.program == "anthropic_client.py"]
CONTENT = [
    {"type": "thinking", "thinking": "hmm", "signature": ""},
    {"type": "text", "text": "Grüß dich"},
    {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}},
]
REFUSAL = "possible are tools with an input_schema"


@pytest.fixture
def stand() -> Iterator[Stand]:
    with standing(Protocol.OPENAI) as running:
        yield running


@pytest.mark.parametrize("client", ANTHROPICS, ids=lambda client: client.name)
def test_a_client_reads_what_is_made_of_the_answers(client: Client, stand: Stand) -> None:
    if not (client.home / ".installed").exists():
        pytest.skip("`make test-clients` installs it")
    python = client.home / "bin" / "python"
    done = subprocess.run(
        [str(python), "-m", _MODULE, stand.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)

    assert found["whole"]["content"] == CONTENT
    assert found["whole"]["usage"] == {
        "input_tokens": 10,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 5,
        "output_tokens": 20,
    }
    assert found["round"] == found["whole"]
    # Versions before thinking pass over it in a stream.
    assert found["stream"]["content"][-2:] == CONTENT[-2:]
    assert found["stream"]["stop_reason"] == "tool_use"
    assert REFUSAL in found["refused"]
    assert [one["role"] for one in stand.asked[-1]["messages"]] == ["user", "assistant", "tool"]
