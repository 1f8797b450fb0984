from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.roles import (
    BUILT_IN_ROLES,
    BodyChanges,
    Policy,
    RequestKind,
    Role,
    RoutingSettings,
    merged,
    role_contradictions,
    thinks_unasked,
)

GPU_OF: dict[str, bool | None] = {"cpu": False, "gpu0": True, "nas": None}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


def role(name: str = "output", kind: RequestKind = RequestKind.GENERATE, **values: object) -> Role:
    return replace(Role(name, kind), **values)  # type: ignore[arg-type]


def said(*roles: Role) -> list[tuple[str, str, str]]:
    return list(role_contradictions({one.name: one for one in roles}, GPU_OF))


# --- contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", Policy)
def test_a_role_without_a_target_never_contradicts_its_policy(policy: Policy) -> None:
    assert said(role(policy=policy)) == []


@pytest.mark.parametrize("target", GPU_OF)
def test_only_what_is_known_to_be_on_the_cpu_is_for_the_cpu_only(target: str) -> None:
    assert said(role(target=target), role("control", target=target, policy=Policy.PREFER_GPU)) == []
    found = said(role(target=target, policy=Policy.CPU_ONLY))
    assert [one[:2] for one in found] == ([] if target == "cpu" else [("output", "target")])
    assert all(text.endswith("which policy cpu_only asks for; expected cpu") for _, _, text in found)


def test_where_nothing_is_on_the_cpu_only_auto_is_left() -> None:
    wrong = role(target="gpu0", policy=Policy.CPU_ONLY)
    ((_, _, text),) = role_contradictions({"output": wrong}, {"gpu0": True})
    assert text.endswith("; expected auto")


def test_a_target_must_be_an_instance() -> None:
    ((name, field, text),) = said(role(target="gone", policy=Policy.CPU_ONLY))
    assert (name, field, text) == (
        "output",
        "target",
        "'gone' is no instance; expected cpu, gpu0, nas or auto",
    )


def test_a_fallback_is_another_role_of_the_same_kind() -> None:
    embed = role("embedding", RequestKind.EMBED)
    found = said(role(fallbacks=("output", "gone", "embedding", "control")), role("control"), embed)
    assert [(name, field) for name, field, _ in found] == [("output", "fallbacks")] * 3
    assert [text.partition(";")[0] for _, _, text in found] == [
        "a role cannot fall back to itself",
        "'gone' is no role",
        "'embedding' does embed, and 'output' generate",
    ]


@pytest.mark.parametrize(
    ("one", "other", "fits"),
    [("a", "a:latest", True), ("a", None, True), (None, "a", True), ("a", "b", False)],
)
def test_vectors_of_two_models_are_never_mixed(one: str | None, other: str | None, fits: bool) -> None:
    pair = [role(model=one, fallbacks=("second",)), role("second", model=other)]
    assert said(*pair) == []
    found = said(*(replace(each, kind=RequestKind.EMBED) for each in pair))
    assert [each[:2] for each in found] == ([] if fits else [("output", "fallbacks")])


def test_roles_may_fall_back_to_each_other() -> None:
    assert said(role(fallbacks=("control",)), role("control", fallbacks=("output",))) == []


# --- changes of bodies ----------------------------------------------------------------------------


def test_the_role_wins_over_the_model_key_by_key() -> None:
    settings = RoutingSettings(
        roles={
            "output": role(
                changes=BodyChanges({"a": {"x": 1}}, {"b": 1}, system="of the role", system_mode="append")
            )
        },
        models={
            "m:latest": BodyChanges(
                {"a": {"x": 2, "y": 2}}, {"b": 2, "c": 2}, system="of the model", think=True
            )
        },
    )
    assert settings.changes_for("M", "output") == BodyChanges(
        {"a": {"x": 1, "y": 2}}, {"b": 1, "c": 2}, "of the role", "append", think=True
    )
    assert settings.changes_for("m:latest", None) == settings.models["m:latest"]
    assert settings.changes_for("other", "output") == settings.roles["output"].changes


def test_nothing_is_changed_unless_somebody_said_so() -> None:
    settings = RoutingSettings(roles={"output": role()})
    for name in ("output", "gone", None):
        assert settings.changes_for("m", name).empty
    assert not BodyChanges(think=False).empty
    assert not BodyChanges(system="").empty


@pytest.mark.parametrize(
    ("model", "thinks"),
    [
        ("qwen3", True),
        ("Qwen3:8b", True),
        ("hf.co/someone/Qwen3-8B-GGUF", True),
        ("registry.ollama.ai/library/qwen3:latest", True),
        ("qwen2.5-coder:7b", False),
        ("qwen3-like/llama3", False),
    ],
)
def test_only_the_qwen3_family_is_kept_from_thinking_unasked(model: str, thinks: bool) -> None:
    assert thinks_unasked(model) is thinks
    settings = RoutingSettings(roles={"output": role(changes=BodyChanges(think=True))})
    assert settings.changes_for(model, None).think is (False if thinks else None)
    assert settings.changes_for(model, "output").think is True


@given(OBJECTS, OBJECTS)
def test_merging_keeps_everything_that_is_not_said_anew(
    below: dict[str, object], above: dict[str, object]
) -> None:
    result = merged(below, above)
    assert set(result) == set(below) | set(above)
    for key, value in result.items():
        if key not in above:
            assert value == below[key]
        elif not (isinstance(above[key], dict) and isinstance(below.get(key), dict)):
            assert value == above[key]
    assert merged(result, above) == result


def test_four_roles_generate_and_one_embeds() -> None:
    assert [name for name, kind in BUILT_IN_ROLES.items() if kind is RequestKind.EMBED] == ["embedding"]
    assert list(BUILT_IN_ROLES) == ["thinking", "control", "output", "tool_selector", "embedding"]
