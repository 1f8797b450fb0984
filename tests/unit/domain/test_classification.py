"""The kind of task that a request is about, by its words."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.classification import (
    READ_EACH_END,
    Classification,
    Lexicon,
    Task,
    Tier,
    classify,
)
from manager.settings.auto import SHIPPED, read_words

LEXICON = Lexicon(
    (
        Task("sentiment", Tier.FAST, ("mood", "how does it feel")),
        Task("summary", Tier.MEDIUM, ("summar*", "fasse* zusammen", "kürze")),
        Task("strategy", Tier.COMPLEX, ("strateg*", "art")),
    ),
    more=("in detail", "step by step", "begründe*"),
    less=("kurz", "ja/nein"),
)
MIDDLE = "this text has more than fifty characters, and no word of any list"


def of(text: str, **options: float) -> tuple[str, Tier, float]:
    found = classify(text, LEXICON, **options)  # type: ignore[arg-type]
    return found.task_type, found.tier, found.confidence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", ("chat", Tier.FAST, 0.5)),
        ("", ("chat", Tier.FAST, 0.5)),
        (MIDDLE, ("chat", Tier.MEDIUM, 0.4)),
        (MIDDLE * 9, ("chat", Tier.COMPLEX, 0.6)),
        ("the MOOD?", ("sentiment", Tier.FAST, 0.8)),
        ("Summarise it", ("summary", Tier.MEDIUM, 0.8)),
        ("Fassen Sie zusammen", ("chat", Tier.FAST, 0.5)),
        ("Fasse zusammen: …", ("summary", Tier.MEDIUM, 0.8)),
        ("ku\u0308rze das", ("summary", Tier.MEDIUM, 0.8)),  # a composed and a decomposed umlaut
        ("kuerze das", ("summary", Tier.MEDIUM, 0.8)),
        ("KÜRZE", ("summary", Tier.MEDIUM, 0.8)),
        ("a strategy, step-by-step", ("strategy", Tier.COMPLEX, 0.8)),
        ("the mood, in detail", ("sentiment", Tier.MEDIUM, 0.8)),
        ("begründe die summary", ("summary", Tier.COMPLEX, 0.8)),
        ("a strategy, kurz", ("strategy", Tier.MEDIUM, 0.8)),
        ("a strategy: ja/nein, in detail", ("strategy", Tier.COMPLEX, 0.8)),  # they cancel each other
        ("the mood, kurz", ("sentiment", Tier.FAST, 0.8)),  # nothing is below
        # The most different words win, then the first one.
        ("mood mood mood; how does it feel; summary", ("sentiment", Tier.FAST, 0.8)),
        ("summary of the mood", ("summary", Tier.MEDIUM, 0.8)),
        ("mood of the summary", ("sentiment", Tier.FAST, 0.8)),
    ],
)
def test_the_words_of_a_request_tell_its_task(text: str, expected: tuple[str, Tier, float]) -> None:
    assert of(text) == expected


@pytest.mark.parametrize("text", ["Start", "party", "artful", "smart", "ART-", "_art_"])
def test_a_word_counts_only_where_it_stands_whole(text: str) -> None:
    is_whole = text.strip("-_").lower() == "art"
    assert (of(text)[0] == "strategy") is is_whole


def test_a_named_tier_is_sure_and_nothing_moves_it() -> None:
    found = classify("a strategy, in detail", LEXICON, forced=Tier.FAST, escalate_below=1.0)
    assert found == Classification("strategy", Tier.FAST, 1.0, "the tier was named", is_moved=True)


def test_a_doubtful_classification_moves_one_tier_up() -> None:
    assert of(MIDDLE, escalate_below=0.5)[1] is Tier.COMPLEX
    assert of(MIDDLE, escalate_below=0.4)[1] is Tier.MEDIUM
    assert of("hello", escalate_below=0.6)[1] is Tier.MEDIUM
    found = classify(MIDDLE, LEXICON, escalate_below=0.5)
    assert found.is_moved
    assert found.reasoning == "nothing in it tells the task; less sure than 0.5 moves it to complex"


def test_the_reasoning_names_the_words() -> None:
    found = classify("summary of the strategy of strategists, in detail", LEXICON)
    assert found.reasoning == "it has 'summar*'; 'in detail' moves it to complex"


@pytest.mark.parametrize("entry", ["", " - ", "a*", "ab*", "word ab*"])
def test_an_entry_without_a_word_or_with_a_short_stem_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"has no word|expected at least 3 characters"):
        Lexicon((Task("one", Tier.FAST, (entry,)),))


def test_the_middle_of_a_long_text_is_not_read_and_no_word_is_cut() -> None:
    filler = "x " * READ_EACH_END
    assert of(f"mood {filler}")[0] == "sentiment"
    assert of(f"{filler} mood")[0] == "sentiment"
    assert of(f"{filler}mood {filler}")[0] == "chat"
    # The cut goes through a word: what is left of it is no word.
    begin = "." * (READ_EACH_END - 3) + "artist"
    end = "start" + "." * (READ_EACH_END - 3)
    assert of(f"{begin} {filler} {end}")[0] == "chat"


WORDS = st.sampled_from(
    ["art", "mood", "summary", "kurz", "in", "detail", "step", "fasse", "zusammen", "Straße"]
)


@given(st.text() | st.lists(WORDS).map(" ".join), st.floats(0, 1), st.sampled_from([None, *Tier]))
def test_any_text_has_one_classification(text: str, escalate_below: float, forced: Tier | None) -> None:
    found = classify(text, LEXICON, forced=forced, escalate_below=escalate_below)
    assert found == classify(text, LEXICON, forced=forced, escalate_below=escalate_below)
    assert found.task_type in {"chat", "sentiment", "summary", "strategy"}
    assert 0 <= found.confidence <= 1
    assert found.reasoning
    if forced is not None:
        assert (found.tier, found.confidence) == (forced, 1.0)


@given(st.text("abcdefg", min_size=1), st.text("abcdefg", min_size=1))
def test_letters_around_a_word_make_another_word(before: str, after: str) -> None:
    assert of(f"{before}mood{after}")[0] == "chat"
    assert of(f"{before} mood {after}")[0] == "sentiment"


def test_eight_kilobytes_take_about_a_millisecond() -> None:
    text = "an ordinary sentence of seven different words " * 180
    assert len(text) > 8000
    best_s = min(_timed(text) for _ in range(20))
    assert best_s < 0.01  # measured 0.7 ms on a quiet machine; the bound is for a busy one


@pytest.mark.parametrize(
    "text", ["in " * 5461, "a" + "\u0301\u0316" * 8000, "in the " * 2340, "which of " * 1820]
)
def test_no_text_takes_long(text: str) -> None:
    words = read_words(SHIPPED)
    assert (
        min(_timed(text, words) for _ in range(3)) < 0.05
    )  # measured 3 ms; 60 to 330 ms before both were bounded


def test_a_phrase_is_found_by_the_rarer_one_of_its_words() -> None:
    assert of(f"{MIDDLE} in in in in detail")[1] is Tier.COMPLEX
    assert of(f"in detail {MIDDLE} in in in")[1] is Tier.COMPLEX
    assert of(f"detail {MIDDLE} in in in")[1] is Tier.MEDIUM
    assert of(f"detail detail {MIDDLE} in in so in detail in")[1] is Tier.COMPLEX


def test_accents_are_composed_wherever_they_stand() -> None:
    for before in range(240, 264):
        assert of("x" * before + " ku\u0308rze")[0] == "summary"
        assert of("\u0301" * before + " ku\u0308rze")[0] == "summary"


def _timed(text: str, words: Lexicon = LEXICON) -> float:
    began = time.perf_counter()
    classify(text, words)
    return time.perf_counter() - began
