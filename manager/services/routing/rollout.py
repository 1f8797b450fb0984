"""Requests that pass to the raw server as they came, and what the decision would have been for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.models import model_key, split_pin
from manager.domain.rollout import RAW, Disagreement, Stage, Stages, disagreement
from manager.domain.routing import Attempt, Refused
from manager.domain.target import Target
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.keys import Permit
    from manager.domain.record import RequestRecord
    from manager.domain.routing import Decision, Load, Ranks, RequestFacts
    from manager.services.journal import Journal

# Roles whose first disagreement made an event. Beyond that there is one event for all others together.
_MOST_ROLES = 1000
_OTHERS = "other roles"
# The answer, or the lack of one, is due to the raw server or to the request.
_JUDGED = frozenset({"ok", "client_error", "upstream_error", "timeout"})


class RawAttempts:
    """The one attempt of a request that passes to the raw server.

    Attributes:
        decision: what is recorded beside it; None where none was made.
        made: the attempt.
        would: the first attempt of the decision; None where it refuses.
    """

    more = False
    failed_on: frozenset[str] = frozenset()

    def __init__(self, model: str, decision: Decision | None = None, would: Attempt | None = None) -> None:
        self.decision = decision
        self.would = would
        self.made = (Attempt(RAW, model, None if decision is None else decision.role, "loaded"),)

    def next(self) -> None:
        """No other attempt follows."""

    def start_no_other(self) -> None:
        """It starts none."""


class Rollout:
    """Owns the stage in force, and the disagreements since the daemon began. Lives on the event loop.

    Attributes:
        stages: in force.
        raw: the raw server; None while every request is managed.
        disagreements: by reason, each from the beginning.

    Args:
        journal: takes an event for the first disagreement of each role; None: there are none.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._seen: set[str] = set()
        self.stages = Stages()
        self.raw: Target | None = None
        self.disagreements: dict[Disagreement, int] = dict.fromkeys(Disagreement, 0)

    @property
    def passes_all(self) -> bool:
        """Return whether no request is managed."""
        return self.raw is not None and self.stages.stage is not Stage.LANES

    @property
    def decides(self) -> bool:
        """Return whether requests are decided on, if only for the record."""
        return self.stages.stage is not Stage.OBSERVE

    def put(self, stages: Stages) -> None:
        """Put a stage in force for all requests that begin now. Each role may make an event again."""
        if stages == self.stages:
            return
        self.stages = stages
        self._seen.clear()
        is_raw = stages.stage is not Stage.ALL and stages.raw_url is not None
        self.raw = Target(RAW, stages.raw_url) if is_raw and stages.raw_url is not None else None

    def wants_decision(self, facts: RequestFacts) -> bool:
        """Return whether a decision is made for a request. One without a model names nothing to decide on."""
        return bool(facts.model) and (self.stages.stage is not Stage.OBSERVE or facts.permit is not None)

    def attempts(
        self,
        facts: RequestFacts,
        decision: Decision | None,
        load: Load,
        *,
        is_known: bool,
        is_run: bool,
        ranks: Ranks | None = None,
    ) -> RawAttempts | Refused | None:
        """Return how a request passes to the raw server, why it must not, or None where it is managed.

        Args:
            facts: of the request.
            decision: None where `wants_decision` wants none.
            load: requests in flight by instance.
            is_known: the fleet was looked at: a decision means something.
            is_run: the request is an async run.
            ranks: compares the instances where a strategy orders them.
        """
        stages, refused = self.stages, None if decision is None else decision.refused
        if stages.manages(None if decision is None else decision.role, facts.lane):
            return None
        if refused is not None and facts.permit is not None:
            forbidden = _forbidden(facts.permit, facts.model, decision, refused)
            if forbidden is not None:
                return forbidden
        if decision is None or stages.stage is not Stage.SHADOW or not is_known:
            return RawAttempts(facts.model)
        would = None if decision.is_async and not is_run else decision.first(load, ranks)
        return RawAttempts(facts.model, decision, would)

    def ended(self, attempts: RawAttempts, record: RequestRecord) -> None:
        """Compare the answer of the raw server with the decision, where one was made."""
        decision = attempts.decision
        if decision is None or not record.status or record.outcome not in _JUDGED:
            return
        found = disagreement(attempts.would, decision.request.model, record.status)
        if found is None:
            return
        record.disagreement = found.value
        self.disagreements[found] += 1
        self._tell(found, attempts, record)

    def _tell(self, found: Disagreement, attempts: RawAttempts, record: RequestRecord) -> None:
        role = record.role or ""
        if len(self._seen) >= _MOST_ROLES:
            role = _OTHERS
        if role in self._seen or self._journal is None:
            return
        self._seen.add(role)
        name = f"the role {record.role}" if record.role else f"{record.model} (no role)"
        self._journal.record(
            "rollout_disagreement",
            detail=f"{name}: {_WORDS[found]}; request {record.request_id}, {_would(attempts)}",
        )


def _forbidden(permit: Permit, name: str, decision: Decision | None, refused: Refused) -> Refused | None:
    """Return the refusal of a request that is beyond a limit of its key, or None.

    A decision may refuse for another reason before it looks at the limits, and the raw server may serve what
    is refused here. A limit to instances is about ours.
    """
    if refused.what == "forbidden":
        return refused
    name = split_pin(name)[0]
    role = None if decision is None else decision.role
    if role is not None and model_key(name) == model_key(role):
        limit = permit.limit_of_role(role)
    else:
        limit = permit.limit_of_model(model_key(name)) or permit.limit_of_bare_model(name)
    return Refused("forbidden", Reason.POLICY, limit) if limit else None


_WORDS: Mapping[Disagreement, str] = {
    Disagreement.REFUSED: "the raw server has answered what would be refused",
    Disagreement.MODEL: "another model would answer",
    Disagreement.FALLBACK: "it would fall back",
    Disagreement.MODEL_MISSING: "the raw server does not have the model",
    Disagreement.RAW_FAILED: "the raw server has failed",
}


def _would(attempts: RawAttempts) -> str:
    would = attempts.would
    if would is not None:
        return f"managed it would go to {would.instance} with {would.model}"
    refused = None if attempts.decision is None else attempts.decision.refused
    return f"managed it would be refused: {refused.message if refused else 'the role takes runs only'}"
