"""Settings of models and routing as clients see and change them, on a daemon without an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.api.model_settings import EffectiveModelsBody, ModelsBody
from manager.api.routing import DecisionBody, RoutingBody
from manager.client import ModelSettingsClient
from tests.api.test_contract import error_of
from tests.support.daemon import COMPUTE, Daemon, wait_for
from tests.support.ollama import running_ollama
from tests.unit.cli.conftest import NO_ENGINE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import requests

SETTINGS = "/api/settings/models"
ROUTING = f"{COMPUTE}/routing"
BUILT_IN = ["thinking", "control", "output", "tool_selector", "embedding"]
ROLES = {
    "output": {"model": "tiny", "body": {"defaults": {"options": {"num_ctx": 2048}}}},
    "embedding": {"model": "minilm", "policy": "prefer_gpu"},
    "review": {"model": "tiny", "fallbacks": ["output"]},
}


def config(**instances: str) -> dict[str, Any]:
    """`big` is on a GPU, `nas` on the CPU, `some` does not say, `gone` nobody answers at."""
    devices = {"big": "gpu", "nas": "cpu", "gone": "cpu"}
    return {
        "gpus": "none",
        "instances": {
            name: {"driver": "external", "url": url} | ({"device": devices[name]} if name in devices else {})
            for name, url in instances.items()
        },
        "lifecycle": {"probe_interval_s": 0.1},
        "roles": ROLES,
    }


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with running_ollama() as big, running_ollama() as nas, running_ollama() as some:
        yield {"big": big.url, "nas": nas.url, "some": some.url, "gone": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def shared(urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("settings")
    environment = {"OLLAMA_MANAGER_ROLES__TOOL_SELECTOR__MODEL": " from-environment "}
    with Daemon(home, config(**urls), engine_url=NO_ENGINE, environment=environment) as daemon:
        daemon.start(until_ready=False).wait_until_alive()
        for name in ("big", "nas", "some"):
            daemon.wait_for_phase(name, "ready")
        yield daemon


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    """The shared daemon; what was changed is taken back."""
    yield shared
    for role in shared.get(SETTINGS)["roles"]:
        assert change(shared, {"roles": {role: None}}).status_code == 200


def change(daemon: Daemon, body: Any, path: str = SETTINGS) -> requests.Response:
    return daemon.call("POST", path, json=body)


def changed(daemon: Daemon, body: Any, path: str = SETTINGS) -> dict[str, Any]:
    answer = change(daemon, body, path)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def fields_of(answer: requests.Response) -> list[str]:
    return [one["field"] for one in error_of(answer, 422)["details"]["fields"]]


# --- values ---------------------------------------------------------------------------------------


def test_every_role_is_listed_with_all_its_values(daemon: Daemon) -> None:
    body = daemon.get(SETTINGS)
    ModelsBody.model_validate(body)
    assert set(body) == {
        "roles",
        "embedding_runtime_policy",
        "embedding_target_instance",
        "layer_routing",
        "fallback",
        "force_local",
        "rollout",
        "warnings",
    }
    assert list(body["roles"]) == [*BUILT_IN, "review"]
    assert body["roles"]["output"] == {
        "model": "tiny",
        "target": "auto",
        "policy": "auto",
        "kind": "generate",
        "fallbacks": [],
        "body": {"defaults": {"options": {"num_ctx": 2048}}, "overrides": {}},
        "system": {"text": None, "mode": "prepend"},
        "think": None,
        "instances": None,
        "reserved": 0,
        "concurrency": None,
        "queue": {"length": 100, "wait_s": 60.0},
        "weight": 1,
        "attempt_timeouts_s": [],
        "mode": "sync",
        "keep_warm": [],
        "paid_fallback": False,
        "strategy": "warm_first",
    }
    assert body["roles"]["thinking"]["model"] is None, "nothing is preselected"
    assert body["embedding_runtime_policy"] == body["roles"]["embedding"]["policy"] == "prefer_gpu"
    assert body["embedding_target_instance"] == "auto"
    assert body["layer_routing"] == dict.fromkeys([*BUILT_IN, "review"], "auto")


def test_precedence_is_override_then_environment_then_file_then_default(daemon: Daemon) -> None:
    def model_of(role: str) -> dict[str, Any]:
        body = daemon.get(f"{SETTINGS}/effective")
        EffectiveModelsBody.model_validate(body)
        found: dict[str, Any] = body["roles"][role]["model"]
        return found

    assert model_of("thinking") == {"value": None, "source": "default"}
    assert model_of("output") == {"value": "tiny", "source": "file"}
    assert model_of("tool_selector") == {"value": "from-environment", "source": "environment"}
    changed(daemon, {"roles": {role: {"model": "mine"} for role in ("thinking", "output", "tool_selector")}})
    for role in ("thinking", "output", "tool_selector"):
        assert model_of(role) == {"value": "mine", "source": "override"}
    changed(daemon, {"roles": {"tool_selector": {"model": None}, "output": {"model": ""}}})
    assert model_of("output") == {"value": "tiny", "source": "file"}
    assert model_of("tool_selector") == {"value": "from-environment", "source": "environment"}


def test_a_strategy_is_changed_live_and_taken_back(daemon: Daemon) -> None:
    def strategy() -> Any:
        return daemon.get(f"{SETTINGS}/effective")["roles"]["review"]["strategy"]

    assert strategy() == {"value": "warm_first", "source": "default"}
    changed(daemon, {"roles": {"review": {"strategy": " scored "}}})
    assert strategy() == {"value": "scored", "source": "override"}
    changed(daemon, {"roles": {"review": {"strategy": None}}})
    assert strategy() == {"value": "warm_first", "source": "default"}
    assert fields_of(change(daemon, {"roles": {"review": {"strategy": "best"}}})) == [
        "body.roles.review.strategy"
    ]


def test_effective_has_the_shape_of_the_values_with_a_source_at_each_leaf(daemon: Daemon) -> None:
    changed(daemon, {"embedding_target_instance": "nas", "roles": {"output": {"system": {"mode": "append"}}}})
    plain, effective = daemon.get(SETTINGS), daemon.get(f"{SETTINGS}/effective")
    assert effective.pop("ignored") == []
    warnings = plain.pop("warnings")
    assert all(set(one) == {"key", "message"} for one in warnings)

    def stripped(node: Any, like: Any) -> Any:
        if isinstance(node, dict) and set(node) == {"value", "source"}:
            assert node["source"] in {"override", "environment", "file", "default"}
            return node["value"]
        return {key: stripped(inner, like[key]) for key, inner in node.items()}

    assert stripped(effective, plain) == plain
    assert effective["embedding_target_instance"] == {"value": "nas", "source": "override"}
    assert effective["layer_routing"]["embedding"] == {"value": "nas", "source": "override"}
    assert effective["embedding_runtime_policy"] == {"value": "prefer_gpu", "source": "file"}
    assert effective["roles"]["output"]["system"]["mode"]["source"] == "override"
    assert effective["roles"]["output"]["system"]["text"]["source"] == "default"
    assert effective["roles"]["output"]["body"]["defaults"]["source"] == "file"


def test_whitespace_is_stripped_and_empty_text_is_null(daemon: Daemon) -> None:
    body = changed(
        daemon,
        {
            "roles": {
                "output": {"model": "  qwen3:8b\n", "policy": " prefer_gpu ", "fallbacks": [" thinking "]},
                "review": {"model": " ", "target": "", "policy": "", "system": {"text": "\t", "mode": ""}},
            },
            "embedding_target_instance": " nas ",
        },
    )
    output, review = body["roles"]["output"], body["roles"]["review"]
    assert (output["model"], output["policy"], output["fallbacks"]) == (
        "qwen3:8b",
        "prefer_gpu",
        ["thinking"],
    )
    assert (review["model"], review["target"], review["policy"]) == ("tiny", "auto", "auto")
    assert body["embedding_target_instance"] == "nas"
    kept = {"stop": ["\n", " "], "prompt": " a "}
    body = changed(daemon, {"roles": {"output": {"body": {"overrides": kept}}}})
    assert body["roles"]["output"]["body"]["overrides"] == kept, "what goes into requests is sent as it is"


def test_a_change_touches_nothing_that_it_does_not_name(daemon: Daemon) -> None:
    before = daemon.get(SETTINGS)
    after = changed(daemon, {"roles": {"output": {"think": False}}})
    assert after["roles"]["output"] == before["roles"]["output"] | {"think": False}
    before["roles"]["output"]["think"] = False
    assert after == before == daemon.get(SETTINGS)
    assert changed(daemon, {}) == after


@pytest.mark.parametrize("nothing", [{"body": None, "system": None}, {"body": {}, "system": {}}, {}])
def test_null_takes_back_and_nothing_says_nothing(daemon: Daemon, nothing: dict[str, Any]) -> None:
    values = {
        "body": {"defaults": {"a": 1}, "overrides": {"b": None}},
        "system": {"text": "x", "mode": "append"},
    }
    set_to = changed(daemon, {"roles": {"output": values}})["roles"]["output"]
    assert (set_to["body"], set_to["system"]) == (values["body"], values["system"])
    after = changed(daemon, {"roles": {"output": nothing}})["roles"]["output"]
    if nothing.get("body", 0) is None:
        assert after["body"] == {"defaults": {"options": {"num_ctx": 2048}}, "overrides": {}}
        assert after["system"] == {"text": None, "mode": "prepend"}
    else:
        assert after == set_to


def test_the_three_spellings_of_one_value_are_one_value(daemon: Daemon) -> None:
    for body in (
        {"embedding_target_instance": "nas", "embedding_runtime_policy": "cpu_only"},
        {"layer_routing": {"embedding": "nas"}, "roles": {"embedding": {"policy": "cpu_only"}}},
        {"roles": {"embedding": {"target": "nas", "policy": "cpu_only"}}, "embedding_target_instance": "nas"},
    ):
        after = changed(daemon, body)
        assert after["embedding_target_instance"] == after["layer_routing"]["embedding"] == "nas"
        assert after["embedding_runtime_policy"] == after["roles"]["embedding"]["policy"] == "cpu_only"
        changed(daemon, {"roles": {"embedding": None}})


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (
            {"embedding_target_instance": "nas", "layer_routing": {"embedding": "big"}},
            ["body.embedding_target_instance", "body.layer_routing.embedding"],
        ),
        (
            {"embedding_runtime_policy": "auto", "roles": {"embedding": {"policy": "cpu_only"}}},
            ["body.roles.embedding.policy", "body.embedding_runtime_policy"],
        ),
        (
            {"layer_routing": {"output": None}, "roles": {"output": {"target": "nas"}}},
            ["body.roles.output.target", "body.layer_routing.output"],
        ),
        (
            {"layer_routing": {"output": "nas"}, "roles": {"output": None}},
            ["body.roles.output", "body.layer_routing.output"],
        ),
    ],
)
def test_two_different_things_in_one_change_are_refused_with_both_fields(
    daemon: Daemon, body: dict[str, Any], fields: list[str]
) -> None:
    before = daemon.get(SETTINGS)
    assert fields_of(change(daemon, body)) == fields
    assert daemon.get(SETTINGS) == before


@pytest.mark.parametrize(
    ("body", "field"),
    [
        # shapes
        ({"role": {}}, "body.role"),
        ({"roles": {"output": {"modell": "x"}}}, "body.roles.output.modell"),
        ({"roles": {"output": {"body": {"default": {}}}}}, "body.roles.output.body.default"),
        ({"roles": {"output": {"policy": "gpu"}}}, "body.roles.output.policy"),
        ({"roles": {"output": {"system": {"mode": "add"}}}}, "body.roles.output.system.mode"),
        ({"roles": {"output": {"think": "yes"}}}, "body.roles.output.think"),
        ({"roles": {"output": {"think": 1}}}, "body.roles.output.think"),
        ({"roles": {"output": {"model": 1}}}, "body.roles.output.model"),
        ({"roles": {"output": {"model": "a b"}}}, "body.roles.output.model"),
        ({"roles": {"output": {"model": "tiny@nas"}}}, "body.roles.output.model"),
        ({"roles": {"output": {"target": "NAS"}}}, "body.roles.output.target"),
        ({"roles": {"output": {"fallbacks": "review"}}}, "body.roles.output.fallbacks"),
        ({"roles": {"output": {"body": {"defaults": []}}}}, "body.roles.output.body.defaults"),
        (
            {"roles": {"output": {"body": {"defaults": {"model": 1}}}}},
            "body.roles.output.body.defaults.model",
        ),
        ({"roles": {"Output": {}}}, "body.roles.Output"),
        ({"roles": []}, "body.roles"),
        ({"embedding_runtime_policy": "gpu_only"}, "body.embedding_runtime_policy"),
        ({"embedding_target_instance": 0}, "body.embedding_target_instance"),
        ({"layer_routing": ["nas"]}, "body.layer_routing"),
        ([], "body"),
        # contradictions
        ({"roles": {"output": {"target": "gpu0"}}}, "body.roles.output.target"),
        ({"layer_routing": {"output": "gpu0"}}, "body.layer_routing.output"),
        ({"roles": {"output": {"target": "big", "policy": "cpu_only"}}}, "body.roles.output.target"),
        (
            {"embedding_target_instance": "big", "embedding_runtime_policy": "cpu_only"},
            "body.embedding_target_instance",
        ),
        ({"roles": {"output": {"target": "some", "policy": "cpu_only"}}}, "body.roles.output.target"),
        ({"roles": {"output": {"fallbacks": ["embedding"]}}}, "body.roles.output.fallbacks"),
        ({"roles": {"output": {"fallbacks": ["nope"]}}}, "body.roles.output.fallbacks"),
        ({"roles": {"embedding": {"kind": "generate"}}}, "body.roles.embedding.kind"),
        ({"roles": {"review": {"kind": "embed"}}}, "body.roles.review.kind"),
        ({"roles": {"nope": {"model": "x"}}}, "body.roles.nope"),
        ({"roles": {"nope": {}}}, "body.roles.nope"),
        ({"roles": {"nope": None}}, "body.roles.nope"),
        ({"layer_routing": {"nope": "nas"}}, "body.roles.nope"),
    ],
)
def test_what_cannot_be_meant_is_422_with_its_field_and_changes_nothing(
    daemon: Daemon, body: Any, field: str
) -> None:
    before = daemon.get(f"{SETTINGS}/effective")
    whole = body if isinstance(body, list) else {"roles": {"control": {"model": "good"}}, **body}
    assert field in fields_of(change(daemon, whole))
    assert daemon.get(f"{SETTINGS}/effective") == before


def test_a_word_that_is_not_known_is_answered_with_those_that_are(daemon: Daemon) -> None:
    error = error_of(change(daemon, {"embedding_runtime_policy": "gpu"}), 422)
    assert all(word in error["message"] for word in ("auto", "prefer_gpu", "cpu_only"))
    error = error_of(change(daemon, {"layer_routing": {"output": "gpu0"}}), 422)
    assert "expected big, nas, some, gone, auto" in error["message"]


@pytest.mark.parametrize(
    "text", ['{"roles": {"\\ud800": {}}}', '{"roles": {"output": {"model": "\\ud800"}}}']
)
def test_half_a_character_is_422_like_anything_else(daemon: Daemon, text: str) -> None:
    answer = daemon.call("POST", SETTINGS, data=text, headers={"Content-Type": "application/json"})
    error_of(answer, 422)


def test_a_mistyped_query_is_refused(daemon: Daemon) -> None:
    for method, path in (("GET", SETTINGS), ("GET", f"{SETTINGS}/effective"), ("GET", ROUTING)):
        error_of(daemon.call(method, path, params={"rolle": "output"}), 422)


def test_roles_of_ones_own_are_made_and_removed(daemon: Daemon) -> None:
    body = changed(daemon, {"roles": {"alert-fast": {"kind": "generate", "model": "tiny", "target": "nas"}}})
    assert body["roles"]["alert-fast"]["kind"] == "generate"
    assert daemon.get(ROUTING)["roles"]["alert-fast"]["effective_target"] == "nas"
    changed(daemon, {"roles": {"output": {"fallbacks": ["alert-fast"]}}})
    refused = change(daemon, {"roles": {"alert-fast": None}})
    assert fields_of(refused) == ["body.roles.output.fallbacks"]
    body = changed(daemon, {"roles": {"alert-fast": None, "output": {"fallbacks": None}}})
    assert "alert-fast" not in body["roles"]
    assert "alert-fast" not in daemon.get(ROUTING)["roles"]


# --- in force -------------------------------------------------------------------------------------


def test_a_change_is_in_force_in_the_next_request(daemon: Daemon) -> None:
    for target in ("nas", "big", "some"):
        changed(daemon, {"layer_routing": {"output": target}})
        answer = daemon.call(
            "POST", "/api/generate", json={"model": "output", "prompt": "x", "stream": False}
        )
        assert (answer.status_code, answer.headers["X-Instance"]) == (200, target)


def test_routing_shows_where_each_role_goes_and_why(daemon: Daemon) -> None:
    body = daemon.get(ROUTING)
    RoutingBody.model_validate(body)
    assert list(body["roles"]) == [*BUILT_IN, "review"]
    embedding = body["roles"]["embedding"]
    endpoint = embedding.pop("endpoint")
    assert endpoint == daemon.instance("big")["endpoint"]
    assert embedding == {
        "requested_target": "auto",
        "effective_target": "big",
        "health": "healthy",
        "policy": "prefer_gpu",
        "model": "minilm",
        "fallback_reason": None,
        "message": None,
    }
    assert body["roles"]["thinking"] == {
        "requested_target": "auto",
        "effective_target": None,
        "endpoint": None,
        "health": None,
        "policy": "auto",
        "model": None,
        "fallback_reason": "model_missing",
        "message": "the role 'thinking' has no model; set one under roles.thinking.model",
    }


def test_a_fallback_is_visible_in_the_routing(daemon: Daemon) -> None:
    changed(daemon, {"roles": {"embedding": {"target": "gone"}}})
    shown = daemon.get(ROUTING)["roles"]["embedding"]
    assert (shown["requested_target"], shown["effective_target"]) == ("gone", "big")
    assert shown["fallback_reason"] is not None


def test_routing_is_changed_in_the_same_place(daemon: Daemon) -> None:
    body = changed(daemon, {"roles": {"output": {"target": " nas ", "policy": "cpu_only"}}}, ROUTING)
    RoutingBody.model_validate(body)
    assert (body["roles"]["output"]["requested_target"], body["roles"]["output"]["policy"]) == (
        "nas",
        "cpu_only",
    )
    assert daemon.get(SETTINGS)["layer_routing"]["output"] == "nas"
    body = changed(daemon, {"roles": {"output": {"target": None}}}, ROUTING)
    assert (body["roles"]["output"]["requested_target"], body["roles"]["output"]["policy"]) == (
        "auto",
        "cpu_only",
    )
    assert fields_of(change(daemon, {"roles": {"output": {"target": "big"}}}, ROUTING)) == [
        "body.roles.output.target"
    ]
    assert fields_of(change(daemon, {"roles": {"output": {"model": "x"}}}, ROUTING)) == [
        "body.roles.output.model"
    ]
    assert fields_of(change(daemon, {"roles": {"nope": {"target": "nas"}}}, ROUTING)) == ["body.roles.nope"]
    assert fields_of(change(daemon, {}, ROUTING)) == ["body.roles"]


def explain(daemon: Daemon, **request: Any) -> dict[str, Any]:
    answer = daemon.call("POST", f"{ROUTING}/explain", json=request)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    DecisionBody.model_validate(found)
    return found


def test_explain_says_where_a_request_would_go(daemon: Daemon) -> None:
    changed(daemon, {"roles": {"output": {"policy": "cpu_only"}}})
    found = explain(daemon, model="output")
    assert (found["role"], found["policy"], found["requested_target"]) == ("output", "cpu_only", "auto")
    assert [(one["instance"], one["model"], one["role"], one["fallback"]) for one in found["attempts"]] == [
        ("nas", "tiny", "output", None)
    ]
    assert {(one["instance"], one["reason"]) for one in found["passed_over"]} >= {
        ("big", "policy"),
        ("some", "policy"),
    }
    assert found["refused"] is None
    assert {one["instance"] for one in explain(daemon, model="tiny")["attempts"]} >= {"big", "nas", "some"}
    assert explain(daemon, model="tiny@big")["requested_target"] == "big"
    assert explain(daemon, model="tiny", instance="nas")["attempts"][0]["instance"] == "nas"
    assert explain(daemon, model="tiny", lane="output")["role"] == "output"


def test_a_role_with_a_dot_in_its_name_is_made_used_and_removed(daemon: Daemon) -> None:
    name = "gpt-4.1"
    body = changed(
        daemon, {"roles": {name: {"kind": "generate", "model": "tiny", "system": {"mode": "append"}}}}
    )
    assert (body["roles"][name]["model"], body["roles"][name]["system"]["mode"]) == ("tiny", "append")
    assert changed(daemon, {"layer_routing": {name: "nas"}})["roles"][name]["target"] == "nas"
    assert (
        changed(daemon, {"roles": {name: {"policy": "cpu_only"}}}, ROUTING)["roles"][name]["policy"]
        == "cpu_only"
    )
    effective = daemon.get(f"{SETTINGS}/effective")
    assert effective["roles"][name]["model"] == {"value": "tiny", "source": "override"}
    assert effective["ignored"] == []
    found = explain(daemon, model=name)
    assert (found["role"], [one["instance"] for one in found["attempts"]]) == (name, ["nas"])
    refused = change(daemon, {"roles": {name: {"target": "nowhere"}}})
    assert fields_of(refused) == [f"body.roles.{name}.target"]
    assert name not in changed(daemon, {"roles": {name: None}})["roles"]


def test_explain_names_the_lanes_there_are(daemon: Daemon) -> None:
    refused = explain(daemon, model="tiny", lane="nowhere")["refused"]
    assert refused["what"] == "unknown_lane"
    assert refused["message"].startswith("there is no lane 'nowhere'; lanes: thinking, control, output")


def test_explain_says_why_nothing_would_be_done(daemon: Daemon) -> None:
    found = explain(daemon, model="nope@nas")
    assert found["attempts"] == []
    assert found["refused"]["message"]
    assert explain(daemon, model="output", kind="embed")["refused"]["what"] == "contradiction"
    assert explain(daemon, model="tiny", instance="nope")["refused"]["what"] == "unknown"
    for body in ({}, {"model": ""}, {"model": "x", "kind": "chat"}, {"model": "x", "role": "output"}):
        error_of(daemon.call("POST", f"{ROUTING}/explain", json=body), 422)


def test_a_change_is_an_event(daemon: Daemon) -> None:
    before = daemon.events()[-1]["id"]
    changed(daemon, {"roles": {"output": {"model": "x", "system": {"text": "hush"}}}})
    (event,) = [one for one in daemon.events(before) if one["kind"] == "settings_changed"]
    assert event["instance"] is None
    assert event["detail"] == 'roles.output.model = "x"; roles.output.system.text changed'


def test_another_program_gets_the_model_through_the_client(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SETTINGS_API_URL", daemon.url)
    with ModelSettingsClient(ttl_s=0) as client:
        assert client.model_for("embedding") == "minilm"
        changed(daemon, {"roles": {"embedding": {"model": "other"}}})
        assert client.model_for("embedding") == "other"
        assert client.effective() == daemon.get(f"{SETTINGS}/effective")
        assert not client.stale


# --- across restarts ------------------------------------------------------------------------------


def test_changes_outlive_a_restart_and_what_does_not_fit_any_more_is_shown(
    urls: dict[str, str], tmp_path: Path
) -> None:
    with Daemon(tmp_path, config(**urls), engine_url=NO_ENGINE) as daemon:
        daemon.start(until_ready=False).wait_until_alive()
        body = {
            "roles": {
                "output": {"target": "nas", "policy": "cpu_only"},
                "own": {"kind": "embed", "model": "m"},
            },
            "embedding_runtime_policy": "auto",
        }
        changed(daemon, body)
        before = daemon.get(f"{SETTINGS}/effective")
        daemon.kill()
        daemon.start(until_ready=False).wait_until_alive()
        assert daemon.get(f"{SETTINGS}/effective") == before

        daemon.stop()
        daemon.configure(config(big=urls["big"]))
        daemon.start(until_ready=False).wait_until_alive()
        effective = daemon.get(f"{SETTINGS}/effective")
        (ignored,) = effective["ignored"]
        assert (ignored["key"], ignored["value"]) == ("roles.output.target", "nas")
        assert ignored["reason"] == "'nas' is no instance; expected big, auto"
        assert effective["layer_routing"]["output"] == {"value": "auto", "source": "default"}
        assert effective["roles"]["output"]["policy"] == {"value": "cpu_only", "source": "override"}
        assert "override_ignored" in daemon.log()
        assert wait_for(lambda: daemon.get(ROUTING)["roles"]["output"])["effective_target"] is None

        daemon.stop()
        daemon.configure(config(**urls))
        daemon.start(until_ready=False).wait_until_alive()
        assert daemon.get(f"{SETTINGS}/effective") == before


def test_a_model_that_nobody_has_is_a_warning_in_the_answer(daemon: Daemon) -> None:
    body = changed(daemon, {"roles": {"thinking": {"model": "no-such-model"}}})
    (warning,) = [one for one in body["warnings"] if one["key"] == "roles.thinking.model"]
    assert "'no-such-model'" in warning["message"]
    assert daemon.get(SETTINGS)["warnings"] == body["warnings"]
    body = changed(daemon, {"roles": {"thinking": {"model": "tiny"}}})
    assert "roles.thinking.model" not in [one["key"] for one in body["warnings"]]
