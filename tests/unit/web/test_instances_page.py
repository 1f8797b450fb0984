"""Cards of instances on the page: where each one runs."""

from __future__ import annotations

from typing import Any

from manager.domain.keys import Scope
from manager.web.page import element_id
from manager.web.pages.instances import INSTANCES
from manager.web.pages.overview import _devices
from manager.web.rendering import Renderer
from manager.web.viewer import Viewer

VIEWER = Viewer(None, frozenset(Scope))
HOSTILE = "<script>node</script>"


def instance(**values: Any) -> dict[str, Any]:
    none = (
        "node", "endpoint", "reason", "start", "ttl_ends_at", "started_at", "container", "image_override",
        "drained", "lifted", "rules",
    )  # fmt: skip
    return {
        **dict.fromkeys(none),
        "id": "far",
        "driver": "swarm",
        "protocol": "ollama",
        "template": "ollama-cpu",
        "image": "ollama/ollama:1",
        "device": {"kind": "cpu", "uuid": None, "cards": []},
        "target": "stopped",
        "phase": "stopped",
        "health": "unknown",
        "in_flight": 0,
        "pinned": False,
        "ttl_s": 900,
        "starts": 0,
        "models": [],
        "loading": [],
        "breaker": {"state": "closed", "failures": 0, "reason": None, "retry_at": None, "opened_at": None},
        **values,
    }


def sections(*instances: dict[str, Any]) -> Any:
    return {
        "instances": list(instances),
        "lanes": {"instances": [], "lanes": []},
        "requests": [],
        "models": [],
        "gpus": {"gpus": [], "error": None},
        "problems": [],
    }


def card(**values: Any) -> str:
    assert INSTANCES.fragments is not None
    part = INSTANCES.fragments(sections(instance(**values)), VIEWER)[element_id("instance", "far")]
    return Renderer().render(part.template, {"id": "x", "viewer": VIEWER, "images": [], **part.context})


def test_a_service_of_a_swarm_has_its_node_its_service_and_the_controls_of_a_container() -> None:
    text = card(node=HOSTILE)
    assert text.count("&lt;script&gt;node&lt;/script&gt;") == 2
    assert HOSTILE not in text
    assert "<dt>Service</dt>" in text
    assert "<dt>Node</dt>" in text
    assert "/instances/far/start" in text
    assert "/instances/far/logs" in text


def test_a_container_has_no_node() -> None:
    text = card(driver="docker")
    assert "<dt>Container</dt>" in text
    assert "<dt>Node</dt>" not in text


def test_a_card_of_another_machine_is_shown_with_its_host() -> None:
    one = {"uuid": "GPU-1", "index": 0, "name": "Card", "host": "gpu-box"}
    text = card(node="gpu-box", device={"kind": "gpu", "uuid": "GPU-1", "cards": [one]})
    assert "GPU 0 Card (gpu-box)" in text


def test_the_overview_has_a_place_for_each_node() -> None:
    near, far, away = (
        instance(id=name, node=node) for name, node in (("near", "desk"), ("far", "gpu-box"), ("away", None))
    )
    found = _devices([near, far, away], sections(near, far, away))
    assert list(found) == [element_id("place-node", node) for node in ("desk", "gpu-box", "none")]
    part = found[element_id("place-node", "gpu-box")]
    text = Renderer().render(part.template, {"id": "x", "viewer": VIEWER, **part.context})
    assert "gpu-box" in text
    assert "far" in text
    assert "near" not in text
