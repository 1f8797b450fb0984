"""Paid servers: which of their models may stand in for what a request names, and why none may. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from manager.domain.models import model_key
from manager.domain.roles import Policy, RequestKind
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from manager.domain.roles import Role, RoutingSettings


class Offer(NamedTuple):
    """One model of a paid server. `stands_in` has the roles and the keys of models that it answers for."""

    model: str
    stands_in: frozenset[str]


def offer(model: str, stands_in: Iterable[str]) -> Offer:
    """Return the offer of a model for names of roles and models, as they are configured."""
    names = [*stands_in]
    return Offer(model, frozenset([*(name.lower() for name in names), *map(model_key, names)]))


class Server(Protocol):
    """A paid server as routing sees it. It is out of reach where `why_out` says why."""

    @property
    def id(self) -> str: ...
    @property
    def offers(self) -> tuple[Offer, ...]: ...
    @property
    def why_out(self) -> Reason | None: ...
    @property
    def detail(self) -> str: ...


class Wish(NamedTuple):
    """The parts of a request that decide about paid servers.

    `named` is the name that the client gave, without a pin; `models` are those that local instances were
    asked for, in order. `role` is None where the request is for no role and in no lane.
    """

    named: str
    models: tuple[str, ...]
    role: Role | None
    kind: RequestKind
    pin: str | None
    is_local: bool


class Verdict(NamedTuple):
    """One paid server. It may answer with `model` where `reason` is None.

    `is_meant` is whether the client has to hear of this server where nothing answers: it asks for it by a pin
    or by the name of a model, or the server would have stood in.
    """

    instance: str
    model: str
    reason: Reason | None = None
    detail: str = ""
    is_meant: bool = False


def verdicts(wish: Wish, settings: RoutingSettings, servers: Sequence[Server]) -> Iterator[Verdict]:
    """Yield a verdict on each paid server; those that may answer come in the order of `fallback.order`."""
    order = settings.fallback.order
    if order:
        place = {name: number for number, name in enumerate(order)}
        servers = sorted(servers, key=lambda one: place.get(one.id, len(place)))
    for server in servers:
        yield _verdict(wish, settings, server)


def _verdict(wish: Wish, settings: RoutingSettings, server: Server) -> Verdict:
    found = _standing_in(wish, server)
    key = model_key(wish.named)
    named = next((one for one in server.offers if model_key(one.model) == key), None)
    model = (found or named or Offer(wish.models[0] if wish.models else wish.named, frozenset())).model
    reason, detail = _why_not(wish, settings, server, found)
    stands_in = found is not None and (reason is not Reason.POLICY or not wish.models)
    is_meant = wish.pin == server.id or (wish.pin is None and (named is not None or stands_in))
    return Verdict(server.id, model, reason, detail, is_meant)


def _standing_in(wish: Wish, server: Server) -> Offer | None:
    """Return what stands in: the model that is named, then what the role has, then what a model has."""
    role = wish.role
    for name in (wish.named, *wish.models):
        key = model_key(name)
        for one in server.offers:
            if model_key(one.model) == key and (
                key in one.stands_in or (role is not None and role.name in one.stands_in)
            ):
                return one
    if role is not None:
        for one in server.offers:
            if role.name in one.stands_in:
                return one
    for model in wish.models:
        key = model_key(model)
        for one in server.offers:
            if key in one.stands_in:
                return one
    return None


def _why_not(
    wish: Wish, settings: RoutingSettings, server: Server, found: Offer | None
) -> tuple[Reason | None, str]:
    """Return why a paid server does not answer; no reason where it may."""
    rule = _rule_of_settings(wish, settings, server) or _rule_of_role(wish, found)
    if rule:
        return Reason.POLICY, rule
    if settings.fallback.force_local:
        return Reason.LOCAL_ONLY, "fallback.force_local is on"
    if wish.is_local:
        return Reason.LOCAL_ONLY, "the request, or its key, permits local servers only"
    return server.why_out, server.detail


def _rule_of_settings(wish: Wish, settings: RoutingSettings, server: Server) -> str:
    """Return what keeps a server from being used; empty where nothing does."""
    if wish.pin is not None and wish.pin != server.id:
        return "the request names another instance"
    if not settings.fallback.enabled:
        return "fallback.enabled is off"
    if settings.fallback.order and server.id not in settings.fallback.order:
        return "not in fallback.order"
    return ""


def _rule_of_role(wish: Wish, found: Offer | None) -> str:
    """Return what keeps the role of a request from a paid server; empty where nothing does."""
    role = wish.role
    if role is None:
        return "only a role with paid_fallback may use it"
    if not role.paid_fallback:
        return f"the role {role.name!r} has no paid_fallback"
    if role.policy is Policy.CPU_ONLY:
        return f"the role {role.name!r} has the policy cpu_only"
    if found is None:
        return f"none of its models is for the role {role.name!r} or its model"
    if wish.kind is RequestKind.EMBED and model_key(found.model) not in map(model_key, wish.models):
        return f"{found.model!r} embeds differently: vectors of two models cannot be compared"
    return ""
