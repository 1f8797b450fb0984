"""Roles: which model answers, where, and under which limits; below it where requests may go at all."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from manager.api.model_settings import effective_values, settings_values
from manager.api.routing import routing_values
from manager.domain.auto import offered
from manager.domain.classification import Tier
from manager.domain.models import model_key
from manager.domain.roles import Policy, RequestKind, Strategy
from manager.domain.rollout import Stage
from manager.settings.overrides import DEFAULTS, setting_key, split_key
from manager.web.embedding_view import embedding_facts, embedding_fragment, health_fragment
from manager.web.page import Facts, Fragment, Page, element_id
from manager.web.paid import paid_servers
from manager.web.settings_view import OVERRIDE, flat, setting_view, taken_back
from manager.web.texts import read_texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.domain.facts import ModelFacts
    from manager.domain.roles import RoutingSettings
    from manager.web.page import Sections
    from manager.web.viewer import Viewer

EMBEDDING = "embedding"
_TIERS = tuple(tier.value for tier in Tier)
_ANY = frozenset(RequestKind)
_WORDS = frozenset({RequestKind.GENERATE})
_TEXTUAL = frozenset({RequestKind.GENERATE, RequestKind.EMBED})
# First paint does not wait longer for what is not known of the embedding model yet.
_DETAILS_S = 0.1


class Control(NamedTuple):
    """The control of a setting.

    Attributes:
        key: of the setting.
        shape: the macro that draws it, in `roles/controls.html`.
        kinds: the roles for which it takes effect.
        needs: the class of what else must be so that it takes effect; empty: nothing.
        json: the type for `page.js`.
        empty: what an empty control is for `page.js`.
    """

    key: str
    shape: str = "text"
    kinds: frozenset[RequestKind] = _ANY
    needs: str = ""
    json: str = ""
    empty: str = ""


GROUPS: Mapping[str, tuple[Control, ...]] = {
    "place": (
        Control("model", "model"),
        Control("target", "target"),
        Control("policy", "policy"),
        Control("instances", json="list", empty="null"),
        Control("strategy", "strategy"),
        Control("fallbacks", json="list"),
        Control("keep_warm", needs="needs-model", json="list"),
        Control("paid_fallback", "check"),
    ),
    "lane": (
        Control("concurrency", "number", json="number"),
        Control("queue.length", "number", needs="needs-limit", json="number"),
        Control("queue.wait_s", "number", needs="needs-limit", json="number"),
        Control("reserved", "number", needs="needs-instances", json="number"),
        Control("weight", "number", needs="needs-slots", json="number"),
        Control("attempt_timeouts_s", json="numbers"),
        Control("mode", "mode", kinds=_TEXTUAL),
    ),
    "request": (
        Control("think", "think", kinds=_WORDS, json="json"),
        Control("system.text", "area", kinds=_WORDS),
        Control("system.mode", "system_mode", kinds=_WORDS, needs="needs-system"),
        Control("body.defaults", "area", kinds=_TEXTUAL, json="json"),
        Control("body.overrides", "area", kinds=_TEXTUAL, json="json"),
    ),
}


# --- What changes live -------------------------------------------------------------------------------------


def _facts(backend: Backend) -> Facts:
    def build() -> Sections:
        return {
            "routing": routing_values(backend)["roles"],
            "queues": {one.name: one.queue_length for one in backend.model_settings.routing.roles.values()},
            "settings": sha256(flat(_compared(backend)).encode()).hexdigest()[:12],
            "embedding": embedding_facts(backend),
        }

    return Facts((backend.model_settings.version, backend.rollout.values), build)


def _compared(backend: Backend) -> dict[str, Any]:
    """Return everything of the region that is not live: where it differs, the region is fetched again."""
    warnings = settings_values(backend)["warnings"]
    settings = backend.model_settings.routing
    tiers = {tier: _tier_models(settings, tier) for tier in _TIERS}
    return {
        "effective": effective_values(backend),
        "warnings": warnings,
        "tiers": tiers,
        "auto": _auto(settings),
    }


def _fragments(sections: Sections, _viewer: Viewer) -> Mapping[str, Fragment]:
    lanes = {one["name"]: one for one in sections["lanes"]["lanes"]}
    devices = {one["id"]: one["device"] for one in sections["instances"]}
    return {
        # Its id is another one after each change of a setting, so that every open page is brought up to date.
        f"settings-{sections['settings']}": Fragment("roles/settings.html", {}),
        **{
            element_id("now", name): Fragment(
                "roles/now.html",
                {
                    "name": name,
                    "now": now,
                    "lane": _lane(lanes.get(name), sections["queues"][name]),
                    "device": _device(devices, now),
                },
            )
            for name, now in sections["routing"].items()
        },
        "embedding-now": embedding_fragment(sections),
        "embedding-health": health_fragment(sections),
    }


def _lane(lane: Mapping[str, Any] | None, queue_length: int) -> Mapping[str, Any] | None:
    if lane is None:
        return None
    names = ("in_flight", "queued", "oldest_wait_s", "concurrency", "reserved")
    return {
        **{name: lane[name] for name in names},
        "queue_length": queue_length,
        "cold": [one for one in lane["keep_warm"] if one["reason"] is not None],
    }


def _device(devices: Mapping[str, Any], now: Mapping[str, Any]) -> Any:
    device = devices.get(now["effective_target"])
    return device and {"kind": device["kind"], "index": device["index"], "name": device["name"]}


# --- What is fetched again after a change ------------------------------------------------------------------


async def _context(backend: Backend, _viewer: Viewer, _request: Request) -> Mapping[str, Any]:
    texts = read_texts().roles
    if embedding_facts(backend)["is_unread"]:
        with suppress(TimeoutError):
            async with asyncio.timeout(_DETAILS_S):
                await backend.passing.catalogue.refresh(lists=True)
    settings = backend.model_settings
    warnings = {one["key"]: one["message"] for one in settings_values(backend)["warnings"]}
    slots = backend.passing.routing.slots.instances()
    local = [one for one in backend.fleet.instances() if not one.spec.is_paid]
    return {
        "roles": [_role(backend, name, warnings, texts) for name in settings.values],
        "groups": GROUPS,
        "kinds": list(RequestKind),
        "policies": list(Policy),
        "strategies": list(Strategy),
        "stages": list(Stage),
        "targets": [{"id": one.id, "kind": one.spec.device_kind} for one in local],
        "models": sorted(_model_names(backend)),
        "has_slots": any(one.slots is not None for one in slots),
        "paid": paid_servers(backend),
        "rollout": {
            key: setting_view(("rollout",), key, found, backend.rollout.written[key], texts)
            for key, found in backend.rollout.values.items()
        },
        "fallback": {
            key: setting_view(("fallback",), key, found, settings.written_fallback[key], texts)
            for key, found in settings.fallback.items()
        },
        "auto": _auto(settings.routing),
        "lane_warnings": [text for key, text in warnings.items() if key == "rollout.lanes"],
        "ignored": [_ignored(one, settings.values) for one in effective_values(backend)["ignored"]],
    }


def _role(backend: Backend, name: str, warnings: Mapping[str, str], texts: Any) -> Mapping[str, Any]:
    found, written = backend.model_settings.values[name], backend.model_settings.written.get(name)
    below = DEFAULTS if written is None else written
    views = {key: setting_view(("roles", name), key, one, below[key], texts) for key, one in found.items()}
    return {
        "name": name,
        "id": element_id("role", name),
        "now": element_id("now", name),
        "kind": RequestKind(found["kind"].value),
        "is_added": written is None,
        "settings": views,
        "changed": sum(one.source == OVERRIDE for one in views.values() if one.key != "kind"),
        "warning": warnings.get(setting_key(name, "model")),
        "is_embedding": name == EMBEDDING,
        "tier": _tier_models(backend.model_settings.routing, name),
    }


def _tier_models(settings: RoutingSettings, name: str) -> list[dict[str, Any]]:
    """Return the models of a tier in order, with what is stated about each; none of another role."""
    role = settings.roles.get(name)
    if role is None or name not in _TIERS or role.kind is not RequestKind.GENERATE:
        return []
    return [
        {"name": model, "facts": _stated(settings.facts.get(model_key(model)))}
        for model in settings.models_of(role)
    ]


def _stated(facts: ModelFacts | None) -> dict[str, Any]:
    """Return the facts that are stated, by the names of their texts."""
    if facts is None:
        return {}
    found = {
        "latency": facts.latency_ms,
        "context": facts.context_tokens,
        "output": facts.output_tokens,
        "temperature": facts.temperature,
        "cost": None if facts.cost_factor == 1 else facts.cost_factor,
        "can": ", ".join(facts.capabilities) or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _auto(settings: RoutingSettings) -> str:
    """Return what `model: auto` means now, as the name of its text."""
    if settings.auto is None or not settings.auto.is_on:
        return "off"
    return "on" if offered(settings) else "nowhere"


def _model_names(backend: Backend) -> Iterator[str]:
    for model in backend.overviews.models().values():
        name = model.entry.get("name")
        if isinstance(name, str):
            yield name


def _ignored(one: Mapping[str, Any], roles: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an override that does not count, with the request that takes it back."""
    path = split_key(one["key"])
    if path is None:
        return {**one, "change": taken_back(tuple(one["key"].split(".", 1)))}
    role, field = path
    # Of a role that has gone, everything can be taken back and nothing alone.
    keys = ("roles", role, *field.split(".")) if role in roles else ("roles", role)
    return {**one, "change": taken_back(keys)}


ROLES = Page("roles", "/ui/roles", fragments=_fragments, facts=_facts, context=_context)
