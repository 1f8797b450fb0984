"""The file of a learned classifier: one that is no better than the words is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from manager.errors import ConfigurationError
from manager.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

GOOD: dict[str, Any] = {
    "embedding_model": "minilm",
    "tasks": ["chat", "summary"],
    "weights": [[1, 0], [0, 1]],
    "bias": [0, 0],
    "accuracy": 0.9,
    "rules_accuracy": 0.5,
    "rows": 300,
}


def load(tmp_path: Path, content: str | None) -> Any:
    if content is not None:
        (tmp_path / "classifier.json").write_text(content)
    file = tmp_path / "config.yaml"
    file.write_text("routing: {auto: true, learned: classifier.json}")
    return load_settings(file, environ={}).settings.routing.rules


def test_a_better_classifier_is_taken(tmp_path: Path) -> None:
    learned = load(tmp_path, json.dumps(GOOD)).learned
    assert (learned.embedding_model, learned.tasks, learned.dimensions) == ("minilm", ("chat", "summary"), 2)
    changed = {**GOOD, "embedding_model": "other"}
    assert load(tmp_path, json.dumps(changed)).learned.embedding_model == "other"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); expected what `classifier train` has written"),
        ("{", "is no JSON"),
        ("{}", "embedding_model: Field required"),
        (
            json.dumps({**GOOD, "accuracy": 0.5}),
            "has 50% on held-out requests, and the rules over words 50%",
        ),
        (json.dumps({**GOOD, "bias": [0, 0, 0]}), "tasks, weights and bias do not fit each other"),
        (json.dumps({**GOOD, "weights": [[1, 0], [0]]}), "tasks, weights and bias do not fit each other"),
        (json.dumps({**GOOD, "weights": [[1, None], [0, 1]]}), "weights.0.1"),
        (json.dumps({**GOOD, "more": 1}), "more"),
    ],
)
def test_what_is_no_better_classifier_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path, content)
    assert "routing.learned" in refused.value.message
    assert message in refused.value.message


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manager.settings.learned.MOST_BYTES", 10)
    with pytest.raises(ConfigurationError, match="expected at most 10"):
        load(tmp_path, json.dumps(GOOD))
