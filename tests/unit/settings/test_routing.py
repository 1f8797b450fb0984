"""Roles, models and the gateway in the configuration: what may be written, what contradicts what."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.models import model_key
from manager.domain.roles import BUILT_IN_ROLES, BodyChanges, Policy, RequestKind
from manager.errors import ConfigurationError
from manager.settings import (
    GatewaySettings,
    LoadedSettings,
    RoleSettings,
    load_settings,
    load_templates,
    resolve_instances,
    routing_settings,
)

if TYPE_CHECKING:
    from pathlib import Path

HOME = {"HOME": "/home/someone"}
CPU = "  cpu: {template: ollama-cpu}\n"
INSTANCES = (
    "gpus: none\ninstances:\n"
    f"{CPU}"
    "  card: {template: ollama-gpu}\n"
    "  listed: {template: ollama-gpu, device: auto}\n"
    "  nas: {driver: external, url: 'http://nas:11434', device: cpu}\n"
    "  big: {driver: external, url: 'http://big:11434', device: gpu}\n"
    "  some: {driver: external, url: 'http://some:11434'}\n"
)


def load(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> LoadedSettings:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, environ=HOME | (environ or {}))


def problems(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    """What is said of a configuration and its templates together."""
    try:
        loaded = load(tmp_path, text, environ)
    except ConfigurationError as error:
        caught = error
    else:
        with pytest.raises(ConfigurationError) as raised:
            resolve_instances(loaded, load_templates(loaded.settings))
        caught = raised.value
    return [line.removeprefix(f"{tmp_path / 'c.yaml'}:") for line in caught.message.splitlines()]


def roles(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> dict[str, RoleSettings]:
    return load(tmp_path, text, environ).settings.roles


# --- roles ----------------------------------------------------------------------------------------


def test_the_built_in_roles_are_always_there_without_a_model(tmp_path: Path) -> None:
    found = roles(tmp_path, "")
    assert {name: role.kind for name, role in found.items()} == dict(BUILT_IN_ROLES)
    for role in found.values():
        assert (role.model, role.target, role.policy, role.fallbacks) == (None, None, Policy.AUTO, ())


def test_a_role_of_ones_own_comes_after_them_and_generates_unless_it_says_otherwise(tmp_path: Path) -> None:
    found = roles(tmp_path, "roles:\n  a: {}\n  whisper-1: {kind: transcribe}\n  output: {model: x}\n")
    assert list(found) == [*BUILT_IN_ROLES, "a", "whisper-1"]
    assert (found["a"].kind, found["whisper-1"].kind) == (RequestKind.GENERATE, RequestKind.TRANSCRIBE)
    assert found["output"].model == "x"


@pytest.mark.parametrize("nothing", ["null", "''", "'  '"])
def test_an_empty_model_is_none_and_auto_is_no_target(tmp_path: Path, nothing: str) -> None:
    role = roles(tmp_path, f"roles: {{output: {{model: {nothing}, target: {nothing}}}}}")["output"]
    assert (role.model, role.target) == (None, None)
    assert roles(tmp_path, "roles: {output: {target: ' auto '}}")["output"].target is None


def test_whitespace_around_names_is_stripped_and_kept_where_it_goes_into_requests(tmp_path: Path) -> None:
    text = r"""
roles:
  output:
    model: " qwen3:8b "
    target: " cpu "
    body: {defaults: {stop: ["\n\n", " x"]}, overrides: {suffix: " "}}
    system: {text: " Be brief.\n"}
"""
    role = roles(tmp_path, text)["output"]
    assert (role.model, role.target, role.system.text) == ("qwen3:8b", "cpu", "Be brief.")
    assert role.body.defaults == {"stop": ["\n\n", " x"]}
    assert role.body.overrides == {"suffix": " "}


def test_all_of_it_reaches_the_routing(tmp_path: Path) -> None:
    text = """
roles:
  output:
    model: qwen3:8b
    target: cpu
    policy: cpu_only
    fallbacks: [thinking]
    body: {defaults: {a: 1}, overrides: {b: 2}}
    system: {text: t, mode: replace}
    think: true
models:
  auto_pull: true
  list_roles: false
  settings: {Qwen3: {think: true, system: {text: s}}}
