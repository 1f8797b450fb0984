"""Texts that name things: bounded, and in Ollama's words where clients match on them."""

from __future__ import annotations

import pytest

from manager.domain.wording import MOST_NAMES, digests_text, listed, model_not_found


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "none"),
        (["a"], "a"),
        (("a", "b", "c"), "a, b, c"),
        (["a", "b", "c", "d"], "a, b, c and 1 more"),
        ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "a, b, c and 2 more"),
    ],
)
def test_names_beyond_the_bound_are_counted(names: list[str], text: str) -> None:
    assert listed(names, 3) == text


def test_no_more_than_ten_are_named() -> None:
    assert MOST_NAMES == 10
    assert listed([str(number) for number in range(1000)]).endswith("8, 9 and 990 more")


def test_a_missing_model_is_told_as_ollama_tells_it() -> None:
    assert model_not_found("nope") == "model 'nope' not found"
    assert model_not_found("nope", embeds=True) == 'model "nope" not found, try pulling it first'


def test_a_model_that_differs_is_told_with_its_digests_as_ollama_list_shows_them() -> None:
    digests = {"365c0bd3c000" + "e" * 52: ("cpu", "nas"), "short": ("gpu0",)}
    assert digests_text("tiny:latest", digests) == "tiny:latest (365c0bd3c000 on cpu, nas; short on gpu0)"
