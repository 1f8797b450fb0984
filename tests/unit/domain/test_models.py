from __future__ import annotations

import pytest

from manager.domain.models import (
    MOST_NAME_LENGTH,
    is_possible,
    model_key,
    parameter_count,
    parameter_text,
    split_pin,
)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        "Qwen3:latest",
        " qwen3 ",
        "library/qwen3",
        "registry.ollama.ai/library/qwen3:latest",
        "https://registry.ollama.ai/library/QWEN3",
    ],
)
def test_all_spellings_of_a_model_are_one(name: str) -> None:
    assert model_key(name) == "qwen3:latest"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("qwen3:8b", "qwen3:8b"),
        ("someone/qwen3", "someone/qwen3:latest"),
        ("hf.co/someone/Model-GGUF:Q4_K_M", "hf.co/someone/model-gguf:q4_k_m"),
        ("localhost:5000/someone/qwen3", "localhost:5000/someone/qwen3:latest"),
        ("http://host/library/x:y", "host/library/x:y"),
    ],
)
def test_what_differs_stays_apart(name: str, key: str) -> None:
    assert model_key(name) == key


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("tiny", ("tiny", None)),
        ("tiny@gpu0", ("tiny", "gpu0")),
        ("me/tiny:8b@cpu", ("me/tiny:8b", "cpu")),
        ("a@b@cpu", ("a@b", "cpu")),
        ("@cpu", ("@cpu", None)),
        ("tiny@", ("tiny@", None)),
        ("tiny@GPU0", ("tiny@GPU0", None)),
        ("tiny@sha256:00", ("tiny@sha256:00", None)),
    ],
)
def test_a_pin_is_what_follows_the_last_at(name: str, split: tuple[str, str | None]) -> None:
    assert split_pin(name) == split


PART = "a" + "b-_.9" * 15 + "cdef"


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        " tiny ",
        "_",
        "9",
        "tiny:8b",
        "me/tiny",
        "me/tiny:8b",
        "host/me/tiny:8b",
        "host:5000/me/tiny:8b",
        "https://host.example:5000/me/tiny",
        "://host/me/tiny",
        "hf.co/someone/Model-GGUF:Q4_K_M",
        f"{'h' * 350}/{'n' * 80}/{PART}:{PART}",
        "tiny:cloud",
        "tiny:8b:cloud",
        "tiny:8b: Local ",
        "tiny:8b-cloud",
        "tiny:LATEST-CLOUD",
        "host:5000/me/tiny-cloud",
    ],
)
def test_a_model_can_have_such_a_name(name: str) -> None:
    assert is_possible(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        "a\nb",
        "tiny:",
        ":8b",
        "tiny:8b:9b",
        "tiny:8b:cloud:cloud",
        "tiny:-cloud",
        "/tiny",
        "me/",
        "me//tiny",
        "a/b/c/d",
        "m.e/tiny",
        "-tiny",
        ".tiny",
        "tiny:.8b",
        "ti\u00e9ny",
        "tiny@sha256:00",
        "tiny@gpu0",
        "../tiny",
        "https://me/tiny",
        "x" * 81,
        "tiny:" + "x" * 81,
        "n" * 81 + "/tiny",
        "h" * 351 + "/me/tiny",
        "s" * MOST_NAME_LENGTH + "://host/me/tiny",
        "a" * 20_000_000,
    ],
)
def test_no_model_can_have_such_a_name(name: str) -> None:
    assert not is_possible(name)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("14b", 14_000_000_000),
        ("7.5B", 7_500_000_000),
        ("137M", 137_000_000),
        ("22.7m", 22_700_000),
        ("1.2k", 1200),
        (" 1t ", 10**12),
        ("405", 405),
    ],
)
def test_a_number_of_parameters_reads_as_it_is_written(text: str, count: int) -> None:
    assert parameter_count(text) == count


@pytest.mark.parametrize("text", ["", "b", "14bb", "-1b", "1e9", "8x7b", "large"])
def test_any_other_text_is_no_number_of_parameters(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a number of parameters such as 14b, 7\.5b or 137m"):
        parameter_count(text)


@pytest.mark.parametrize("text", ["14b", "7.5b", "137m", "1.2k", "405", "1t"])
def test_a_number_of_parameters_is_shown_as_it_was_written(text: str) -> None:
    assert parameter_text(parameter_count(text)) == text
