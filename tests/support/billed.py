"""A gateway in front of a local server and a paid one, as a process of its own, with keys for nothing."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.support.gateway import gateway_over
from tests.support.provider import INPUTS, OUTPUTS, Provider, speaks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.support.gateway import Gateway

# USD for a million tokens.
PRICES = {"input_usd_per_mtok": 100.0, "output_usd_per_mtok": 200.0, "max_output_tokens": 64}
COST_USD = (100 * INPUTS + 200 * OUTPUTS) / 1_000_000
CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": False, "options": {"num_predict": 3}}


class Billed(NamedTuple):
    gateway: Gateway
    provider: Provider

    def chat(self, model: str, project: str = "default") -> int:
        """One request; return its status."""
        return self.gateway.call(
            "POST", "/api/chat", json={**CHAT, "model": model}, headers={"X-Project-ID": project}
        ).status_code


@contextmanager
def provider_thread() -> Iterator[Provider]:
    """A provider on an event loop of its own, for tests that have none."""
    provider, loop = Provider(), asyncio.new_event_loop()
    provider.answer = speaks
    serves, ends = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with provider.serving():
            serves.set()
            await ends.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert serves.wait(10)
        yield provider
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join(10)
        loop.close()


@contextmanager
def billed_gateway(home: Path, **config: Any) -> Iterator[Billed]:
    """The role `fast` is answered by the local server `one`, `pays` by the paid server `paid`.

    Args:
        home: a directory of its own.
        config: sections of the configuration.
    """
    with pytest.MonkeyPatch.context() as environment, provider_thread() as provider:
        environment.setenv("PROVIDER_KEY", "sk-secret")
        paid: Mapping[str, Any] = {
            "driver": "cloud",
            "protocol": "openai",
            "url": provider.url,
            "key_env": "PROVIDER_KEY",
            "models": {"gpt": {**PRICES, "for": ["pays"]}},
        }
        full = {
            "roles": {"fast": {"model": "tiny"}, "pays": {"model": "absent", "paid_fallback": True}},
            "fallback": {"enabled": True},
            **config,
        }
        with gateway_over(home, ("one",), instances={"one": {}, "paid": paid}, config=full) as gateway:
            gateway.wait_for_phase("paid", "ready")
            yield Billed(gateway, provider)
