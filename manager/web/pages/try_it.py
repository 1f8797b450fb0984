"""Try it: a conversation with a role, a model or an instance, and the same request as code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.api.granted import permit_of
from manager.domain.instance import Driver
from manager.web.page import Page

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.domain.instance import InstanceSpec
    from manager.web.viewer import Viewer

# In the order of the chooser.
_PLACES = ("gpu", "cpu", "external", "cloud")


async def _context(backend: Backend, _viewer: Viewer, request: Request) -> Mapping[str, Any]:
    """Return the instances that the viewer's key may use, by the kind of their device."""
    permit = permit_of(request.scope)
    places: dict[str, list[str]] = {place: [] for place in _PLACES}
    for instance in backend.fleet.instances():
        if permit is None or not permit.limit_of_instance(instance.id):
            places[_place(instance.spec)].append(instance.id)
    rules = backend.model_settings.routing.auto
    return {
        "has_auto": rules is not None and rules.is_on,
        "places": {place: ids for place, ids in places.items() if ids},
        "needs_key": backend.keyring.are_required,
    }


def _place(spec: InstanceSpec) -> str:
    if spec.driver is Driver.CLOUD:
        return "cloud"
    return "external" if spec.device_kind is None else spec.device_kind.value


TRY = Page("try", "/ui/try", scope="client", context=_context)
