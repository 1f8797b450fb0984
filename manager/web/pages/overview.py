"""The overview: the whole machine on one screen."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from manager.domain.instance import Driver
from manager.web.devices import by_card, card_parts, fills_of
from manager.web.page import Fragment, Page, element_id
from manager.web.speeds import instance_speeds
from manager.web.state import BAD, OK, WARN, instance_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from manager.web.page import Sections
    from manager.web.viewer import Viewer

_MOST_REQUESTS = 8
_MOST_PROBLEMS = 6
_MOST_EVENTS = 5
_MOST_MODELS = 2
# A device with more instances shows tiles instead of rows.
_MOST_ROWS = 8


def _fragments(sections: Sections, _viewer: Viewer) -> Mapping[str, Fragment]:
    instances: list[dict[str, Any]] = sections["instances"]
    lanes = sections["lanes"]["lanes"]
    return {
        "verdict": Fragment("overview/verdict.html", _verdict(instances, sections["gpus"], lanes)),
        **_devices(instances, sections),
        "problems": Fragment("overview/problems.html", {"events": _events(sections["problems"])}),
        "lanes": Fragment("overview/lanes.html", {"lanes": _lanes(lanes)}),
        "requests": Fragment("overview/requests.html", {"requests": _requests(sections["requests"])}),
    }


def _verdict(
    instances: list[dict[str, Any]], gpus: Mapping[str, Any], lanes: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    states = [instance_state(one) for one in instances]
    problems = [*_lost(gpus, instances), *_of_instances(instances), *_cold(lanes)]
    problems.sort(key=lambda one: one["kind"] != BAD)
    return {
        "kind": problems[0]["kind"] if problems else OK,
        "counts": Counter(states),
        "problems": problems[:_MOST_PROBLEMS],
        "more": max(0, len(problems) - _MOST_PROBLEMS),
    }


def _lost(gpus: Mapping[str, Any], instances: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what is wrong with cards. Without an instance for a card nothing is missing."""
    lost = [gpu for gpu in gpus["gpus"] if gpu["lost"]]
    for gpu in lost:
        yield {
            "kind": BAD, "word": "lost", "names": [], "device": f"GPU {gpu['index']} {gpu['name']}",
            "message": gpu["lost"], "code": "gpu_missing",
        }  # fmt: skip
    is_unread = any(gpu["memory_unknown"] for gpu in gpus["gpus"])  # which the card says itself
    if (
        gpus["error"]
        and not lost
        and not is_unread
        and any(one["device"]["kind"] == "gpu" for one in instances)
    ):
        yield {
            "kind": WARN, "word": "unreadable", "names": [], "device": None,
            "message": gpus["error"]["message"], "code": "gpus",
        }  # fmt: skip


