"""The gate in front of an application that a test writes."""

from __future__ import annotations

from typing import Any

from manager.api.gate import Gate
from manager.api.granted import OpenByKey
from manager.web.doors import PageDoors
from manager.web.rendering import Renderer
from manager.wire.access import Access


def gate_before(app: Any) -> Gate:
    """A gate that needs no key, for the host `localhost`."""
    return Gate(
        app,
        access=Access(allowed_hosts=["localhost"]),
        refused=lambda *_: None,
        used=set(),
        open_requests=OpenByKey(),
        doors=PageDoors(Renderer()),
    )
