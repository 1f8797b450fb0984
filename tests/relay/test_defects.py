"""A defect costs one request an answer, and nothing else anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.inside import until
from tests.support.relaying import Scripted, relaying

if TYPE_CHECKING:
    from pathlib import Path

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("warm", [True, False], ids=["in a callback", "in a task"])
async def test_a_defect_while_a_request_is_sent_is_an_error_and_gives_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, warm: bool
) -> None:
    def fails(*_: object) -> bytes:
        raise ZeroDivisionError

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        if warm:
            assert (await front.ask(TINY)).status == 200
        monkeypatch.setattr("manager.relay.exchange.body_for", fails)
        reply = await front.ask(TINY)
        assert reply.status == 500
        assert "its log says more" in reply.json()["error"]
        await until(lambda: front.at_rest)
        monkeypatch.undo()
        assert (await front.ask(TINY)).status == 200