def _of_instances(instances: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Return the problems of instances. Those that have the same one share a line."""
    found: dict[Any, dict[str, Any]] = {}
    for one in instances:
        state, reason = instance_state(one), one["reason"]
        if state.kind not in (BAD, WARN):
            continue
        message = reason["message"] if reason else one["breaker"]["reason"] or ""
        if state.word == "drained":
            message = (one["drained"] or {}).get("reason") or ""
        code = reason["code"] if reason else "breaker_open" if state.word.startswith("breaker") else ""
        problem = found.setdefault(
            (state, code, message),
            {
                "kind": state.kind, "word": state.word, "names": [], "device": None,
                "message": message, "code": code,
            },
        )  # fmt: skip
        problem["names"].append(one["id"])
    return found.values()


def _cold(lanes: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the roles whose model could not be kept in memory."""
    for lane in lanes:
        for warm in lane["keep_warm"]:
            if warm["reason"]:
                yield {
                    "kind": WARN, "word": "not_warm", "names": [warm["instance"]],
                    "device": lane["name"], "message": warm["detail"], "code": warm["reason"],
                }  # fmt: skip


def _devices(instances: list[dict[str, Any]], sections: Sections) -> dict[str, Fragment]:
    gpus, slots = sections["gpus"]["gpus"], {one["id"]: one for one in sections["lanes"]["instances"]}
    fills, speeds = fills_of(instances), instance_speeds(sections["requests"])
    on_cards = by_card(instances)
    has_card = {one["id"] for gpu in gpus for one in on_cards.get(gpu["uuid"], ())}
    rows = {one["id"]: _row(one, slots.get(one["id"]), fills, speeds) for one in instances}

    def device(here: Iterable[Mapping[str, Any]], **more: Any) -> Fragment:
        shown = [rows[one["id"]] for one in here]
        context = {"gpu": None, "title": None, "node": None, "parts_of": [], **more}
        context |= {"rows": shown, "is_compact": len(shown) > _MOST_ROWS}
        return Fragment("overview/device.html", context)

    found = {}
    for gpu in gpus:
        here = on_cards.get(gpu["uuid"], ())
        names = ("index", "name", "vram_used_bytes", "vram_total_bytes", "vram_free_bytes", "lost", "host")
        card = {name: gpu[name] for name in names}
        id_ = element_id("card", gpu["uuid"])
        found[id_] = device(here, gpu=card, parts_of=card_parts(gpu, fills))
    for kind in ("cpu", "gpu", "external", "cloud"):
        here = [one for one in instances if one["id"] not in has_card and _place(one) == kind]
        if here:
            found[f"place-{kind}"] = device(here, title=kind)
    services = [one for one in instances if one["id"] not in has_card and _place(one) == "swarm"]
    for node in dict.fromkeys(one["node"] for one in services):
        here = [one for one in services if one["node"] == node]
        found[element_id("place-node", node or "none")] = device(here, title="swarm", node=node)
    return found


def _place(instance: Mapping[str, Any]) -> str:
    driver: str = instance["driver"]
    if driver != Driver.DOCKER:
        return driver
    return "cpu" if instance["device"]["kind"] == "cpu" else "gpu"


def _row(
    instance: Mapping[str, Any],
    slots: Mapping[str, Any] | None,
    fills: Mapping[str, str],
    speeds: Mapping[str, float],
) -> dict[str, Any]:
    models = [model["name"].removesuffix(":latest") for model in instance["models"]]
    speed = speeds.get(instance["id"])
    return {
        "id": instance["id"],
        "fill": fills[instance["id"]] if instance["device"]["kind"] == "gpu" else None,
        "state": instance_state(instance),
        "models": models[:_MOST_MODELS],
        "more_models": max(0, len(models) - _MOST_MODELS),
        "loading": instance["loading"][:_MOST_MODELS],
        "start": instance["start"],
        "in_flight": instance["in_flight"],
        "slots": slots["slots"] if slots else None,
        "queued": slots["queued"] if slots else 0,
        "speed": None if speed is None else round(speed),
        "ttl_ends_at": instance["ttl_ends_at"],
        "pinned": instance["pinned"],
        "phase": instance["phase"],
    }


def _lanes(lanes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the table shows of each lane. How long the oldest request waits is a clock."""
    names = ("name", "in_flight", "queued", "concurrency", "reserved")
    return [
        {
            **{name: one[name] for name in names},
            "oldest_wait_s": None if one["oldest_wait_s"] is None else round(one["oldest_wait_s"]),
        }
        for one in lanes
    ]


def _events(problems: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the last problems; the same one of an instance counts, and is shown once."""
    found: dict[Any, dict[str, Any]] = {}
    for one in problems:
        key = one["instance"], one["reason"]
        if key in found:
            found[key]["count"] += 1
        elif len(found) < _MOST_EVENTS:
            found[key] = {**one, "count": 1}
    return list(found.values())


def _requests(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("request_id", "open", "role", "model", "effective_target", "requested_target", "outcome")
    more = ("fallback", "fallback_reason", "project_id")
    return [
        {
            **{name: one[name] for name in (*names, *more)},
            # The duration of an open request is a clock.
            "duration_ms": None if one["open"] else one["duration_ms"],
        }
        for one in requests[:_MOST_REQUESTS]
    ]


OVERVIEW = Page("overview", "/ui", fragments=_fragments)
