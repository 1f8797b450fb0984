"""A list of models with their tasks is read as roles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from manager.errors import ConfigurationError
from manager.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from manager.settings.load import LoadedSettings

LISTED = """
models:
  - name: mermaid-mistral
    task_types: [mermaid, diagram]
    quantization: q4_K_M
    size_gb: 4.5
  - {name: "llama3:8b-instruct-q4_K_M", task_types: [jira], size_gb: 4.7}
roles:
  diagram: {policy: cpu_only}
  jira: {model: own}
"""


def load(tmp_path: Path, text: str) -> LoadedSettings:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_settings(file, environ={})


def test_each_task_is_a_role_with_that_model(tmp_path: Path) -> None:
    loaded = load(tmp_path, LISTED)
    roles = loaded.settings.roles
    assert (roles["mermaid"].model, roles["diagram"].model) == ("mermaid-mistral", "mermaid-mistral")
    assert roles["diagram"].policy == "cpu_only"
    assert roles["jira"].model == "own"  # what the file says of a role wins
    assert loaded.source_of("roles.mermaid.model").endswith("config.yaml:4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [x]", "models.0: 'x'; expected a mapping with name, task_types"),
        ("models: [{task_types: [a]}]", "models.0.name: None; expected the name of a model"),
        ("models: [{name: m, task_types: a}]", "models.0.task_types: 'a'; expected a list of tasks"),
        ("models: [{name: m, task_types: [A]}]", "models.0.task_types.0: 'A'; expected the name of a role"),
        ("models: [{name: m, task_types: [5]}]", "models.0.task_types.0: 5; expected the name of a role"),
        ("models: [{name: m, colour: red}]", "models.0.colour: unknown key"),
        ("models: [{name: m, size_gb: -1}]", "models.0.size_gb: -1; expected a number of gigabytes"),
        ("models: [{name: m, size_gb: true}]", "models.0.size_gb: True; expected a number of gigabytes"),
        ("models: [{name: m, quantization: 4}]", "models.0.quantization: expected text such as q4_K_M"),
        (
            "models: [{name: m, task_types: [a]}, {name: n, task_types: [a]}]",
            "models.1.task_types.0: 'a' is a task of m already; expected one model",
        ),
        ("models: [{name: m, task_types: [a]}]\nroles: 5", "roles: 5; expected a mapping"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path, text)
    assert "config.yaml:" in refused.value.message
    assert message in refused.value.message


def test_a_role_that_is_no_mapping_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"roles\.a: 5; expected a mapping"):
        load(tmp_path, "models: [{name: m, task_types: [a]}]\nroles: {a: 5}")
