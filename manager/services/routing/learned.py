"""Vectors of requests for the learned classifier, made by an embedding model behind the gateway."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson
import structlog

from manager.errors import ManagerError
from manager.services.requests import Origin
from manager.services.routing.whole import Asking
from manager.wire.routes import INFERENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manager.services.routing.whole import WholeRequests

_log = structlog.get_logger("routing")

PATH = "/api/embed"
_ROUTE = INFERENCE[b"/api/embed"]
_PROJECT = "ollama-manager"
# A request waits so long for its classification; then the words decide.
TIMEOUT_S = 2.0
# Most embedding models read 512 tokens.
MOST_CHARACTERS = 4000


async def vector_of(whole: WholeRequests, text: str, model: str) -> Sequence[float] | None:
    """Return the vector of a text; None where no server has made one in time.

    Args:
        whole: makes the request. It is local, and none of the client's.
        text: what the user asks; its beginning counts.
        model: an embedding model or role.
    """
    asking = Asking(Origin(None, None, _PROJECT, None, True, None, None), None, PATH)
    fields = {"model": model, "input": text[:MOST_CHARACTERS], "truncate": True}
    try:
        async with asyncio.timeout(TIMEOUT_S):
            found = await whole.ask(_ROUTE, fields, asking)
        vector = orjson.loads(found.content)["embeddings"][0]
    except (ManagerError, TimeoutError, ValueError, LookupError, TypeError) as error:
        _log.warning("not_classified", model=model, problem=str(error) or "no answer in time")
        return None
    is_vector = isinstance(vector, list) and all(isinstance(one, int | float) for one in vector)
    return vector if is_vector else None
