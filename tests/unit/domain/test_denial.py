"""Which models an instance is not to run."""

from __future__ import annotations

import pytest

from manager.domain.denial import Denials, DenyRules
from manager.domain.models import model_key, parameter_count, parameter_text

BIG = DenyRules(("*:32b", "*:70b"))


@pytest.mark.parametrize("name", ["qwen3:32b", "QWEN3:32B", "me/llama:70b", "library/qwen3:32b"])
def test_a_glob_over_the_key_denies_a_model_in_any_spelling(name: str) -> None:
    assert BIG.rule(model_key(name), {}) == f"deny_models *:{name[-3:].lower()}"


@pytest.mark.parametrize("name", ["qwen3:8b", "qwen3", "qwen3:32b-q4_K_M", "32b"])
def test_a_model_that_no_glob_matches_is_admitted(name: str) -> None:
    assert BIG.rule(model_key(name), {}) == ""


def test_a_glob_is_case_folded_and_named_as_it_was_written() -> None:
    assert DenyRules((" DeepSeek-* ", "x")).rule("deepseek-r1:8b", {}) == "deny_models  DeepSeek-* "


def test_a_pattern_without_a_wildcard_is_a_name_with_the_default_tag() -> None:
    rules = DenyRules(("library/llama3",))
    assert rules.rule("llama3:latest", {})
    assert not rules.rule("llama3:8b", {})


@pytest.mark.parametrize(
    ("most", "size", "denied"),
    [
        (14 * 10**9, "14.8B", False),
        (14 * 10**9, "14.99B", False),
        (14 * 10**9, "15B", True),
        (14 * 10**9, "32.8B", True),
        (1_500_000_000, "1.54B", False),
        (1_500_000_000, "1.6B", True),
        (500_000_000, "494.03M", False),
        (500_000_000, "501M", True),
        (30, "30", False),
        (30, "31", True),
    ],
)
def test_a_size_is_compared_at_the_precision_of_the_setting(most: int, size: str, denied: bool) -> None:
    rule = DenyRules(max_parameters=most).rule("a:latest", {"a:latest": parameter_count(size)})
    assert rule == (f"max_parameters {parameter_text(most)}" if denied else "")


def test_a_model_of_unknown_size_is_admitted_until_it_is_known() -> None:
    rules = DenyRules(max_parameters=10**9)
    assert rules.rule("a:latest", {}) == ""
    assert Denials(rules, {"a:latest": 2 * 10**9}).rule("a:latest") == "max_parameters 1b"


def test_no_rules_deny_nothing() -> None:
    assert not DenyRules()
    assert DenyRules().rule("a:70b", {"a:70b": 7 * 10**10}) == ""
    assert DenyRules(("*",))
    assert DenyRules(max_parameters=1)
