"""The choice of a role for a request that names no model: `auto`, or `auto:fast` where the tier is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from manager.domain.classification import Tier, classify
from manager.domain.models import DEFAULT_TAG, split_pin
from manager.domain.roles import RequestKind

if TYPE_CHECKING:
    from manager.domain.classification import AutoRules, Classification
    from manager.domain.roles import Role, RoutingSettings

AUTO = "auto"
# The names that mean it, and the tier that each of them forces.
_NAMES: dict[str, Tier | None] = {
    AUTO: None,
    f"{AUTO}:{DEFAULT_TAG}": None,
    **{f"{AUTO}:{tier.value}": tier for tier in Tier},
}
NAMES = (AUTO, *(f"{AUTO}:{tier.value}" for tier in Tier))


class Choice(NamedTuple):
    """What a request is about, and the role that answers it; None where none can, as `message` says.

    `model` names the role for routing, with the instance that the request is pinned to.
    """

    classification: Classification
    role: str | None
    model: str
    message: str = ""


def is_auto(model: str, kind: RequestKind, settings: RoutingSettings) -> bool:
    """Return whether a name leaves the choice of the model to the daemon.

    Embeddings are no such case: vectors of two models cannot be compared.
    """
    if settings.auto is None or kind is not RequestKind.GENERATE or model[:4].lower() != AUTO:
        return False
    return split_pin(model)[0].strip().lower() in _NAMES


def choose(model: str, text: str, settings: RoutingSettings, rules: AutoRules) -> Choice:
    """Return the role for a request: that of its task, else that of its tier.

    The role of the task is left out where the words of the request, or its name, ask for another tier.

    Args:
        model: a name that `is_auto`.
        text: what the user asks.
        settings: the roles.
        rules: those of `settings`.
    """
    name, pin = split_pin(model)
    forced = _NAMES[name.strip().lower()]
    found = classify(text, rules.lexicon, forced=forced, escalate_below=rules.escalate_below)
    of_task = None if found.is_moved or forced is not None else found.task_type
    for wanted in (of_task, found.tier.value):
        role = settings.roles.get(wanted) if wanted is not None else None
        if role is not None and _can_answer(role, settings):
            return Choice(found, role.name, role.name if pin is None else f"{role.name}@{pin}")
    message = (
        f"{AUTO!r}: this request needs the tier {found.tier.value!r} ({found.reasoning}), "
        f"and no role of that name has a model; set roles.{found.tier.value}.model"
    )
    return Choice(found, None, model, message)


def _can_answer(role: Role, settings: RoutingSettings) -> bool:
    if role.kind is not RequestKind.GENERATE:
        return False
    return bool(settings.models_of(role)) or bool(role.fallbacks)
