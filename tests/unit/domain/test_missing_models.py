"""Roles whose model no instance has."""

from __future__ import annotations

import pytest

from manager.domain.roles import RequestKind, Role, RoutingSettings
from manager.domain.routing import Candidate, Snapshot, State, missing_models


def candidate(name: str, *models: str, is_read: bool = True) -> Candidate:
    keys = {f"{model}:latest": model for model in models}
    return Candidate(name, None, State.STARTABLE, models=keys if is_read else None)


def found(*candidates: Candidate, auto_pull: bool = False) -> list[tuple[str, str]]:
    roles = {
        name: Role(name, RequestKind.GENERATE, model)
        for name, model in (("a", "Tiny"), ("b", "other"), ("c", None))
    }
    return list(missing_models(RoutingSettings(roles, auto_pull=auto_pull), Snapshot(candidates)))


def test_a_role_without_a_model_and_one_whose_model_is_there_are_in_order() -> None:
    assert found(candidate("cpu", "tiny"), candidate("nas", "other")) == []


@pytest.mark.parametrize(
    ("candidates", "auto_pull", "why"),
    [
        ([candidate("cpu", "tiny")], False, "requests for the role get 404 until it is pulled"),
        (
            [candidate("cpu", "tiny"), candidate("nas", is_read=False)],
            False,
            "the models of nas are not known",
        ),
        ([candidate("cpu", "tiny"), candidate("nas", is_read=False)], True, "the first request pulls it"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_what_follows(
    candidates: list[Candidate], why: str, *, auto_pull: bool
) -> None:
    ((role, message),) = found(*candidates, auto_pull=auto_pull)
    assert role == "b"
    assert message.startswith(f"no instance is known to have the model 'other': {why}")
