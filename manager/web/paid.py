"""The paid servers that requests may reach, as several pages name them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manager.api.backend import Backend


def paid_servers(backend: Backend) -> list[str]:
    """Return the ids of the paid servers in the order of `fallback.order`, which may leave some out."""
    servers = [one.id for one in backend.fleet.instances() if one.spec.is_paid]
    order = backend.model_settings.routing.fallback.order
    return [name for name in order if name in servers] if order else servers
