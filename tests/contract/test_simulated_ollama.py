"""What the simulated Ollama does beyond the recordings: model lifetimes, cancelling, knobs, the end."""

from __future__ import annotations

import json
import signal
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.support.daemon import wait_for
from tests.support.ollama import RunningOllama, running_ollama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 10.0
MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = {"model": "tiny", "messages": MESSAGES}


@pytest.fixture
def ollama() -> Iterator[RunningOllama]:
    with running_ollama() as running:
        yield running


def ask(
    ollama: RunningOllama, path: str, body: dict[str, Any] | None = None, timeout_s: float = LIMIT_S
) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(f"{ollama.url}{path}", data), timeout=timeout_s) as answer:
        content: bytes = answer.read()
        return content


def refused(ollama: RunningOllama, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    with pytest.raises(HTTPError) as caught:
        ask(ollama, path, body)
    with caught.value as error:
        return error.code, json.loads(error.read())


def loaded(ollama: RunningOllama) -> list[Any]:
    models: list[Any] = json.loads(ask(ollama, "/api/ps"))["models"]
    return models


def raw(ollama: RunningOllama, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which the request has been sent."""
    payload = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(ollama.url.rpartition(":")[2])), timeout=LIMIT_S)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


def received_until_end(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def becomes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_model_is_unloaded_when_its_keep_alive_is_over(ollama: RunningOllama) -> None:
    ask(ollama, "/api/generate", {"model": "tiny", "keep_alive": "200ms"})
    assert [model["name"] for model in loaded(ollama)] == ["tiny:latest"]
    assert becomes_true(lambda: loaded(ollama) == [])


def test_the_expiry_stands_still_during_a_request_and_moves_at_its_end(ollama: RunningOllama) -> None:
    ask(ollama, "/api/generate", {"model": "tiny"})
    before = loaded(ollama)[0]["expires_at"]
    ollama.set(tokens_per_s=20, tokens=10)
    with raw(ollama, "/api/chat", {**CHAT, "stream": False}) as connection:
        for _ in range(3):
            assert loaded(ollama)[0]["expires_at"] == before
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    assert datetime.fromisoformat(loaded(ollama)[0]["expires_at"]) > datetime.fromisoformat(before)


def test_headers_come_after_the_load(ollama: RunningOllama) -> None:
    ollama.set(load_s=0.3)
    began = time.monotonic()
    with raw(ollama, "/api/chat", CHAT) as connection:
        connection.recv(1)
    assert time.monotonic() - began >= 0.3


def test_a_client_that_leaves_cancels_a_load(ollama: RunningOllama) -> None:
    ollama.set(load_s=60)
    with raw(ollama, "/api/chat", CHAT):
        assert becomes_true(lambda: len(loaded(ollama)) == 1)
    assert becomes_true(lambda: loaded(ollama) == [])


def test_sigterm_drops_open_streams_and_exits_with_0(ollama: RunningOllama) -> None:
    ollama.set(tokens_per_s=20, tokens=10_000)
    with raw(ollama, "/api/chat", CHAT) as connection:
        connection.recv(10)
        ollama.process.terminate()
        assert not received_until_end(connection).endswith(b"0\r\n\r\n")
    assert ollama.process.wait(LIMIT_S) == 0


def test_sigterm_can_be_ignored(ollama: RunningOllama) -> None:
    ollama.set(shutdown_s=-1)
    ollama.process.send_signal(signal.SIGTERM)
    assert ask(ollama, "/api/version")
    assert ollama.process.poll() is None


def test_hanging_before_or_after_the_headers(ollama: RunningOllama) -> None:
    ollama.set(hang="all")
    with pytest.raises(TimeoutError):
        ask(ollama, "/api/version", timeout_s=0.2)
    ollama.set(hang="body")
    with raw(ollama, "/api/chat", CHAT) as connection:
        connection.settimeout(0.3)
        assert b"\r\n\r\n" in connection.recv(4096)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    ollama.set(hang="")
    assert ask(ollama, "/api/version")


def test_a_stream_stalls_at_the_byte_that_was_asked_for(ollama: RunningOllama) -> None:
    ollama.set(stall_at_byte=10)
    with raw(ollama, "/api/chat", CHAT) as connection:
        connection.settimeout(0.3)
        data = connection.recv(4096)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    assert data.endswith(b'\r\na\r\n{"model":"\r\n')


def test_an_error_in_mid_stream_is_a_last_line(ollama: RunningOllama) -> None:
    ollama.set(error_at_byte=300, error_text="no more")
    lines = ask(ollama, "/api/chat", CHAT).splitlines()
    assert len(lines) > 1
    assert json.loads(lines[-1]) == {"error": "no more"}


def test_an_error_in_mid_stream_leaves_v1_without_a_terminator(ollama: RunningOllama) -> None:
    ollama.set(error_at_byte=600)
    body = ask(ollama, "/v1/chat/completions", {**CHAT, "stream": True})
    assert body.startswith(b"data: {")
    assert b"[DONE]" not in body


@pytest.mark.parametrize(
    ("knobs", "path"),
    [
        ({"crash": "load", "crash_exit": 7}, "/api/chat"),
        ({"crash": "stream", "crash_at_byte": 50, "crash_exit": 7}, "/api/chat"),
    ],
)
def test_a_crash_ends_the_process_with_the_code_that_was_asked_for(
    ollama: RunningOllama, knobs: dict[str, Any], path: str
) -> None:
    ollama.set(**knobs)
    with raw(ollama, path, CHAT) as connection:
        received_until_end(connection)
    assert ollama.process.wait(LIMIT_S) == 7


def test_a_crash_now(ollama: RunningOllama) -> None:
    ollama.set(crash="now", crash_exit=9)
    assert ollama.process.wait(LIMIT_S) == 9


def test_a_crash_at_start() -> None:
    with running_ollama(wait=False, crash="start", crash_exit=5) as ollama:
        assert ollama.process.wait(LIMIT_S) == 5


def test_a_late_start_leaves_the_port_closed_or_open_and_silent() -> None:
    with running_ollama(wait=False, start_delay_s=0.5) as ollama, pytest.raises(OSError, match="refused"):
        ask(ollama, "/")
    with running_ollama(start_delay_s=0.5, start_port="open") as ollama:
        with pytest.raises(TimeoutError):
            ask(ollama, "/", timeout_s=0.1)
        assert ask(ollama, "/") == b"Ollama is running"


def test_a_full_queue_is_a_503(ollama: RunningOllama) -> None:
    ollama.set(queue_full=True)
    status, body = refused(ollama, "/api/chat", CHAT)
    assert (status, body) == (
        503,
        {"error": "server busy, please try again.  maximum pending requests exceeded"},
    )
    assert refused(ollama, "/v1/chat/completions", CHAT)[1]["error"]["type"] == "api_error"


@pytest.mark.parametrize(
    ("environment", "device", "on_gpu"),
    [
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-1"}, "id=GPU-1 ", True),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-1", "OLLAMA_LLM_LIBRARY": "cpu"}, "id=cpu ", False),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-1", "OLLAMA_SIM_CPU_FALLBACK": "1"}, "id=cpu ", False),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, "id=cpu ", False),
    ],
)
def test_the_device_follows_the_environment(environment: dict[str, str], device: str, on_gpu: bool) -> None:
    with running_ollama(environment, vram_bytes=3_000_000) as ollama:
        ask(ollama, "/api/generate", {"model": "tiny"})
        assert loaded(ollama)[0]["size_vram"] == (3_000_000 if on_gpu else 0)
        (line,) = [line for line in ollama.log.read_text().splitlines() if "inference compute" in line]
        assert device in line


def test_memory_is_really_held_and_given_back(ollama: RunningOllama) -> None:
    before = resident_bytes(ollama.process.pid)
    ollama.set(allocate_bytes=100 << 20)
    assert resident_bytes(ollama.process.pid) - before > 90 << 20
    ollama.set(allocate_bytes=0)
    assert resident_bytes(ollama.process.pid) - before < 10 << 20


def test_a_busy_server_burns_a_core_and_still_answers(ollama: RunningOllama) -> None:
    ollama.set(burn_cpu=True, tokens_per_s=20, tokens=400)
    before = cpu_s(ollama.process.pid)
    with raw(ollama, "/api/chat", {**CHAT, "stream": False}):
        assert ask(ollama, "/api/version", timeout_s=5)
        # On a busy machine its share is small; without that load it uses 0.06 s in that time.
        wait_for(lambda: cpu_s(ollama.process.pid) - before, lambda used: used > 0.15, within_s=15)


def test_an_idle_server_does_nothing(ollama: RunningOllama) -> None:
    ask(ollama, "/api/version")
    seen = [-1]

    def is_done_with_the_question() -> bool:
        seen.append(context_switches(ollama.process.pid))
        time.sleep(0.05)
        return seen[-1] == seen[-2]

    wait_for(is_done_with_the_question)
    time.sleep(0.5)  # nothing happens in all that time
    assert context_switches(ollama.process.pid) == seen[-1]


def test_a_pull_of_an_offered_model_makes_it_listed(ollama: RunningOllama) -> None:
    ollama.set(pullable="qwen3:0.6b,nomic=embed")
    lines = [json.loads(line) for line in ask(ollama, "/api/pull", {"model": "qwen3:0.6b"}).splitlines()]
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[-1] == {"status": "success"}
    ask(ollama, "/api/pull", {"model": "nomic", "stream": False})
    names = [model["name"] for model in json.loads(ask(ollama, "/api/tags"))["models"]]
    assert names == ["nomic:latest", "qwen3:0.6b", "minilm:latest", "tiny:latest"]
    assert refused(ollama, "/api/chat", {**CHAT, "model": "nomic"})[0] == 400


def test_an_embedding_of_a_chat_model_is_refused(ollama: RunningOllama) -> None:
    assert refused(ollama, "/api/embed", {"model": "tiny", "input": "x"}) == (
        501,
        {"error": "this model does not support embeddings"},
    )


def test_streamed_responses_end_with_the_whole_object(ollama: RunningOllama) -> None:
    body = ask(ollama, "/v1/responses", {"model": "tiny", "input": "hello", "stream": True}).decode()
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == deltas


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"speed": 1}, "unknown knob 'speed'; known: version, models"),
        ({"tokens": "many"}, "knob 'tokens' takes int, not 'many'"),
        ({"crash": "later"}, "knob 'crash' takes one of '', 'now', 'start', 'load', 'stream', not 'later'"),
        ({"queue_full": 2}, "knob 'queue_full' takes bool, not 2"),
    ],
)
def test_a_wrong_knob_is_a_400_that_says_what_is_wrong(
    ollama: RunningOllama, knobs: dict[str, Any], complaint: str
) -> None:
    status, body = refused(ollama, "/_sim/knobs", knobs)
    assert status == 400
    assert body["error"].startswith(complaint)


def test_knobs_are_shown(ollama: RunningOllama) -> None:
    assert ollama.set(tokens=3)["tokens"] == 3
    assert json.loads(ask(ollama, "/_sim/knobs"))["tokens"] == 3


def resident_bytes(pid: int) -> int:
    with Path(f"/proc/{pid}/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def cpu_s(pid: int) -> float:
    with Path(f"/proc/{pid}/stat").open(encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def context_switches(pid: int) -> int:
    with Path(f"/proc/{pid}/status").open(encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
