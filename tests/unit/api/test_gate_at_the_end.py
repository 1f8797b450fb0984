"""What the gate answers when the server cancels what outlasts the drain."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support.gated_app import gate_before


async def cancelled(path: str, *, starts: bool) -> list[Any]:
    """The messages of a request that is cancelled while its route works."""
    working, sent = asyncio.Event(), []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        if starts:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        working.set()
        await asyncio.Event().wait()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    gate = gate_before(app)
    scope = {
        "type": "http",
        "method": "POST",
        "raw_path": path.encode(),
        "headers": [(b"host", b"localhost")],
    }
    task = asyncio.ensure_future(gate(scope, receive, send))
    await working.wait()
    task.cancel()
    await task
    return sent


@pytest.mark.parametrize("path", ["/api/runtime/compute/instances/cpu/start", "/api/show", "/v1/models"])
async def test_a_request_that_is_cut_off_is_told_so(path: str) -> None:
    start, *bodies = await cancelled(path, starts=False)
    headers = {name.lower(): value for name, value in start["headers"]}
    assert (start["status"], headers[b"connection"], headers[b"retry-after"]) == (503, b"close", b"1")
    error = json.loads(b"".join(body.get("body", b"") for body in bodies))["error"]
    text = error if isinstance(error, str) else error["message"]
    assert text == "cut off: the manager is being stopped"


async def test_an_answer_that_has_begun_is_left_without_its_end() -> None:
    assert [message["type"] for message in await cancelled("/x", starts=True)] == ["http.response.start"]
