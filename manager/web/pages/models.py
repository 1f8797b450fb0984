"""Models: where each one is, what it is doing, what fits where, and the pulls."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from manager.services.models.model_lists import may_write, volume_of
from manager.web.page import Fragment, Page, element_id
from manager.web.state import BAD, OFF, OK, WORK, State
from manager.web.words import unix_s

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.web.page import Sections
    from manager.web.viewer import Viewer

_STATES = {
    "in_use": State(OK, "in_use"),
    "ready": State(OK, "ready"),
    "loading": State(WORK, "loading"),
    "error": State(BAD, "error"),
    "not_loaded": State(OFF, "not_loaded"),
}
# The order in which a list by state has them.
_RANKS = {status: rank for rank, status in enumerate(("in_use", "loading", "ready", "error", "not_loaded"))}
_PULL_KINDS = {"waiting": OFF, "pulling": WORK, "done": OK, "failed": BAD, "cancelled": OFF}
_ENDED = frozenset({"done", "failed", "cancelled"})
_MOST_WARNINGS = 8
_MOST_TWINS = 5
# Places of models with their controls, over the whole page; a model has some of its own at least.
_MOST_PLACES = 2000
_LEAST_PLACES = 2
_SHORT_DIGEST = 12
_MOST_NAME = 600
# The first paint waits no longer for servers than this.
_NEWS_S = 0.1


def _fragments(sections: Sections, _viewer: Viewer) -> Mapping[str, Fragment]:
    models: list[dict[str, Any]] = sections["models"]
    memory = _memory(sections["instances"])
    fits: dict[tuple[str, str], Any] = {
        (one["model"], one["instance"]): one for one in sections["fit"]["models"]
    }
    twins = _twins(models)
    found = {
        "pulls": Fragment("models/pulls.html", {"pulls": [_pull(one) for one in sections["pulls"]]}),
        "warnings": Fragment("models/warnings.html", _warnings(models, sections["missing"])),
        "rooms": Fragment("models/rooms.html", {"rooms": sections["fit"]["rooms"]}),
    }
    most = max(_LEAST_PLACES, _MOST_PLACES // max(1, len(models)))
    for model in sorted(models, key=lambda one: one["name"].lower()):
        context = _row(model, memory, fits, twins, most)
        found[element_id("model", model["name"])] = Fragment("models/row.html", context)
    return found


def _row(
    model: Mapping[str, Any],
    memory: Mapping[tuple[str, str], Any],
    fits: Mapping[tuple[str, str], Any],
    twins: Mapping[tuple[object, str], Sequence[str]],
    most_places: int,
) -> dict[str, Any]:
    name = model["name"]
    places = [_place(model, place, memory, fits, twins) for place in model["places"]]
    last_used = unix_s(model["last_used_at"])
    return {
        "name": name,
        "about": [model["family"], model["parameters"], model["quantization"]],
        "state": _state(model["status"], places),
        "rank": _RANKS[model["status"]],
        "size_bytes": model["size_bytes"],
        "context_length": model["context_length"],
        "capabilities": model["capabilities"],
        "error": model["error"],
        "roles": model["roles"],
        "places": places[:most_places],
        "more_places": max(0, len(places) - most_places),
        "instances": [one for place in places for one in place["instances"]],
        "differs": len({place["digest"] for place in places if place["digest"]}) > 1,
        "last_used_s": last_used and round(last_used),
        "lately": model["lately"],
    }


def _state(status: str, places: Iterable[Mapping[str, Any]]) -> State:
    """Return the state of a model; those that hold it may all be out of service."""
    is_held = any(one["memory"] for place in places for one in place["instances"])
    return State(OFF, "held") if is_held and status == "not_loaded" else _STATES[status]


def _place(
    model: Mapping[str, Any],
    place: Mapping[str, Any],
    memory: Mapping[tuple[str, str], Any],
    fits: Mapping[tuple[str, str], Any],
    twins: Mapping[tuple[object, str], Sequence[str]],
) -> dict[str, Any]:
    name, digest, first = model["name"], place["digest"], place["instances"][0]
    return {
        "volume": place["volume"],
        "first": first,
        "digest": digest and _short(digest),
        "size_bytes": place["size_bytes"],
        "may_change": place["may_change"],
        # A server that is no Ollama has no volume of ours, and manages no models.
        "loads": place["may_change"] or place["volume"] is not None,
        **_shared(name, twins.get((place["volume"] or first, digest), ())),
        "instances": [
            {
                "id": id_,
                "is_loading": id_ in model["loading_on"],
                "memory": memory.get((id_, name)),
                "fit": fits.get((name, id_)),
            }
            for id_ in place["instances"]
        ],
    }


def _shared(name: str, twins: Sequence[str]) -> dict[str, Any]:
    """Return the first others that share all files, and how many more there are: all models may."""
    others = [one for one in twins[: _MOST_TWINS + 1] if one != name][:_MOST_TWINS]
    return {"twins": others, "more_twins": max(0, len(twins) - 1 - len(others))}


def _memory(instances: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what each instance holds of each model in memory."""
    return {
        (instance["id"], model["name"]): {
            "size_bytes": model["size_bytes"],
            "vram_bytes": model["vram_bytes"],
            "share": min(1.0, model["vram_bytes"] / model["size_bytes"]) if model["size_bytes"] else None,
        }
        for instance in instances
        for model in instance["models"]
    }