"""
    settings = load(tmp_path, text).settings
    routing = routing_settings(settings.roles, settings.models)
    role = routing.roles["output"]
    assert (role.name, role.kind, role.model, role.target) == (
        "output",
        RequestKind.GENERATE,
        "qwen3:8b",
        "cpu",
    )
    assert (role.policy, role.fallbacks) == (Policy.CPU_ONLY, ("thinking",))
    assert role.changes == BodyChanges({"a": 1}, {"b": 2}, "t", "replace", think=True)
    assert routing.models == {model_key("qwen3"): BodyChanges(system="s", think=True)}
    assert (routing.auto_pull, routing.list_roles) == (True, False)
    assert load(tmp_path, "").settings.models.list_roles is True


@pytest.mark.parametrize("variable", ["GPT_4_1", "GPT-4.1"])
def test_a_variable_sets_a_role_with_a_dot_in_its_name(tmp_path: Path, variable: str) -> None:
    found = load(
        tmp_path, "roles: {gpt-4.1: {policy: auto}}", {f"OLLAMA_MANAGER_ROLES__{variable}__MODEL": "x"}
    )
    role = found.settings.roles["gpt-4.1"]
    assert (role.model, role.kind) == ("x", RequestKind.GENERATE)
    assert found.kind_of_source(("roles", "gpt-4.1", "model")) == "environment"
    assert found.kind_of_source(("roles", "gpt-4.1", "policy")) == "file"


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("ROLES__THINKING__MODEL", " qwen3:8b ", "thinking.model", "qwen3:8b"),
        ("ROLES__THINKING__MODEL", "null", "thinking.model", None),
        ("ROLES__TOOL_SELECTOR__TARGET", "nas", "tool_selector.target", "nas"),
        ("ROLES__TOOL_SELECTOR__TARGET", "auto", "tool_selector.target", None),
        ("ROLES__EMBEDDING__POLICY", "prefer_gpu", "embedding.policy", Policy.PREFER_GPU),
        ("ROLES__OUTPUT__THINK", "false", "output.think", False),
        ("ROLES__OUTPUT__SYSTEM__MODE", "append", "output.system.mode", "append"),
        ("ROLES__OUTPUT__FALLBACKS", '["thinking"]', "output.fallbacks", ("thinking",)),
        ("ROLES__OUTPUT__BODY__DEFAULTS", '{"stop": [" "]}', "output.body.defaults", {"stop": [" "]}),
        ("ROLES__OUTPUT__BODY", '{"defaults": {"n": 1}}', "output.body.defaults", {"n": 1, "m": 2}),
        ("ROLES__CODE_REVIEW__MODEL", "x", "code-review.model", "x"),
        ("ROLES__NEW_ONE__MODEL", "x", "new_one.model", "x"),
    ],
)
def test_a_variable_sets_one_value_of_a_role(
    tmp_path: Path, name: str, text: str, path: str, value: object
) -> None:
    written = (
        "instances: {nas: {driver: external, url: 'http://nas'}}\n"
        "roles: {code-review: {policy: auto}, output: {body: {defaults: {m: 2}}}}\n"
        if "DEFAULTS" not in name
        else "roles: {}"
    )
    found = load(tmp_path, written, {f"OLLAMA_MANAGER_{name}": text})
    here: Any = found.settings.roles
    for key in path.split("."):
        here = here[key] if isinstance(here, dict) else getattr(here, key)
    assert here == value
    assert found.source_of(f"roles.{path}") == f"environment OLLAMA_MANAGER_{name}"
    assert found.kind_of_source(f"roles.{path}") == "environment"


def test_names_of_models_are_given_together_as_json(tmp_path: Path) -> None:
    entry = json.dumps({"qwen3:8b": {"think": True}})
    found = load(
        tmp_path,
        "models: {settings: {'qwen3:8b': {system: {text: s}}}}",
        {"OLLAMA_MANAGER_MODELS__SETTINGS": entry},
    )
    one = found.settings.models.settings["qwen3:8b"]
    assert (one.think, one.system.text) == (True, "s")
    for name in ("MODELS__SETTINGS__LLAMA3__THINK", "MODELS__WRITERS__X", "ROLES__OUTPUT__BODY__DEFAULTS__N"):
        (problem,) = problems(tmp_path, "", {f"OLLAMA_MANAGER_{name}": "1"})
        assert problem.startswith(f"OLLAMA_MANAGER_{name}: unknown variable;")


REFUSED = [
    # wrong types and words
    ("roles: {Output: {}}", "roles.Output: 'Output' as a key; expected text that matches"),
    ("roles: {output: x}", "roles.output: 'x'; expected a mapping"),
    ("roles: {output: {modell: x}}", "roles.output.modell: unknown key; did you mean 'model'? allowed: mode"),
    ("roles: {output: {model: 1}}", "roles.output.model: 1; expected text"),
    ("roles: {output: {model: a b}}", "roles.output.model: 'a b'; expected the name of a model, without"),
    ("roles: {output: {model: a@cpu}}", "roles.output.model: 'a@cpu'; expected the name of a model alone;"),
    ("roles: {output: {target: CPU}}", "roles.output.target: 'CPU'; expected text that matches"),
    ("roles: {output: {policy: gpu}}", "roles.output.policy: 'gpu'; expected 'auto', 'prefer_gpu' or 'cpu_"),
    ("roles: {output: {think: maybe}}", "roles.output.think: 'maybe'; expected true or false"),
    ("roles: {a: {kind: chat}}", "roles.a.kind: 'chat'; expected 'generate', 'embed' or 'transcribe'"),
    ("roles: {output: {fallbacks: thinking}}", "roles.output.fallbacks: 'thinking'; expected a list"),
    ("roles: {output: {system: {mode: add}}}", "roles.output.system.mode: 'add'; expected 'prepend', 'appen"),
    ("roles: {output: {body: {defaults: [1]}}}", "roles.output.body.defaults: a list; expected a mapping"),
    ("roles: {output: {body: {default: {}}}}", "roles.output.body.default: unknown key; did you mean 'defau"),
    (
        "roles: {output: {body: {overrides: {options: {n: [1, .nan]}}}}}",
        "roles.output.body.overrides.options.n.1: nan; expected a finite number",
    ),
    (
        "roles: {output: {body: {defaults: {model: x}}}}",
        "roles.output.body.defaults.model: which model answers is decided by the role; expected other keys",
    ),
    # what contradicts something else
    ("roles: {embedding: {kind: generate}}", "roles.embedding.kind: the role 'embedding' does embed; leave"),
    (
        "roles: {output: {target: gone}}",
        "roles.output.target: 'gone' is no instance; expected cpu, gpuN (gpus: auto), auto",
    ),
    ("gpus: none\nroles: {output: {target: gpu0}}", "roles.output.target: 'gpu0' is no instance; expected c"),
    (
        "roles: {output: {target: gpu0, policy: cpu_only}}",
        "roles.output.target: 'gpu0' does not run on the CPU only, which policy cpu_only asks for; expected",
    ),
    *(
        (
            f"{INSTANCES}roles: {{output: {{target: {target}, policy: cpu_only}}}}",
            f"roles.output.target: '{target}' does not run on the CPU only, which policy cpu_only asks for;",
        )
        for target in ("card", "listed", "big", "some")
    ),
    ("roles: {output: {fallbacks: [gone]}}", "roles.output.fallbacks: 'gone' is no role; expected thinking,"),
    ("roles: {output: {fallbacks: [output]}}", "roles.output.fallbacks: a role cannot fall back to itself;"),
    (
        "roles: {output: {fallbacks: [embedding]}}",
        "roles.output.fallbacks: 'embedding' does embed, and 'output' generate; expected a role of the same",
    ),
    (
        "roles: {embedding: {model: bge-m3, fallbacks: [e]}, e: {kind: embed, model: other}}",
        "roles.embedding.fallbacks: 'e' embeds with another model, whose vectors cannot be compared; expecte",
    ),
    # models
    ("models: {auto_pull: maybe}", "models.auto_pull: 'maybe'; expected true or false"),
    ("models: {settings: {'': {}}}", "models.settings.: '' as a key; expected text that is not empty"),
    ("models: {settings: {a: {model: x}}}", "models.settings.a.model: unknown key; allowed: body, system, t"),
    (
        "models: {settings: {qwen3: {}, 'Qwen3:latest': {}}}",
        "models.settings.Qwen3:latest: the same model as 'qwen3'; expected each model once",
    ),
    (
        "models: {writers: {ollama-models: gone}}",
        "models.writers.ollama-models: 'gone' is no instance; expected cpu, gpuN (gpus: auto)",
    ),
    (
        f"{INSTANCES}models: {{writers: {{ollama-models: nas}}}}",
        "models.writers.ollama-models: 'nas' has driver external, which has no volume of ours",
    ),
    ("models: {writers: {other: cpu}}", "models.writers.other: 'cpu' cannot write to it; it has: ollama-mod"),
    # the gateway
    ("gateway: {connect_timeout_s: 0}", "gateway.connect_timeout_s: 0; expected a number above 0"),
    ("gateway: {keep_alive_s: -1}", "gateway.keep_alive_s: -1; expected 0 or more"),
    ("gateway: {access_log: 1.5}", "gateway.access_log: 1.5; expected 1 or less"),
    ("gateway: {max_body: big}", "gateway.max_body: 'big'; expected a size such as 512m or 8g"),
    ("gateway: {max_body: 0}", "gateway.max_body: 0; expected a size above zero"),
    ("gateway: {default_project: ''}", "gateway.default_project: ''; expected text that is not empty"),
    ("gateway: {headers: {lane: 'X Lane'}}", "gateway.headers.lane: 'X Lane'; expected the name of a header"),
    ("gateway: {headers: {lane: Host}}", "gateway.headers.lane: 'Host'; expected the name of a header that"),
    ("gateway: {headers: {trace: X}}", "gateway.headers.trace: unknown key; did you mean"),
    (
        "gateway: {headers: {lane: x-instance}}",
        "gateway.headers.lane: 'x-instance' is the name for instance already",
    ),
    ("instances: {auto: {template: a}}", "instances.auto: the word for any instance, wherever one is named;"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), REFUSED)
def test_what_cannot_be_meant_is_refused_with_line_and_key(tmp_path: Path, text: str, problem: str) -> None:
    (line,) = problems(tmp_path, "\n" + text + "\n")
    assert line.startswith(f"{1 + len(text.splitlines())}: {problem}")


@pytest.mark.parametrize(
    "text",
    [
        "roles: {output: {target: gpu7, policy: prefer_gpu}}",
        "roles: {output: {target: cpu, policy: cpu_only}}",
        f"{INSTANCES}roles: {{output: {{target: nas, policy: cpu_only}}}}",
        f"{INSTANCES}roles: {{output: {{target: card, policy: prefer_gpu}}}}",
        "roles: {embedding: {kind: embed}}",
        "roles: {output: {fallbacks: [thinking]}, thinking: {fallbacks: [output]}}",
        "roles: {embedding: {model: bge-m3, fallbacks: [e]}, e: {kind: embed, model: Bge-m3:latest}}",
        "models: {writers: {ollama-models: cpu, other: gpu7}}",
        f"{INSTANCES}models: {{writers: {{ollama-models: card}}}}",
    ],
)
def test_what_can_be_meant_is_allowed(tmp_path: Path, text: str) -> None:
    loaded = load(tmp_path, text)
    resolve_instances(loaded, load_templates(loaded.settings))


def test_bodies_are_bounded_in_depth(tmp_path: Path) -> None:
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    (line,) = problems(
        tmp_path, "", {"OLLAMA_MANAGER_ROLES__OUTPUT__BODY__DEFAULTS": json.dumps({"n": deep})}
    )
    assert line.endswith("roles.output.body.defaults.n: nested too deeply; expected at most 32 levels")


@pytest.mark.parametrize(
    "body", ['{"a": "\\ud800"}', '{"\\ud800": 1}', '{"a": {"\\ud800": 1}}', '{"a": ["\\udfff"]}']
)
def test_half_a_character_cannot_be_sent(tmp_path: Path, body: str) -> None:
    (line,) = problems(tmp_path, "", {"OLLAMA_MANAGER_ROLES__OUTPUT__BODY__OVERRIDES": body})
    assert "roles.output.body.overrides" in line
    assert "; expected text in Unicode" in line


# --- the gateway ----------------------------------------------------------------------------------


def test_the_gateway_has_its_defaults(tmp_path: Path) -> None:
    found = load(tmp_path, "").settings.gateway
    assert found == GatewaySettings()
    assert (found.connect_timeout_s, found.first_byte_timeout_s, found.idle_timeout_s) == (5, 600, 300)
    assert (found.total_timeout_s, found.drain_timeout_s, found.keep_alive_s) == (3600, 30, 15)
    assert (found.max_body, found.default_project, found.access_log) == (256 * 2**20, "default", 1)
    assert list(dict(found.headers).values()) == [
        "X-Instance",
        "X-Lane",
        "X-Project-ID",
        "X-Intent",
        "X-Local-Only",
    ]


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [("1g", 2**30, "1g"), ("1.5m", 3 * 2**19, "1536k"), ("100", 100, "100"), ("4t", 2**42, "4t")],
)
def test_sizes_are_read_and_shown_in_dockers_notation(
    tmp_path: Path, text: str, size: int, shown: str
) -> None:
    for found in (
        load(tmp_path, f"gateway: {{max_body: {text}}}").settings.gateway,
        load(tmp_path, "", {"OLLAMA_MANAGER_GATEWAY__MAX_BODY": text}).settings.gateway,
    ):
        assert found.max_body == size
        assert found.model_dump(mode="json")["max_body"] == shown


def test_headers_can_have_the_names_that_callers_use_already(tmp_path: Path) -> None:
    found = load(tmp_path, "gateway: {headers: {lane: X-Other-Lane}}").settings.gateway.headers
    assert (found.lane, found.instance) == ("X-Other-Lane", "X-Instance")
