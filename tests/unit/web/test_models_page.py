from __future__ import annotations

from typing import Any

from manager.domain.keys import Scope
from manager.web.page import element_id
from manager.web.pages.models import MODELS
from manager.web.rendering import Renderer
from manager.web.viewer import Viewer

MANY = 300


def model(name: str) -> dict[str, Any]:
    place = {
        "volume": None,
        "digest": "sha256:" + "a" * 64,
        "size_bytes": 1,
        "may_change": True,
        "instances": ["one"],
    }
    return {
        "name": name,
        "places": [place],
        "family": None,
        "parameters": None,
        "quantization": None,
        "status": "not_loaded",
        "size_bytes": 1,
        "context_length": None,
        "capabilities": None,
        "error": None,
        "roles": [],
        "last_used_at": None,
        "lately": None,
        "loading_on": [],
    }


def rendered(models: list[dict[str, Any]]) -> list[str]:
    """The rows of models."""
    sections = {
        "models": models,
        "instances": [],
        "fit": {"models": [], "rooms": []},
        "missing": [],
        "pulls": [],
    }
    viewer = Viewer(None, frozenset(Scope))
    assert MODELS.fragments is not None
    found = MODELS.fragments(sections, viewer)
    parts = [found[element_id("model", one["name"])] for one in models]
    renderer = Renderer()
    return [renderer.render(one.template, {"id": "x", "viewer": viewer, **one.context}) for one in parts]


def row(count: int) -> str:
    return rendered([model(f"copy-{number}") for number in range(count)])[0]


def test_copies_of_a_model_are_told_as_far_as_somebody_reads_them() -> None:
    assert "Frees no space: copy-1 has the same files." in row(2)
    assert "Frees no space: copy-1, copy-2, copy-3, copy-4, copy-5 has the same files." in row(6)
    assert f"copy-5 and {MANY - 6} more has the same files." in row(MANY)
    assert "has the same files" not in row(1)


def test_a_page_of_many_models_at_many_places_stays_small_enough_to_be_sent() -> None:
    many = [model(f"model-{number}") for number in range(500)]
    for one in many:
        one["places"] = [{**one["places"][0], "instances": [f"at-{place}"]} for place in range(64)]
    found = rendered(many)
    assert sum(map(len, found)) < 8_000_000
    assert all("and 60 more places" in one for one in found)
    few = rendered(many[:20])
    assert all("more places" not in one and one.count("/load?wait=false") == 64 for one in few)