def _twins(models: Iterable[Mapping[str, Any]]) -> dict[tuple[object, str], list[str]]:
    """Return the names that share all files, by place and digest: to delete one of them frees nothing."""
    found: dict[tuple[object, str], list[str]] = {}
    for model in models:
        for place in model["places"]:
            if place["digest"]:
                where = place["volume"] or place["instances"][0]
                found.setdefault((where, place["digest"]), []).append(model["name"])
    return {key: names for key, names in found.items() if len(names) > 1}


def _warnings(
    models: Iterable[Mapping[str, Any]], missing: list[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    differing = [
        {
            "name": model["name"],
            "places": [
                {
                    "instances": one["instances"],
                    "digest": one["digest"].removeprefix("sha256:")[:_SHORT_DIGEST],
                }
                for one in model["places"]
                if one["digest"]
            ],
        }
        for model in models
        if len({one["digest"] for one in model["places"] if one["digest"]}) > 1
    ]
    return {"differing": differing[:_MOST_WARNINGS], "missing": missing[:_MOST_WARNINGS]}


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_SHORT_DIGEST]


def _pull(pull: Mapping[str, Any]) -> dict[str, Any]:
    total = pull["total_bytes"]
    done = sum(1 for one in pull["layers"] if one["completed_bytes"] >= one["total_bytes"])
    return {
        **{name: pull[name] for name in ("id", "model", "state", "status", "error", "is_kept", "clients")},
        **{name: pull[name] for name in ("completed_bytes", "total_bytes", "bytes_per_s", "left_s")},
        "place": pull["volume"] or pull["instance"],
        "kind": _PULL_KINDS[pull["state"]],
        "ended": pull["state"] in _ENDED,
        "share": pull["completed_bytes"] / total if total else 0.0,
        "layers_done": done,
        "layers": len(pull["layers"]),
    }


async def _context(backend: Backend, _viewer: Viewer, request: Request) -> Mapping[str, Any]:
    """Return the places that a new model can go to, the one where new models go first, and a name to pull.

    Servers that run are asked for their models meanwhile; what comes later is shown live.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_NEWS_S):
            await backend.passing.catalogue.refresh(lists=True)
    places: dict[str, list[str]] = {}
    for instance in backend.fleet.instances():
        if may_write(instance.spec):
            places.setdefault(volume_of(instance.spec), []).append(instance.id)
    return {
        "targets": [{"first": ids[0], "instances": ids} for ids in places.values()],
        "wanted": request.query_params.get("pull", "")[:_MOST_NAME],
    }


MODELS = Page("models", "/ui/models", fragments=_fragments, context=_context)
