"""What was changed at run time, above what is written, and what becomes of it when that changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.roles import BUILT_IN_ROLES, Policy, RequestKind
from manager.settings import load_settings
from manager.settings.overrides import (
    FIELDS,
    Overlay,
    Sourced,
    overlaid,
    setting_key,
    split_key,
    with_change,
    written_roles,
)
from manager.settings.section import FoundIds

if TYPE_CHECKING:
    from pathlib import Path

HOME = {"HOME": "/home/someone"}
INSTANCES: dict[str, bool | None] = {"cpu": False, "gpu0": True, "nas": None}


@pytest.fixture
def written(tmp_path: Path) -> dict[str, dict[str, Sourced]]:
    file = tmp_path / "c.yaml"
    file.write_text(
        "roles:\n"
        "  output: {model: qwen3:8b, policy: prefer_gpu, body: {defaults: {n: 1}}}\n"
        "  own: {kind: embed, model: bge-m3}\n"
        "  embedding: {model: bge-m3, fallbacks: [own]}\n"
    )
    environ = HOME | {
        "OLLAMA_MANAGER_ROLES__OUTPUT__TARGET": "gpu0",
        "OLLAMA_MANAGER_ROLES__OUTPUT__BODY__DEFAULTS": '{"m": 2}',
    }
    overrides = {"roles": {"thinking": {"model": "llama3"}}}
    return written_roles(load_settings(file, environ=environ, overrides=overrides))


def over(written: dict[str, dict[str, Sourced]], overrides: dict[str, Any], **how: Any) -> Overlay:
    return overlaid(written, overrides, INSTANCES, {}, **({"found": FoundIds()} | how))


def changed(
    written: dict[str, dict[str, Sourced]], overrides: dict[str, Any], change: Any, ignored: Any = ()
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    return with_change(written, overrides, change, INSTANCES, {}, ignored=ignored)


Written = dict[str, dict[str, Sourced]]


# --- what is in force -----------------------------------------------------------------------------


def test_each_value_says_where_it_comes_from(written: Written) -> None:
    found = over(written, {"roles.output.policy": "auto"}).values
    output = found["output"]
    assert output["model"] == Sourced("qwen3:8b", "file")
    assert output["target"] == Sourced("gpu0", "environment")
    assert output["policy"] == Sourced("auto", "override")
    assert output["body.defaults"] == Sourced({"n": 1, "m": 2}, "environment")
    assert output["system.mode"] == Sourced("prepend", "default")
    assert found["thinking"]["model"] == Sourced("llama3", "command line")
    assert found["control"]["target"] == Sourced("auto", "default")
    assert found["own"]["kind"] == Sourced("embed", "file")
    assert all(tuple(fields) == FIELDS for fields in found.values())


def test_an_override_wins_over_everything_that_is_written(written: Written) -> None:
    found = over(
        written,
        {
            "roles.output.model": "other",
            "roles.output.target": "auto",
            "roles.output.body.defaults": {},
            "roles.thinking.model": "third",
            "roles.control.think": False,
        },
    )
    assert found.ignored == ()
    output = found.roles["output"]
    assert (output.model, output.target, output.body.defaults) == ("other", None, {})
    assert found.roles["thinking"].model == "third"
    assert found.roles["control"].think is False


def test_a_role_of_its_own_is_there_because_of_its_kind(written: Written) -> None:
    found = over(written, {"roles.zebra.kind": "transcribe", "roles.aardvark.kind": "generate"})
    assert list(found.roles) == [*BUILT_IN_ROLES, "own", "aardvark", "zebra"]
    assert found.roles["zebra"].kind is RequestKind.TRANSCRIBE
    assert found.values["zebra"]["kind"] == Sourced("transcribe", "override")
    assert found.values["zebra"]["policy"] == Sourced("auto", "default")


# --- what does not fit any more -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("roles.output.target", "gone", "'gone' is no instance; expected cpu, gpu0, nas, auto"),
        (
            "roles.output.policy",
            "cpu_only",
            "'gpu0' does not run on the CPU only, which",
        ),
        ("roles.output.fallbacks", ["gone"], "'gone' is no role; expected thinking,"),
        (
            "roles.embedding.model",
            "other",
            "'own' embeds with another model",
        ),
        ("roles.own.model", "other", "'own' embeds with another model"),
        ("roles.own.kind", "generate", "the role 'own' does embed, which cannot be changed"),
        ("roles.gone.model", "x", "there is no role 'gone' (there is: thinking,"),
        ("roles.new.kind", "chat", "'chat'; expected 'generate', 'embed' or 'transcribe'"),
        ("roles.output.policy", 1, "1; expected 'auto', 'prefer_gpu' or 'cpu_only'"),
        ("roles.output.model", "a@cpu", "'a@cpu'; expected the name of a model alone"),
        ("roles.output.body.overrides", {"Stream": True}, "body.overrides.Stream: whether an answer"),
        ("roles.output.body.defaults", {"model": "x"}, "body.defaults.model: which model answers is decided"),
        ("roles.output.colour", "red", "there is no such setting"),
        ("roles.output", "red", "there is no such setting"),
        ("rolls.output.model", "red", "there is no such setting"),
        ("kind", "embed", "there is no such setting"),
        (".kind", "embed", "there is no such setting"),
        ("roles.Big.kind", "embed", "there is no such setting"),
        ("roles.output.model", None, "there is no such setting"),
    ],
)
def test_what_does_not_fit_is_ignored_and_says_why(
    written: Written, key: str, value: Any, reason: str
) -> None:
    found = over(written, {key: value, "roles.control.model": "kept"})
    (ignored,) = found.ignored
    assert (ignored.key, ignored.value) == (key, value)
    assert ignored.reason.startswith(reason)
    assert found.roles["control"].model == "kept"
    assert {**found.roles, "control": None} == {**over(written, {}).roles, "control": None}


def test_all_that_was_said_of_a_role_that_is_gone_is_ignored(written: Written) -> None:
    saved = {"roles.gone.kind": "chat", "roles.gone.model": "x", "roles.output.fallbacks": ["gone"]}
    found = over(written, saved)
    assert {one.key for one in found.ignored} == set(saved)


def test_a_role_for_transcriptions_is_not_left_without_requests(written: Written) -> None:
    saved = {"roles.ears.kind": "transcribe", "roles.ears.mode": "async"}
    found = over(written, saved, preferred=["roles.ears.kind"])
    assert [(one.key, one.reason) for one in found.ignored] == [
        ("roles.ears.mode", "runs take no transcriptions; expected sync")
    ]
    assert found.roles["ears"].mode == "sync"


def test_of_two_that_contradict_each_other_the_preferred_one_stays(written: Written) -> None:
    saved = {"roles.control.target": "gpu0", "roles.control.policy": "cpu_only"}
    assert [one.key for one in over(written, saved).ignored] == ["roles.control.target"]
    found = over(written, saved, preferred=["roles.control.target"])
    assert [one.key for one in found.ignored] == ["roles.control.policy"]


def test_a_card_that_is_away_may_still_be_meant_where_cards_are_found_by_themselves(written: Written) -> None:
    saved = {"roles.control.target": "gpu7"}
    assert over(written, saved, found=FoundIds(cards=True)).roles["control"].target == "gpu7"
    assert over(written, saved).ignored[0].key == "roles.control.target"


def test_what_the_configuration_itself_says_is_never_ignored(written: Written) -> None:
    found = overlaid(written, {"roles.control.model": "x"}, {"cpu": False}, {}, found=FoundIds())
    assert found.ignored == ()
    assert found.roles["output"].target == "gpu0"


# --- changes --------------------------------------------------------------------------------------


def test_a_change_touches_only_what_it_names(written: Written) -> None:
    saved = {"roles.output.model": "a", "roles.control.model": "b"}
    after, problems = changed(
        written, saved, {"output": {"target": " cpu ", "policy": " cpu_only "}, "new": {"kind": "embed"}}
    )
    assert problems == []
    assert after == saved | {
        "roles.output.target": "cpu",
        "roles.output.policy": "cpu_only",
        "roles.new.kind": "embed",
    }


@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_null_takes_one_value_back(written: Written, nothing: object) -> None:
    saved = {"roles.output.model": "a", "roles.output.think": True}
    after, problems = changed(written, saved, {"output": {"model": nothing, "target": nothing}})
    assert (after, problems) == ({"roles.output.think": True}, [])


def test_null_for_a_role_takes_all_of_it_back(written: Written) -> None:
    saved = {"roles.output.model": "a", "roles.output.think": True, "roles.new.kind": "embed"}
    assert changed(written, saved, {"output": None}) == ({"roles.new.kind": "embed"}, [])
    assert changed(written, saved, {"new": None, "output": None, "control": None}) == ({}, [])


def test_the_kind_of_a_configured_role_may_be_said_but_is_not_saved(written: Written) -> None:
    assert changed(written, {}, {"own": {"kind": "embed", "model": None}}) == ({}, [])


def test_the_kind_of_a_role_of_ones_own_may_change(written: Written) -> None:
    after, problems = changed(written, {"roles.new.kind": "embed"}, {"new": {"kind": "generate"}})
    assert (after, problems) == ({"roles.new.kind": "generate"}, [])


# A dot in a role's name is the trap: a field may have one as well.
DOTTED = "gpt-4.1"
TRICKY = ["gpt-4.1", "x.system", "x.body", "output.model", "roles.output", "a.b.c.kind", "output.kind"]


@pytest.mark.parametrize("name", TRICKY)
def test_a_role_with_a_dot_in_its_name_is_changed_read_and_removed_like_any_other(
    written: Written, name: str
) -> None:
    change = {
        name: {"kind": "generate", "model": "qwen3:8b", "system.mode": "append", "body.defaults": {"a": 1}}
    }
    after, problems = changed(written, {"roles.output.model": "kept"}, change)
    assert problems == []
    found = over(written, after)
    assert found.ignored == ()
    assert set(found.roles) == {*BUILT_IN_ROLES, "own", name}
    role = found.roles[name]
    assert (role.model, role.system.mode, role.body.defaults) == ("qwen3:8b", "append", {"a": 1})
    assert found.values[name]["model"] == Sourced("qwen3:8b", "override")
    assert found.roles["output"].model == "kept"
    assert changed(written, after, {name: None}) == ({"roles.output.model": "kept"}, [])


def test_roles_whose_names_begin_alike_keep_to_themselves(written: Written) -> None:
    names = ["gpt-4", "gpt-4.1", "gpt-4.1.x", "gpt"]
    saved, problems = changed(written, {}, {name: {"kind": "generate", "model": name} for name in names})
    assert problems == []
    after, _ = changed(written, saved, {"gpt-4": None, "gpt-4.1": {"model": None}})
    found = over(written, after)
    assert {name: found.roles[name].model for name in found.roles if name.startswith("gpt")} == {
        "gpt": "gpt",
        "gpt-4.1": None,
        "gpt-4.1.x": "gpt-4.1.x",
    }


def test_a_key_says_which_role_and_which_field() -> None:
    for role in ("output", "tool_selector", *TRICKY):
        for field in FIELDS:
            assert split_key(setting_key(role, field)) == (role, field)
    assert setting_key("output", "model") == "roles.output.model"
    assert setting_key(DOTTED, "model") == 'roles."gpt-4.1".model'
    for text in ("roles.output", "output.model", 'roles."output".model', 'roles."a.b.model', "roles..model"):
        key = split_key(text)
        assert key is None or key[0] in ("", '"a'), text


def test_what_is_wrong_with_a_role_with_a_dot_names_its_key(written: Written) -> None:
    saved = {'roles."gpt-4.1".kind': "generate"}
    _, problems = changed(written, saved, {DOTTED: {"target": "gone", "policy": "no"}})
    assert [key for key, _ in problems] == ['roles."gpt-4.1".policy']
    _, problems = changed(written, saved, {DOTTED: {"target": "gone"}})
    assert [key for key, _ in problems] == ['roles."gpt-4.1".target']
    (ignored,) = over(written, {**saved, 'roles."gpt-4.1".target': "gone"}).ignored
    assert ignored.key == 'roles."gpt-4.1".target'


@pytest.mark.parametrize(
    "name", [".a", "a.", "a..b", "A", "1a", "a" * 65, "a/b", "a:b", "a@b", 'a"b', "a b", ""]
)
def test_a_name_that_could_be_mistaken_is_no_role(written: Written, name: str) -> None:
    _, problems = changed(written, {}, {name: {"kind": "generate"}})
    assert "as a role; expected text that matches" in problems[0][1]
    assert not set(over(written, {setting_key(name, "kind"): "generate"}).roles) - {*BUILT_IN_ROLES, "own"}


def test_a_long_list_of_roles_is_cut_where_one_is_unknown(written: Written) -> None:
    many = {f"roles.r{number:03}.kind": "generate" for number in range(100)}
    _, problems = changed(written, many, {"nope": {"model": "x"}})
    assert "and 96 more" in problems[0][1]


NO_ROLE = "there is no role 'nope' (there is: thinking, control, output, tool_selector, embedding, own"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nope": {"model": "x"}}, {"roles.nope": NO_ROLE}),
        ({"nope": {"model": None}}, {"roles.nope": NO_ROLE}),
        ({"nope": {}}, {"roles.nope": NO_ROLE}),
        ({"nope": None}, {"roles.nope": NO_ROLE}),
        ({"new": {"kind": None}}, {"roles.new": "there is no role 'new'"}),
        ({"Big": {"kind": "embed"}}, {"roles.Big": "'Big' as a role; expected text that matches"}),
        ({"embedding": {"kind": "generate"}}, {"roles.embedding.kind": "the role 'embedding' does embed"}),
        ({"output": {"colour": 1}}, {"roles.output.colour": "unknown key; allowed: model,"}),
        ({"output": {"think": "x"}}, {"roles.output.think": "'x'; expected true or false"}),
        (
            {"output": {"target": "gpu7"}},
            {"roles.output.target": "'gpu7' is no instance"},
        ),
        ({"output": {"policy": "cpu_only"}}, {"roles.output.target": "'gpu0' does not run on the CPU only"}),
        ({"output": {"fallbacks": ["new"]}, "new": None}, {"roles.output.fallbacks": "'new' is no role"}),
        ({"own": {"model": "other"}}, {"roles.embedding.fallbacks": "'own' embeds with another model"}),
        (
            {"output": {"model": "a b", "policy": "gpu", "body.defaults": {"model": 1}}},
            {
                "roles.output.model": "'a b'; expected the name of a model",
                "roles.output.policy": "'gpu'; expected 'auto'",
                "roles.output.body.defaults.model": "which model answers is decided by the role",
            },
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_field(
    written: Written, change: Any, expected: dict[str, str]
) -> None:
    _, problems = changed(written, {"roles.new.kind": "generate"}, change)
    assert [key for key, _ in problems] == list(expected)
    for key, text in problems:
        assert text.startswith(expected[key])


def test_a_role_that_others_fall_back_to_cannot_be_removed_alone(written: Written) -> None:
    saved = {"roles.new.kind": "generate", "roles.output.fallbacks": ["new"]}
    _, problems = changed(written, saved, {"new": None})
    assert [key for key, _ in problems] == ["roles.output.fallbacks"]
    assert changed(written, saved, {"new": None, "output": {"fallbacks": None}}) == ({}, [])


def test_models_of_embeddings_change_together(written: Written) -> None:
    both = {"own": {"model": "other"}, "embedding": {"model": "other:latest"}}
    assert changed(written, {}, both)[1] == []


def test_an_ignored_override_hinders_no_change_and_is_kept(written: Written) -> None:
    saved = {"roles.control.target": "gone", "roles.gone.model": "x"}
    after, problems = changed(written, saved, {"output": {"model": "y"}}, ignored=set(saved))
    assert problems == []
    assert after == saved | {"roles.output.model": "y"}
    assert changed(written, saved, {"control": {"target": None}, "gone": None}, ignored=set(saved)) == (
        {},
        [],
    )
    _, problems = changed(written, saved, {"control": {"target": "gone"}}, ignored=set(saved))
    assert [key for key, _ in problems] == ["roles.control.target"], "said again, it must fit"


def test_policies_are_compared_with_the_target_in_force(written: Written) -> None:
    after, problems = changed(written, {}, {"output": {"policy": "cpu_only", "target": "cpu"}})
    assert problems == []
    role = over(written, after).roles["output"]
    assert (role.policy, role.target) == (Policy.CPU_ONLY, "cpu")
