"""Talking to daemons and endpoints from the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from tests.support.inside import Inside


async def post(inside: Inside, path: str, **query: str) -> tuple[int, Any]:
    """Status and body of a POST to a path below the compute API."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{inside.compute_url}/{path}", params=query) as answer,
    ):
        return answer.status, await answer.json()


async def patch(inside: Inside, instance: str, **changes: object) -> Any:
    async with (
        aiohttp.ClientSession() as session,
        session.patch(f"{inside.compute_url}/instances/{instance}", json=changes) as answer,
    ):
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def get(inside: Inside, path: str) -> Any:
    """Body of a GET that must succeed; paths that begin with / are not below the compute API."""
    url = f"{inside.url}{path}" if path.startswith("/") else f"{inside.compute_url}/{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json() if answer.content_type == "application/json" else await answer.text()


async def answers(endpoint: str) -> bool:
    """Whether an Ollama answers there."""
    async with aiohttp.ClientSession() as session, session.get(f"{endpoint}/api/version") as answer:
        return answer.status == 200


async def set_knobs(endpoint: str, **knobs: object) -> None:
    """Turn knobs of a simulated Ollama."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{endpoint}/_sim/knobs", json=knobs) as answer,
    ):
        assert answer.status == 200, await answer.text()
