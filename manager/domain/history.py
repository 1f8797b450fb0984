"""The stored form of one request that has ended: its record, and the decision behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from manager.domain.models import model_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from manager.domain.record import Outcome, RequestRecord
    from manager.domain.routing import Attempt, Decision, PassedOver
    from manager.errors import Reason

# Longer texts are cut: a client chooses the length of its model, a server that of its error.
MOST_CHARACTERS = 1024
_CUT = "…"
# So many attempts and passed-over candidates are named; the numbers of the others are stored.
MOST_ATTEMPTS = 16
MOST_PASSED_OVER = 64


class Failure(NamedTuple):
    """An attempt that brought no answer, and why."""

    attempt: Attempt
    reason: Reason
    message: str


class Made(Protocol):
    """The attempts of one request. `decision` is None for those that no decision was made for."""

    @property
    def decision(self) -> Decision | None: ...
    @property
    def made(self) -> Sequence[Attempt]:
        """Every attempt that was begun, in order."""


class Ended(NamedTuple):
    """A request that has ended, by reference: nothing is copied while it is under way.

    `attempts` is None where the request ended before a decision. `message` is the error that the client got,
    empty without one. `full` are instances that it did not go to because their slots were taken.
    """

    record: RequestRecord
    attempts: Made | None
    failures: Sequence[Failure]
    message: str
    full: Sequence[PassedOver] = ()


class Filters(NamedTuple):
    """The requests that are wanted; None wants all. `since` is a time of ending."""

    since: datetime | None = None
    project: str | None = None
    role: str | None = None
    model: str | None = None
    instance: str | None = None
    outcome: Outcome | None = None
    key: str | None = None

    def match(self, record: RequestRecord) -> bool:
        """Return whether a request that is still open is wanted. It has no outcome yet."""
        return (
            self.outcome is None
            and self.project in (None, record.project_id)
            and self.role in (None, record.role)
            and self.instance in (None, record.effective_target)
            and self.key in (None, record.key)
            and (
                self.model is None
                or (record.model is not None and self.wanted_model == model_key(record.model))
            )
        )

    @property
    def wanted_model(self) -> str | None:
        """The key of the wanted model: `tiny` and `tiny:latest` are one."""
        return None if self.model is None else model_key(self.model)


def bounded(text: str) -> str:
    """Return a text that is cut at `MOST_CHARACTERS`."""
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + _CUT


def record_values(record: RequestRecord) -> dict[str, Any]:
    """Return the fields of a record that were set; `complete` adds the others."""
    values = {
        name: bounded(value) if isinstance(value, str) else value for name, value in record.__dict__.items()
    }
    if record.failed_attempts:
        values["failed_attempts"] = [attempt._asdict() for attempt in record.failed_attempts]
    return values


def decision_values(ended: Ended, *, is_open: bool = False) -> dict[str, Any]:
    """Return the decision behind a request, as JSON can say it.

    An attempt has the outcome `failed` with a reason and a message, or else the outcome of the request, which
    is None while the request is open.
    """
    made = ended.attempts.made if ended.attempts is not None else ()
    decision = ended.attempts.decision if ended.attempts is not None else None
    failed = {_place(failure.attempt): failure for failure in ended.failures}
    outcome = None if is_open else ended.record.outcome
    return {
        **_decided(decision, ended.full),
        "attempts": [_attempt(one, failed.get(_place(one)), outcome) for one in made[:MOST_ATTEMPTS]],
        "more_attempts": max(0, len(made) - MOST_ATTEMPTS),
        "message": bounded(ended.message),
    }


def _place(attempt: Attempt) -> tuple[str, str, bool]:
    """Return what tells the attempts of one request apart; the rest may change while one is made."""
    return attempt.instance, attempt.model, attempt.because == "pull"


def _decided(decision: Decision | None, full: Sequence[PassedOver]) -> Mapping[str, Any]:
    if decision is None:
        return {"asked": None, "passed_over": [], "more_passed_over": 0, "refused": None}
    asked, refused = decision.request, decision.refused
    passed_over = (*full, *decision.passed_over)
    return {
        "asked": {
            "model": bounded(asked.model),
            "kind": asked.kind,
            "instance": asked.instance,
            "lane": asked.lane,
        },
        "passed_over": [
            {
                "instance": one.instance,
                "model": bounded(one.model),
                "reason": one.reason,
                "detail": bounded(one.detail),
            }
            for one in passed_over[:MOST_PASSED_OVER]
        ],
        "more_passed_over": max(0, len(passed_over) - MOST_PASSED_OVER),
        "refused": refused
        and {"what": refused.what, "reason": refused.reason, "message": bounded(refused.message)},
    }


def _attempt(attempt: Attempt, failure: Failure | None, outcome: Outcome | None) -> dict[str, Any]:
    return {
        "instance": attempt.instance,
        "model": bounded(attempt.model),
        "role": attempt.role,
        "because": attempt.because,
        "fallback": attempt.fallback,
        "outcome": outcome if failure is None else "failed",
        "reason": failure and failure.reason,
        "message": bounded(failure.message) if failure else "",
    }
