"""Other people's clients, in several generations, get through the gateway what they get without it.

`make test-clients` installs them; without it everything here is skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.clients.others import CLIENTS, HOME, OLLAMA_VERSIONS, ROOT
from tests.support.gateway import Gateway, gateway_over
from tests.support.ollama import RunningOllama, running_ollama

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.clients.others import Client

_COMMENT_EVERY_S = 0.1
_LOAD_S = 1.0
_LIMIT_S = 240
# The gateway adds what there is to the words of Ollama.
_ADDED = re.compile(r"; models: [a-z:, ]*[a-z]")
_OF_ONE_ANSWER = re.compile(r"(?<=req_|esp_|msg_)[0-9a-f]+|(?<=127\.0\.0\.1:)[0-9]+")

PULLABLE: dict[str, Any] = {"pullable": "big"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config = {"gateway": {"keep_alive_s": _COMMENT_EVERY_S}}
    with gateway_over(tmp_path_factory.mktemp("others"), knobs={"one": PULLABLE}, config=config) as running:
        yield running


@pytest.fixture(scope="module")
def direct() -> Iterator[RunningOllama]:
    with running_ollama(**PULLABLE) as running:
        yield running


@pytest.fixture
def slow_to_load(gateway: Gateway) -> Iterator[Gateway]:
    """Nothing is loaded, and a load takes several comments."""
    (server,) = gateway.servers.values()
    requests.post(f"{server.url}/api/generate", json={"model": "tiny", "keep_alive": 0}, timeout=10)
    server.set(load_s=_LOAD_S)
    yield gateway
    server.set(load_s=0)


def outcomes(client: Client, url: str, *only: str) -> dict[str, Any]:
    if not (client.home / ".installed").exists():
        pytest.skip("`make test-clients` installs it")
    done = subprocess.run(
        [*client.command, url, *only], cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def comparable(found: dict[str, Any]) -> dict[str, str]:
    return {name: _OF_ONE_ANSWER.sub("", _ADDED.sub("", str(outcome))) for name, outcome in found.items()}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_gets_what_it_gets_without_the_gateway(
    client: Client, gateway: Gateway, direct: RunningOllama
) -> None:
    with ThreadPoolExecutor(2) as side_by_side:
        through, without = side_by_side.map(
            lambda url: comparable(outcomes(client, url)), (gateway.url, direct.url)
        )
    assert through == without
    assert through["stream"].startswith("the quick brown fox")
    assert through["chat"].startswith("the quick brown fox")
    assert re.search("not ?found|404", through["not found"], re.IGNORECASE)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_reads_its_stream_after_the_comments_of_a_wait(
    client: Client, slow_to_load: Gateway
) -> None:
    assert outcomes(client, slow_to_load.url, "stream")["stream"].startswith("the quick brown fox")


def test_a_waiting_stream_gets_comments(slow_to_load: Gateway) -> None:
    """So the test above is about something. An empty line ends an event: none may follow a comment."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
    answer = requests.post(f"{slow_to_load.url}/v1/chat/completions", json=body, timeout=30)
    waited, _, _ = answer.text.partition("data: ")
    assert re.fullmatch(r"(: [^\n]+\n){3,}", waited)


# --- the ollama command ---------------------------------------------------------------------------

COMMANDS = (
    "list", "show tiny", "show tiny --modelfile", "show nope", "run tiny hello",
    "run --format json tiny hello",
    "run nope hello", "run minilm hello", "run tiny describe\u00a0{image}", "pull big", "pull nothere",
    "create brief -f {modelfile}", "show brief --system", "cp brief copied", "cp nope copied",
    "push brief", "push nope", "stop tiny", "stop nope", "ps", "rm brief copied big", "rm nope",
    "signin", "signout", "list",
)  # fmt: skip
_FRAMES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]|\r")
_AGES = re.compile(r"(?:About a|Less than a|[0-9]+|a) (?:second|minute|hour|day)s? ago")


@pytest.mark.parametrize("version", OLLAMA_VERSIONS)
def test_the_ollama_command_does_what_it_does_without_the_gateway(
    version: str, gateway: Gateway, direct: RunningOllama, tmp_path: Path
) -> None:
    program = HOME / f"ollama-{version}" / "ollama"
    if not program.exists():
        pytest.skip("`make test-clients` installs it")
    modelfile, image = tmp_path / "Modelfile", tmp_path / "image.png"
    modelfile.write_text("FROM tiny\nSYSTEM Be brief.\n")
    image.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))

    def said(url: str, line: str, given: str) -> tuple[int, str, str]:
        words = line.format(modelfile=modelfile, image=image).split(" ")
        done = subprocess.run(
            [str(program), *(word.replace("\u00a0", " ") for word in words)],
            env={**os.environ, "OLLAMA_HOST": url, "HOME": str(tmp_path)},
            input=given,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        texts = (_AGES.sub("", _FRAMES.sub("", text)) for text in (done.stdout, done.stderr))
        out, err = (" ".join(_ADDED.sub("", text).split()) for text in texts)
        # How many frames of a progress bar are drawn is a matter of time; its last word, or an error, is not.
        error = err[err.find("Error") :] if "Error" in err else "".join(err.split()[-1:])
        return done.returncode, out, error

    for line, given in (*((line, "") for line in COMMANDS), ("run tiny", "a text from a pipe")):
        assert said(gateway.url, line, given) == said(direct.url, line, given), line
