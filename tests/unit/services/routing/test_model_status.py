"""What requests under way do with a model, and which models failed last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.errors import Reason
from manager.services.routing import model_status
from manager.services.routing.model_status import ModelStatus, Work
from tests.support.attempts import Fleet

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(eq=False)
class Worker:
    work: Work
    lane: str | None = None
    holds: str = ""

    def hold_slot(self) -> None:
        pass


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def status(fleet: Fleet) -> ModelStatus:
    return ModelStatus(cast("Any", fleet))


def working(status: ModelStatus, instance: str, model: str = "tiny", *, loads: bool) -> Worker:
    worker = Worker(Work(instance, model, loads))
    status.sent(worker)
    return worker


def test_a_model_that_was_in_memory_is_in_use(status: ModelStatus) -> None:
    working(status, "a", loads=False)
    assert status.at_work() == {"tiny:latest": "in_use"}


def test_a_model_is_loading_until_its_own_instance_has_it_in_memory(
    status: ModelStatus, fleet: Fleet
) -> None:
    working(status, "a", "Tiny", loads=True)
    fleet.loaded = {"b": ("tiny:latest",), "a": ("other",)}
    assert status.at_work() == {"tiny:latest": "loading"}
    fleet.loaded["a"] = ("other", "TINY")
    assert status.at_work() == {"tiny:latest": "in_use"}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_model_that_one_instance_uses_is_in_use_whatever_another_loads(
    status: ModelStatus, order: tuple[str, str]
) -> None:
    for instance in order:
        working(status, instance, loads=instance == "a")
    assert status.at_work() == {"tiny:latest": "in_use"}


def test_a_request_that_has_ended_does_nothing_with_its_model(status: ModelStatus) -> None:
    one, other = working(status, "a", loads=False), working(status, "a", loads=False)
    status.ended(one)
    assert status.at_work() == {"tiny:latest": "in_use"}
    status.ended(other)
    status.ended(other)
    assert status.at_work() == {}


@pytest.mark.parametrize("reason", [*Reason])
def test_only_failures_of_a_server_with_a_model_are_the_models(status: ModelStatus, reason: Reason) -> None:
    status.failed("Tiny", reason)
    of_model = reason in (Reason.UPSTREAM_ERROR, Reason.MODEL_LOAD_FAILED, Reason.ATTEMPT_TIMEOUT)
    assert status.idle_status("tiny:latest") == ("error" if of_model else "not_loaded")


def test_a_model_that_answers_again_is_whole_again_and_no_other(status: ModelStatus) -> None:
    status.answered("tiny")
    for model in ("tiny", "other"):
        status.failed(model, Reason.UPSTREAM_ERROR)
    status.answered("tiny:latest")
    assert status.idle_status("tiny:latest") == "not_loaded"
    assert status.idle_status("other:latest") == "error"


def test_what_is_remembered_of_failures_is_bounded(
    status: ModelStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_status, "_MAX_BROKEN", 3)
    for number in range(5):
        status.failed(f"model{number}", Reason.UPSTREAM_ERROR)
    shown: Callable[[int], str] = lambda number: status.idle_status(f"model{number}:latest")  # noqa: E731
    assert [shown(number) for number in range(5)] == ["error"] * 3 + ["not_loaded"] * 2
    status.answered("model0")
    status.failed("model4", Reason.UPSTREAM_ERROR)
    assert shown(4) == "error"


def test_a_mere_load_is_loading_until_its_end_unless_the_model_is_used_elsewhere(
    status: ModelStatus, fleet: Fleet
) -> None:
    with status.load("Tiny", "a"), status.load("tiny:latest", "a"):
        fleet.loaded = {"a": ("tiny",)}  # servers report a model from the begin of its load on
        assert status.at_work() == {"tiny:latest": "loading"}
        worker = working(status, "b", loads=False)
        assert status.at_work() == {"tiny:latest": "in_use"}
        status.ended(worker)
    assert status.at_work() == {}


def test_what_is_being_loaded_is_told_by_instance(status: ModelStatus, fleet: Fleet) -> None:
    fleet.loaded = {"a": ("here",)}
    working(status, "a", "Tiny", loads=True)
    working(status, "a", "here", loads=True)
    working(status, "b", "used", loads=False)
    with status.load("Big", "a"), status.load("big:latest", "a"), status.load("small", "c"):
        assert status.loading() == {"a": ("big:latest", "tiny:latest"), "c": ("small:latest",)}
    assert status.loading() == {"a": ("tiny:latest",)}


def test_the_last_failure_is_told_until_the_model_answers(status: ModelStatus) -> None:
    assert (status.failure("tiny:latest"), status.version) == (None, 0)
    status.failed("tiny", Reason.UPSTREAM_ERROR, "no" * 1000)
    failure = status.failure("tiny:latest")
    assert failure is not None
    assert (failure.reason, len(failure.message)) == (Reason.UPSTREAM_ERROR, 1000)
    status.load_failed("Tiny", Reason.VRAM_INSUFFICIENT, "lacks 2 GiB")  # whatever the reason
    assert status.failure("tiny:latest") == (Reason.VRAM_INSUFFICIENT, "lacks 2 GiB")
    assert status.idle_status("tiny:latest") == "error"
    status.answered("tiny")
    status.answered("tiny")
    assert (status.failure("tiny:latest"), status.version) == (None, 3)


def test_the_instances_that_load_a_model_are_told(status: ModelStatus, fleet: Fleet) -> None:
    fleet.loaded = {"a": ("tiny",)}
    working(status, "a", loads=True)  # it is there by now
    working(status, "b", loads=True)
    with status.load("tiny", "a"), status.load("other", "b"):
        assert status.loading_on() == {"tiny:latest": ("a", "b"), "other:latest": ("b",)}
    assert status.loading_on() == {"tiny:latest": ("b",)}
