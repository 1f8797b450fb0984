"""Lists of models: nothing that a client relies on is missing, whatever a server left out."""

from __future__ import annotations

from typing import Any

import pytest

from manager.domain.classification import Tier
from manager.domain.roles import RequestKind
from manager.wire.listing import (
    Alias,
    KnownModel,
    alias_document,
    model_document,
    models_document,
    ps_document,
    show_document,
    tags_document,
)

TINY = {
    "name": "tiny:latest",
    "model": "tiny:latest",
    "modified_at": "2026-11-21T08:00:05.374443553Z",
    "size": 760257,
    "digest": "aa77",
    "details": {"family": "llama", "families": ["llama"], "capabilities": ["completion"]},
    "remote_host": "https://ollama.com",
}
DIGESTS = {"aaa": ("cpu",), "bbb": ("gpu0",)}
KNOWN = KnownModel(TINY, ("cpu", "gpu0"), ("gpu0",), "ready", 0.5, 12.5, DIGESTS)
BARE = KnownModel({"name": "bare"}, ("nas",), ())


def test_a_model_for_openai_says_its_context_length_and_what_it_can_do() -> None:
    said = {**TINY, "details": {"context_length": 4096}, "capabilities": ["completion", "vision"]}
    document = model_document("tiny", KnownModel(said, ("cpu",), ()))
    assert (document["context_length"], document["capabilities"]) == (4096, ["completion", "vision"])


def test_an_entry_keeps_every_key_that_its_server_gave() -> None:
    (entry,) = tags_document([KNOWN])["models"]
    assert entry == {
        **TINY,
        "details": {
            "parent_model": "",
            "format": "",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "",
            "quantization_level": "",
            "capabilities": ["completion"],
        },
    }


def test_an_entry_of_which_only_the_name_is_known_has_all_keys() -> None:
    for known in (BARE, KnownModel({"model": "bare", "details": "none"}, (), ())):
        (entry,) = tags_document([known])["models"]
        assert list(entry) == ["name", "model", "modified_at", "size", "digest", "details"]
        assert (entry["name"], entry["model"], entry["size"], entry["digest"]) == ("bare", "bare", 0, "")
        assert entry["modified_at"] == "0001-01-01T00:00:00Z"
        assert entry["details"]["families"] is None


def test_the_newest_comes_first_and_what_has_no_time_last() -> None:
    newer = KnownModel({"name": "newer", "modified_at": "2026-11-21T10:00:00+01:00"}, (), ())
    document = tags_document([BARE, KNOWN, newer])
    assert [entry["name"] for entry in document["models"]] == ["newer", "tiny:latest", "bare"]
    listed = models_document([BARE, KNOWN, newer], [])
    assert [entry["id"] for entry in listed["data"]] == ["newer", "tiny:latest", "bare"]


def test_a_role_is_an_entry_of_its_model_under_its_own_name() -> None:
    roles = [Alias("gpt-4.1", RequestKind.GENERATE.value, RequestKind.GENERATE, KNOWN)]
    model, role = tags_document([KNOWN], roles)["models"]
    assert model["details"]["parent_model"] == ""
    assert role == {
        **model,
        "name": "gpt-4.1:latest",
        "model": "gpt-4.1:latest",
        "details": {**model["details"], "parent_model": "tiny:latest"},
    }


def test_a_role_is_not_offered_where_its_name_would_get_something_else_or_nothing() -> None:
    roles = [
        Alias("thinking", "tiny", RequestKind.GENERATE, KNOWN),
        Alias("tiny", "bare", RequestKind.GENERATE, BARE),
        Alias("embedding", "nowhere", RequestKind.EMBED, None),
    ]
    names = [entry["name"] for entry in tags_document([BARE, KNOWN], roles)["models"]]
    assert names == ["tiny:latest", "bare", "thinking:latest"]


def test_a_name_with_a_tag_is_listed_as_it_stands() -> None:
    names = ("auto", "auto:fast")
    listed = tags_document([], [Alias(name, "tiny", RequestKind.GENERATE, KNOWN) for name in names])
    assert [entry["name"] for entry in listed["models"]] == ["auto:latest", "auto:fast"]
    assert [entry["model"] for entry in listed["models"]] == ["auto:latest", "auto:fast"]


