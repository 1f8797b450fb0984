from __future__ import annotations

from typing import Any

import pytest

from manager.settings.overrides import FIELDS, Sourced
from manager.web.pages.roles import GROUPS
from manager.web.settings_view import setting_view, taken_back, text_of
from manager.web.texts import read_texts

TEXTS = read_texts().roles


@pytest.mark.parametrize(
    ("key", "value", "text", "words"),
    [
        ("model", "tiny", "tiny", "tiny"),
        ("model", None, "", TEXTS.nothing.model),
        ("concurrency", None, "", "no limit"),
        ("instances", None, "", "any"),
        ("instances", ["one", "two"], "one, two", "one, two"),
        ("keep_warm", [], "", "none"),
        ("attempt_timeouts_s", [45.0, 2.5], "45, 2.5", "45, 2.5"),
        ("queue.wait_s", 60.0, "60", "60"),
        ("weight", 0, "0", "0"),
        ("paid_fallback", False, "false", "off"),
        ("think", True, "true", "on"),
        ("think", None, "", TEXTS.nothing.think),
        ("body.defaults", {}, "", "none"),
        ("body.overrides", {"a": "\N{SNOWMAN}"}, '{\n  "a": "\N{SNOWMAN}"\n}', '{"a": "\N{SNOWMAN}"}'),
    ],
)
def test_a_value_is_text_in_its_control_and_words_for_people(
    key: str, value: Any, text: str, words: str
) -> None:
    view = setting_view(("roles", "a.b"), key, Sourced(value, "file"), Sourced(value, "file"), TEXTS)
    assert (view.text, view.words, view.source, view.below) == (text, words, "file", None)


def test_an_override_says_what_counts_below_it_and_how_it_is_taken_back() -> None:
    view = setting_view(
        ("roles", "a.b"), "queue.length", Sourced(5, "override"), Sourced(100, "default"), TEXTS
    )
    assert view.below == "100 (default)"
    assert view.reset == {"roles": {"a.b": {"queue": {"length": None}}}}
    assert taken_back(("rollout", "stage")) == {"rollout": {"stage": None}}


def test_every_setting_of_a_role_has_a_control_but_its_kind() -> None:
    controls = [control.key for group in GROUPS.values() for control in group]
    assert sorted(controls) == sorted(set(FIELDS) - {"kind"})
    for key in controls:
        assert TEXTS.fields[key.replace(".", "_")].label


def test_a_tuple_is_a_list() -> None:
    assert text_of(("a", "b")) == "a, b"
