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


def row(count: int) -> str:
    models = [model(f"copy-{number}") for number in range(count)]
    sections = {
        "models": models,
        "instances": [],
        "fit": {"models": [], "rooms": []},
        "missing": [],
        "pulls": [],
    }
    viewer = Viewer(None, frozenset(Scope))
    assert MODELS.fragments is not None
    fragment = MODELS.fragments(sections, viewer)[element_id("model", "copy-0")]
    return Renderer().render(fragment.template, {"id": "x", "viewer": viewer, **fragment.context})


def test_copies_of_a_model_are_told_as_far_as_somebody_reads_them() -> None:
    assert "Frees no space: copy-1 has the same files." in row(2)
    assert "Frees no space: copy-1, copy-2, copy-3, copy-4, copy-5 has the same files." in row(6)
    assert f"copy-5 and {MANY - 6} more has the same files." in row(MANY)
    assert "has the same files" not in row(1)