def test_a_loaded_model_says_where() -> None:
    assert ps_document([("gpu0", {"name": "tiny", "size_vram": 5})]) == {
        "models": [{"name": "tiny", "size_vram": 5, "instance": "gpu0"}]
    }


def test_a_model_for_openai_is_called_as_it_was_asked_for() -> None:
    assert model_document("tiny", KNOWN) == {
        "id": "tiny",
        "object": "model",
        "created": 1795248005,
        "owned_by": "library",
        "loaded": True,
        "status": "ready",
        "offload": 0.5,
        "latency_ms": 12.5,
        "instances": ["cpu", "gpu0"],
        "digests": {"aaa": ["cpu"], "bbb": ["gpu0"]},
        "context_length": None,
        "capabilities": None,
        "offload_hint": {"suitable": False, "why": "it runs at https://ollama.com"},
    }


def test_a_model_belongs_to_its_namespace() -> None:
    for name, owner in (("tiny", "library"), ("me/tiny:1", "me"), ("host:5000/me/tiny", "me")):
        assert model_document(name, KnownModel({"name": name}, (), ()))["owned_by"] == owner


def test_a_role_is_an_entry_that_names_its_model() -> None:
    alias = Alias("thinking", "tiny", RequestKind.GENERATE, KNOWN)
    assert models_document([], [alias])["data"] == [
        {
            "id": "thinking",
            "object": "model",
            "created": 1795248005,
            "owned_by": "ollama-manager",
            "loaded": True,
            "status": "ready",
            "offload": 0.5,
            "latency_ms": 12.5,
            "instances": ["cpu", "gpu0"],
            "digests": {"aaa": ["cpu"], "bbb": ["gpu0"]},
            "context_length": None,
            "capabilities": None,
            "offload_hint": {"suitable": False, "why": "it runs at https://ollama.com"},
            "model": "tiny",
            "kind": "generate",
        }
    ]


@pytest.mark.parametrize(
    ("entry", "values", "hint"),
    [
        ({"details": {"parameter_size": "7.6B"}}, {}, (True, "7.6B parameters are at most 14b")),
        ({"details": {"parameter_size": 7}}, {}, (False, "neither a fast tier nor its size is known")),
        ({"details": "none"}, {"tier": Tier.FAST}, (True, "its tier is fast")),
        ({"remote_host": "https://x"}, {"tier": Tier.FAST}, (False, "it runs at https://x")),
        ({"remote_host": 1}, {"tier": Tier.FAST}, (True, "its tier is fast")),
        ({"capabilities": ["embedding"]}, {"tier": Tier.FAST}, (False, "it generates no text")),
        ({}, {"is_available": False}, (False, "no instance that has it can answer now")),
        ({}, {"instances": ()}, (False, "no instance that has it can answer now")),
    ],
)
def test_a_model_says_whether_small_jobs_may_be_handed_to_it(
    entry: dict[str, Any], values: dict[str, Any], hint: tuple[bool, str]
) -> None:
    known = KnownModel({"name": "x", **entry}, values.pop("instances", ("cpu",)), (), **values)
    document = model_document("x", known)["offload_hint"]
    assert (document["suitable"], document["why"]) == hint


def test_a_role_whose_model_nobody_has_says_so() -> None:
    document = alias_document(Alias("embedding", "bge-m3", RequestKind.EMBED, None))
    assert (document["loaded"], document["instances"], document["created"]) == (False, [], 0)
    assert (document["status"], document["offload"], document["latency_ms"]) == ("not_loaded", None, None)


@pytest.mark.parametrize(
    ("listed", "can"), [({}, ["completion"]), ({"capabilities": ["vision"]}, ["vision"])]
)
def test_a_model_that_its_server_cannot_show_is_shown_by_its_entry(
    listed: dict[str, Any], can: list[str]
) -> None:
    entry = {"name": "gpt", "modified_at": "2026-01-01T00:00:00Z", "details": {"context_length": 5}, **listed}
    shown = show_document(entry)
    assert (shown["capabilities"], shown["modified_at"]) == (can, "2026-01-01T00:00:00Z")
    assert shown["details"]["context_length"] == 5
    assert show_document(None)["details"]["family"] == ""
