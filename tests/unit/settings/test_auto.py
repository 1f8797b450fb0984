"""The section `routing`, the file of words that is shipped, and one of the operator's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from manager.domain.classification import Tier, classify
from manager.domain.scoring import DEFAULT_WEIGHTS
from manager.errors import ConfigurationError
from manager.settings import load_settings
from manager.settings.auto import SHIPPED, read_words
from tests.support import data

REQUESTS = Path(data.__file__).with_name("task_requests.tsv") if data.__file__ else Path()


def load(tmp_path: Path, text: str) -> object:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_settings(file, environ={}).settings


def test_the_shipped_words_tell_the_tasks_of_the_contract() -> None:
    lexicon = read_words(SHIPPED)
    assert {task.name: task.tier for task in lexicon.tasks} == {
        "sentiment": Tier.FAST,
        "classification": Tier.FAST,
        "extraction": Tier.FAST,
        "summary": Tier.MEDIUM,
        "rag_query": Tier.MEDIUM,
        "trading_analysis": Tier.COMPLEX,
        "strategy": Tier.COMPLEX,
    }
    for text, tier in (
        ("Ist die Stimmung gut?", Tier.FAST),
        ("Fasse das zusammen, ausführlich und mit Risiken", Tier.COMPLEX),
        ("Fasse das kurz zusammen", Tier.FAST),
        ("Which strategy? yes/no", Tier.MEDIUM),
    ):
        assert classify(text, lexicon).tier is tier, text


def test_the_accuracy_on_requests_that_were_written_apart_from_the_words() -> None:
    """The words were made with every other request in sight; the others are held out."""
    lines = [line.split("\t") for line in REQUESTS.read_text().splitlines()]
    assert len(lines) == 300
    lexicon = read_words(SHIPPED)
    usual = {task.name: task.tier for task in lexicon.tasks}
    seen, held = (_accuracy(half, usual) for half in (lines[::2], lines[1::2]))
    print(f"seen {seen[0]:.0%}, held out {held[0]:.0%}; told wrongly, held out: {held[1]:.0%}")
    assert seen[0] >= 0.85
    assert held[0] >= 0.55
    assert held[1] <= 0.25


def test_no_role_has_the_name_that_leaves_the_choice_to_the_daemon(tmp_path: Path) -> None:
    roles = "roles: {auto: {model: a}}"
    load(tmp_path, roles)
    with pytest.raises(ConfigurationError, match=r"roles\.auto: routing\.auto gives the name 'auto' another"):
        load(tmp_path, f"{roles}\nrouting: {{auto: true}}")


def _accuracy(lines: list[list[str]], usual: dict[str, Tier]) -> tuple[float, float]:
    """The share of right tasks, and that of tasks which were told and are wrong."""
    lexicon = read_words(SHIPPED)
    found = [(label, classify(text, lexicon).task_type) for label, _, text in lines]
    right = sum(label == task for label, task in found)
    wrong = sum(label != task and task in usual for label, task in found)
    return right / len(lines), wrong / len(lines)


def test_it_is_off_unless_it_is_switched_on(tmp_path: Path) -> None:
    assert not load(tmp_path, "").routing.rules.is_on  # type: ignore[attr-defined]
    rules = load(tmp_path, "routing: {auto: true, escalate_below: 0.5}").routing.rules  # type: ignore[attr-defined]
    assert rules.escalate_below == 0.5
    assert rules.lexicon == read_words(SHIPPED)


def test_an_operators_own_words_take_the_place_of_the_shipped_ones(tmp_path: Path) -> None:
    words = tmp_path / "words.yaml"
    words.write_text("tasks: {erd: {tier: fast, words: [diagram*]}}\nless: [short]\n")
    rules = load(tmp_path, f"routing: {{auto: true, words: {words}}}").routing.rules  # type: ignore[attr-defined]
    assert classify("draw diagrams of it", rules.lexicon).task_type == "erd"
    words.write_text("tasks: {erd: {tier: fast, words: [picture]}}\n")
    assert read_words(words).tasks[0].words == ("picture",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "tasks: Field required"),
        ("tasks: {}", "at least 1 item"),
        ("tasks: {erd: {tier: quick, words: [a]}}", "words.yaml:1: tasks.erd.tier"),
        ("tasks: {erd: {tier: fast, words: []}}", "tasks.erd.words"),
        ("tasks: {erd: {tier: fast, words: ['a*']}}", "at least 3 characters before *"),
        ("tasks: {erd: {tier: fast, words: ['-']}}", "'-' has no word"),
        ("tasks: {ERD: {tier: fast, words: [a]}}", "tasks.ERD"),
        ("tasks: [", "not YAML"),
        ("more: [x]\nmore: [y]", "given twice"),
    ],
)
def test_a_file_of_words_that_is_none_is_refused_with_its_place(
    tmp_path: Path, text: str | None, message: str
) -> None:
    words = tmp_path / "words.yaml"
    if text is not None:
        words.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path, f"routing: {{words: {words}}}")
    assert "routing.words" in refused.value.message
    assert message in refused.value.message


def test_weights_are_those_of_the_configuration(tmp_path: Path) -> None:
    assert load(tmp_path, "").routing.weights.values == DEFAULT_WEIGHTS  # type: ignore[attr-defined]
    weights = load(tmp_path, "routing: {weights: {queue: 0, text: 2.5}}").routing.weights  # type: ignore[attr-defined]
    assert weights.values == DEFAULT_WEIGHTS._replace(queue=0.0, text=2.5)


@pytest.mark.parametrize(
    ("weights", "field"), [("{text: -1}", "text"), ("{queue: 101}", "queue"), ("{x: 1}", "x")]
)
def test_weights_that_cannot_be_are_refused(tmp_path: Path, weights: str, field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"routing.weights.{field}"):
        load(tmp_path, f"routing: {{weights: {weights}}}")


@pytest.mark.parametrize(
    ("facts", "field"),
    [
        ("{tier: huge}", "tier"),
        ("{context_window: 0}", "context_window"),
        ("{temperature: 3}", "temperature"),
        ("{expected_latency_ms: -1}", "expected_latency_ms"),
        ("{max_tokens: 1.5}", "max_tokens"),
        ("{colour: red}", "colour"),
    ],
)
def test_facts_that_cannot_be_are_refused(tmp_path: Path, facts: str, field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"models.facts.m.{field}"):
        load(tmp_path, f"models: {{facts: {{m: {facts}}}}}")
