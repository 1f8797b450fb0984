"""The choice of a role for a request that names no model: `auto`, or `auto:fast` where the tier is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from manager.domain.classification import Classification, Tier, classify
from manager.domain.models import DEFAULT_TAG, split_pin
from manager.domain.roles import RequestKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from manager.domain.classification import AutoRules
    from manager.domain.learned import Told
    from manager.domain.roles import Role, RoutingSettings

AUTO = "auto"
# The names that mean it, and the tier that each of them forces.
_NAMES: dict[str, Tier | None] = {
    AUTO: None,
    f"{AUTO}:{DEFAULT_TAG}": None,
    **{f"{AUTO}:{tier.value}": tier for tier in Tier},
}
NAMES = (AUTO, *(f"{AUTO}:{tier.value}" for tier in Tier))
# The tiers whose model stands for `auto` in lists of models; the first one that can answer.
_USUAL = (Tier.MEDIUM, Tier.FAST, Tier.COMPLEX)


class Choice(NamedTuple):
    """The task of a request, and the role that answers it; None where none can, as `message` says.

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
    if (
        settings.auto is None
        or not settings.auto.is_on
        or kind is not RequestKind.GENERATE
        or model[:4].lower() != AUTO
    ):
        return False
    return split_pin(model)[0].strip().lower() in _NAMES


def offered(settings: RoutingSettings) -> Mapping[str, tuple[Role, ...]]:
    """Return the names that leave the choice open, each with the roles that may answer, the usual one first.

    A name is left out where no role can answer it; all are while they are names of models.
    """
    if settings.auto is None or not settings.auto.is_on:
        return {}
    roles = {tier: settings.roles.get(tier.value) for tier in _USUAL}
    able = {tier: role for tier, role in roles.items() if role is not None and _can_answer(role, settings)}
    names = {f"{AUTO}:{tier.value}": (able[tier],) for tier in Tier if tier in able}
    return {AUTO: tuple(able.values()), **names} if able else {}


def offered_name(model: str) -> str:
    """Return the name under which `offered` has a name that `is_auto`."""
    return split_pin(model)[0].strip().lower().removesuffix(f":{DEFAULT_TAG}")


def choose(
    model: str, text: str, settings: RoutingSettings, rules: AutoRules, told: Told | None = None
) -> Choice:
    """Return the role for a request: that of its task, else that of its tier.

    The role of the task is left out where the words of the request, or its name, ask for another tier.

    Args:
        model: a name that `is_auto`.
        text: what the user asks.
        settings: the roles.
        rules: those of `settings`.
        told: the task, where a learned classifier has told it.
    """
    name, pin = split_pin(model)
    forced = _NAMES[name.strip().lower()]
    found = classify(text, rules.lexicon, forced=forced, escalate_below=rules.escalate_below, told=told)
    of_task = None if found.is_moved or forced is not None else found.task_type
    return _of_role((of_task, found.tier.value), found, pin, settings)


def choose_for(task: str, settings: RoutingSettings, rules: AutoRules) -> Choice:
    """Return the role for a request whose task is known: that of the task, else that of its usual tier."""
    tier = next((one.tier for one in rules.lexicon.tasks if one.name == task), Tier.FAST)
    found = Classification(task, tier, 1.0, "the task was named")
    return _of_role((task, tier.value), found, None, settings)


def _of_role(
    names: Iterable[str | None], found: Classification, pin: str | None, settings: RoutingSettings
) -> Choice:
    """Return the first of these roles that can answer."""
    for name in names:
        role = settings.roles.get(name) if name is not None else None
        if role is not None and _can_answer(role, settings):
            return Choice(found, role.name, role.name if pin is None else f"{role.name}@{pin}")
    tier = found.tier.value
    message = (
        f"this request needs the tier {tier!r} ({found.reasoning}), and no role of that name has a model; "
        f"set roles.{tier}.model"
    )
    return Choice(found, None, "", message)


def _can_answer(role: Role, settings: RoutingSettings) -> bool:
    if role.kind is not RequestKind.GENERATE:
        return False
    return bool(settings.models_of(role)) or bool(role.fallbacks)
