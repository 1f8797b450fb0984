"""The key of a request: its limits go into the decision, and its place is given back exactly once."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.domain.keys import Permit
from manager.domain.target import Target
from manager.errors import Reason
from manager.services.accounts.quotas import Quotas
from manager.services.routing.attempting import Trouble
from tests.support.attempts import FACTS, Stage, attempt
from tests.support.keys import grant

if TYPE_CHECKING:
    from manager.domain.keys import Grant
    from manager.domain.record import Outcome
    from manager.domain.routing import Decision, RequestFacts
    from manager.services.routing.attempting import Attempting

PERMIT = Permit("ci", instances=frozenset({"a"}))


class Keyed(Stage):
    """Keeps what was decided about."""

    def __init__(self) -> None:
        super().__init__(attempt("a"))
        self.quotas = Quotas(now=self.clock, utcnow=lambda: datetime(2026, 3, 1, tzinfo=UTC))
        self.routing = dataclasses.replace(self.routing, quotas=self.quotas)
        self.asked: list[RequestFacts] = []
        written = self.router.decision

        def decide(facts: RequestFacts) -> Decision:
            self.asked.append(facts)
            return written

        cast("Any", self.router).decide = decide

    def with_key(self, of: Grant | None, **values: Any) -> Attempting:
        one = self.request(input_tokens=None, output_tokens=None, **values)
        one.grant = of
        return one


def key(**limits: Any) -> Grant:
    return dataclasses.replace(grant("ci"), **limits)


@pytest.mark.parametrize(
    ("of", "facts"),
    [
        (None, FACTS),
        (key(), FACTS),
        (key(permit=PERMIT), FACTS._replace(permit=PERMIT)),
        (key(is_local=True), FACTS._replace(local_only=True)),
        (key(permit=PERMIT, is_local=True), FACTS._replace(permit=PERMIT, local_only=True)),
    ],
)
def test_the_limits_of_a_key_go_into_the_decision(of: Grant | None, facts: RequestFacts) -> None:
    stage = Keyed()
    assert isinstance(stage.with_key(of).enter(FACTS), Target)
    assert stage.asked == [facts]


def test_a_key_does_not_lift_what_the_request_forbids() -> None:
    stage = Keyed()
    stage.with_key(key(permit=PERMIT)).enter(FACTS._replace(local_only=True))
    assert stage.asked == [FACTS._replace(permit=PERMIT, local_only=True)]


def test_a_request_beyond_a_quota_is_refused_before_anything_is_decided() -> None:
    stage = Keyed()
    first, second = (stage.with_key(key(concurrency=1)) for _ in range(2))
    first.enter(FACTS)
    message = "the key 'ci' is at its concurrency of 1 (rate_limited)"
    assert second.enter(FACTS) == Trouble(Reason.POLICY, message, 1.0, refused="rate_limited")
    assert len(stage.asked) == 1
    second.close("refused")
    assert stage.quotas.in_flight("ci") == 1
    assert second.record.fallback_reason is Reason.POLICY


@pytest.mark.parametrize("outcome", ["ok", "client_gone", "cut", "refused", "timeout", "upstream_error"])
def test_the_place_and_the_tokens_are_counted_once_however_a_request_ends(outcome: Outcome) -> None:
    stage = Keyed()
    limited = key(concurrency=1, tokens_per_day=10)
    one = stage.with_key(limited)
    one.enter(FACTS)
    one.sent()
    one.record.input_tokens, one.record.output_tokens = 3, 4
    one.close(outcome)
    one.close(outcome)
    assert stage.quotas.in_flight("ci") == 0
    again = stage.with_key(limited)
    assert isinstance(again.enter(FACTS), Target)
    again.record.input_tokens = 3
    again.close("ok")
    spent = stage.with_key(limited).enter(FACTS)
    assert isinstance(spent, Trouble)
    assert spent.message.startswith("the key 'ci' has used 10 tokens today")


def test_a_request_that_ends_before_it_was_decided_holds_nothing() -> None:
    stage = Keyed()
    stage.with_key(key(concurrency=1)).close("client_gone")
    assert stage.quotas.in_flight("ci") == 0


def test_without_quotas_a_key_is_only_a_permit() -> None:
    stage = Keyed()
    stage.routing = dataclasses.replace(stage.routing, quotas=None)
    for _ in range(3):
        assert isinstance(stage.with_key(key(concurrency=1, permit=PERMIT)).enter(FACTS), Target)
