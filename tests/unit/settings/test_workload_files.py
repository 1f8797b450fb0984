"""Workloads of benchmarks: the shipped ones, and files of the operator's own."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from manager.domain.benchmarks import Check, CheckKind, Prompt, Workload, quality
from manager.errors import ConfigurationError
from manager.settings import load_settings
from manager.settings.workload_files import MOST_FILES, SHIPPED_WORKLOADS, read_workloads

ROOT = Path(__file__).resolve().parents[3]
ONE = "name: {name}\nprompts: [{{name: a, text: b, checks: [{{contains: c}}]}}]\n"
EVERY_KIND = """
name: all
description: of everything
temperature: 0.5
max_tokens: 12
prompts:
  - name: first
    system: Be brief.
    text: Say it.
    checks:
      - contains: it
      - any_of: [a, b]
      - equals: it
      - regex: '^it$'
      - max_words: 3
      - json: true
      - json: [a, b]
"""


def own(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    return file


def load(tmp_path: Path, workloads: object) -> object:
    config = tmp_path / "config.yaml"
    config.write_text(f"routing: {{workloads: {workloads}}}\n")
    return load_settings(config, environ={}).settings.routing.benchmark_workloads


def test_two_workloads_are_shipped_with_checks_for_each_prompt() -> None:
    found = read_workloads(None)
    assert list(found) == ["chat.concise_support", "chat.short_reasoning"]
    for name, workload in found.items():
        assert (workload.name, workload.temperature) == (name, 0)
        assert workload.description
        assert len(workload.prompts) >= 4
        assert all(prompt.checks for prompt in workload.prompts)


@pytest.mark.parametrize(
    ("workload", "prompt", "right", "wrong"),
    [
        ("chat.short_reasoning", "apples", "7", "8 apples are left after she has eaten one"),
        ("chat.short_reasoning", "order", "Max", "Tom, who is taller than all of the others"),
        ("chat.short_reasoning", "weekday", "Saturday.", "It is on a Sunday, I think"),
        (
            "chat.short_reasoning",
            "syllogism",
            "No.",
            "Yes, since some of the roses are among those flowers that fade quickly",
        ),
        ("chat.short_reasoning", "json", '{"sum": 13, "product": 42}', "The sum is 12"),
        ("chat.concise_support", "returns", "Yes, within 30 days; the return is free.", "never " * 61),
        ("chat.concise_support", "hours", "We are closed on Sunday.", "Sure, come by at noon. " * 9),
        ("chat.concise_support", "unknown", "I do not know which service that is.", "With a big van. " * 12),
        ("chat.concise_support", "password", "Reset your password on the page to sign in.", "Wait. " * 81),
    ],
)
def test_a_right_answer_passes_all_shipped_checks_and_a_wrong_one_none(
    workload: str, prompt: str, right: str, wrong: str
) -> None:
    (checks,) = (one.checks for one in read_workloads(None)[workload].prompts if one.name == prompt)
    assert quality(checks, right) == 1.0
    assert quality(checks, wrong) == 0.0


def test_the_shipped_files_are_in_the_wheel() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["packages"] == [SHIPPED_WORKLOADS.relative_to(ROOT).parts[0]]
    assert {one.name for one in SHIPPED_WORKLOADS.iterdir()} == {
        "chat.concise_support.yaml",
        "chat.short_reasoning.yaml",
    }


def test_a_file_has_one_workload_with_checks_of_every_kind(tmp_path: Path) -> None:
    kinds = (
        Check(CheckKind.CONTAINS, "it"),
        Check(CheckKind.ANY_OF, ("a", "b")),
        Check(CheckKind.EQUALS, "it"),
        Check(CheckKind.REGEX, "^it$"),
        Check(CheckKind.MAX_WORDS, 3),
        Check(CheckKind.JSON, True),
        Check(CheckKind.JSON, ("a", "b")),
    )
    expected = Workload("all", (Prompt("first", "Say it.", kinds, "Be brief."),), "of everything", 0.5, 12)
    found = read_workloads(own(tmp_path, EVERY_KIND))
    assert found["all"] == expected
    assert {check.kind for check in kinds} == set(CheckKind)


def test_a_directory_has_a_file_for_each_and_replaces_shipped_ones(tmp_path: Path) -> None:
    for file, name in (
        ("a.yaml", "mine"),
        ("b.yml", "chat.short_reasoning"),
        ("c.txt", "no"),
        (".d.yaml", "no"),
    ):
        (tmp_path / file).write_text(ONE.format(name=name))
    found = read_workloads(tmp_path)
    assert list(found) == ["chat.concise_support", "chat.short_reasoning", "mine"]
    assert len(found["chat.short_reasoning"].prompts) == 1


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    file = own(tmp_path, ONE.format(name="first"))
    assert "first" in read_workloads(file)
    file.write_text(ONE.format(name="other-name"))
    assert "other-name" in read_workloads(file)


def test_the_configuration_names_them(tmp_path: Path) -> None:
    own(tmp_path, ONE.format(name="mine"))
    assert "mine" in load(tmp_path, tmp_path / "own.yaml")  # type: ignore[operator]
    (tmp_path / "config.yaml").write_text("")
    found = load_settings(tmp_path / "config.yaml", environ={}).settings.routing.benchmark_workloads
    assert len(found) == 2


TWICE = "{name: a, text: b, checks: [{json: true}]}"
PROMPT = "name: x\nprompts:\n  - name: a\n    text: hi\n    checks:\n"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", ["own.yaml:1: name: missing", "own.yaml:1: prompts: missing"]),
        ("a: [", ["own.yaml:1: not YAML"]),
        ("- a\n", ["own.yaml:1: expected a mapping"]),
        ("name: A B\nprompts: []\n", ["own.yaml:1: name: 'A B'", "own.yaml:2: prompts: "]),
        (
            f"{PROMPT}      - contain: x\n",
            ["own.yaml:6: prompts.0.checks.0.contain: unknown key; did you mean"],
        ),
        (
            f"{PROMPT}      - {{}}\n",
            ["own.yaml:6: prompts.0.checks.0: ", "expected exactly one of contains, any_of"],
        ),
        (f"{PROMPT}      - {{contains: x, equals: y}}\n", ["own.yaml:6: prompts.0.checks.0: "]),
        (f"{PROMPT}      - json: false\n", ["own.yaml:6: prompts.0.checks.0: ", "exactly one"]),
        (
            f"{PROMPT}      - contains: x\n      - regex: '('\n",
            ["own.yaml:7: prompts.0.checks.1.regex: '('; expected"],
        ),
        (
            f"{PROMPT}      - max_words: 0\n",
            ["own.yaml:6: prompts.0.checks.0.max_words: 0; expected 1 or more"],
        ),
        (f"{PROMPT}      - equals: 42\n", ["own.yaml:6: prompts.0.checks.0.equals: 42; expected text"]),
        (f"{PROMPT}      - any_of: []\n", ["own.yaml:6: prompts.0.checks.0.any_of: "]),
        (
            f"{PROMPT}      - contains: x\ntemperature: 3\n",
            ["own.yaml:7: temperature: 3; expected 2 or less"],
        ),
        (
            f"{PROMPT}      - contains: x\nmax_tokens: 0.5\n",
            ["own.yaml:7: max_tokens: 0.5; expected a whole"],
        ),
        (
            f"name: x\nprompts: [{TWICE}, {TWICE}]\n",
            ["own.yaml:1: ", "the prompt 'a' is there twice"],
        ),
    ],
)
def test_a_bad_file_is_refused_with_file_line_and_field(
    tmp_path: Path, text: str, messages: list[str]
) -> None:
    file = own(tmp_path, text)
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path, file)
    assert "routing.workloads" in refused.value.message
    assert all(message in refused.value.message for message in messages), refused.value.message


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent' cannot be read \(No such file or directory\)"):
        load(tmp_path, tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigurationError, match=r"has no file \*\.yaml"):
        load(tmp_path, empty)
    for name in ("a", "b"):
        (empty / f"{name}.yaml").write_text(ONE.format(name="same"))
    with pytest.raises(ConfigurationError, match=r"b\.yaml:1: name: 'same' is the name of .*a\.yaml, too"):
        load(tmp_path, empty)
    for number in range(MOST_FILES + 1):
        (empty / f"n{number}.yaml").write_text("")
    with pytest.raises(ConfigurationError, match="at most 100 are read"):
        load(tmp_path, empty)
