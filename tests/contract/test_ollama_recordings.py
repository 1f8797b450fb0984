"""One suite for everything that speaks as Ollama: each recorded request gets an answer of the recorded form.

It runs against the simulated Ollama, or against the server that the environment variable OLLAMA_CONTRACT_URL
names, which must have the models `tiny` and `minilm`, nothing loaded and no way to a registry.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.compare import Answer, differences, load_recordings, replay
from tests.support.ollama import running_ollama

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDINGS = load_recordings()


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    if url := os.environ.get("OLLAMA_CONTRACT_URL"):
        yield url
        return
    with running_ollama() as ollama:
        yield ollama.url


@pytest.fixture(scope="module")
def answers(base_url: str) -> dict[str, Answer]:
    """The answers to all requests, which are sent in order: they build on each other."""
    return replay(base_url)


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording["name"])
def test_the_answer_keeps_to_the_recording(recording: dict[str, Any], answers: dict[str, Answer]) -> None:
    assert differences(recording, answers[recording["name"]]) == []


def test_all_recordings_are_there() -> None:
    assert len(RECORDINGS) == 69
    assert len({recording["name"] for recording in RECORDINGS}) == 69
