"""The decoded fields of a request with all changes of its role made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.wire.body import combined, reading
from manager.wire.json_values import loaded
from manager.wire.rewriting import body_for, rewriting
from manager.wire.steps import run

if TYPE_CHECKING:
    from manager.domain.roles import BodyChanges
    from manager.wire.body import Fields, InferenceBody
    from manager.wire.routes import Route


def changed_values(body: InferenceBody, route: Route, model: str, changes: BodyChanges) -> dict[str, Any]:
    """Return the fields of the request with all changes made, each once.

    Raises:
        BadBodyError: a field cannot be decoded.
    """
    return {name: loaded(value) for name, value in _changed(body, route, model, changes).items()}


def _changed(body: InferenceBody, route: Route, model: str, changes: BodyChanges) -> Fields:
    if changes.empty:
        return combined(body, route).fields if body.is_small else body.fields
    pieces = (
        [body_for(body, route, model, changes)]
        if body.is_small
        else run(rewriting(body, route, model, changes))
    )
    return run(reading([bytes(piece) for piece in pieces], route, 0)).fields
