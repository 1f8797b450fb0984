"""A request that passes to the raw server touches nothing of ours; the stage is changed in one step."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.domain.judgement import GOOD
from manager.domain.keys import Grant, Permit
from manager.domain.roles import BodyChanges
from manager.domain.rollout import Disagreement, Stage, Stages
from manager.domain.routing import Refused, RequestFacts
from manager.domain.target import Target
from manager.errors import InvalidRequestError, Reason, RegistryUnwritableError
from manager.services.routing.attempting import Trouble
from manager.services.routing.rollout import Rollout
from manager.services.routing.stages import RolloutControl
from manager.settings.overrides import Sourced
from manager.settings.rollout import DEFAULTS
from manager.wire.statuses import judge
from tests.support.attempts import FACTS, Journal, attempt, decision
from tests.support.attempts import Stage as Rig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from manager.domain.registry import OrderKind

RAW = "http://10.0.0.1:11434"
SHADOW = Stages(Stage.SHADOW, frozenset(), RAW)


def rig(stages: Stages = SHADOW, *attempts: Any) -> Rig:
    found = Rig(*attempts)
    found.routing.rollout.put(stages)
    return found


def test_a_request_that_passes_takes_no_lease_slot_or_permit_and_is_sent_as_it_came() -> None:
    stage = rig(SHADOW, attempt("a", role="output"))
    stage.slots_of["a"] = 1
    stage.router.changes["tiny", "output"] = BodyChanges(think=True)
    stage.router.changes["tiny", None] = BodyChanges(think=True)
    one = stage.request()
    assert one.enter(FACTS) == Target("raw", RAW)
    one.sent()
    one.expect_on_cpu()
    assert one.changes.empty
    assert (one.is_raw, one.place, one.waits_for, one.payment) == (True, None, None, None)
    assert (stage.placement.granted, stage.placement.on_cpu, stage.status.workers()) == ([], [], ())
    assert one.answered(GOOD) is None
    one.record.status = 200
    one.close("ok")
    assert stage.ended == [one.record]


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_an_error_of_the_raw_server_is_the_clients_and_is_held_against_nobody(status: int) -> None:
    stage = rig(SHADOW, attempt("a"), attempt("b"))
    one = stage.request()
    one.enter(FACTS)
    one.sent()
    assert not one.might_follow(judge(status))
    assert one.answered(judge(status), "no", retry_after_s=5.0) is None
    assert set(stage.blamed()) <= {("raw", judge(status).reason)}
    assert stage.placement.reread == []
    assert stage.status.idle_status("tiny") == "not_loaded"
    assert stage.overload.of("raw") is None


@pytest.mark.parametrize("sent", [True, False])
def test_a_raw_server_that_fails_is_neither_recovered_nor_left_for_another(*, sent: bool) -> None:
    stage = rig(SHADOW, attempt("a"))
    one = stage.request()
    one.enter(FACTS)
    step = one.failed(Reason.UPSTREAM_UNREACHABLE, "raw: gone", sent=sent)
    assert isinstance(step, Trouble)
    assert (step.reason, step.refused) == (Reason.UPSTREAM_UNREACHABLE, None)
    assert (stage.placement.looked_for, stage.placement.granted) == ([], [])
    assert stage.status.idle_status("tiny") == "not_loaded"


def test_a_kept_connection_that_was_closed_is_repeated_once() -> None:
    one = rig().request()
    target = one.enter(FACTS)
    assert one.failed(Reason.UPSTREAM_UNREACHABLE, "closed", sent=False, stale=True) is target
    assert isinstance(one.failed(Reason.UPSTREAM_UNREACHABLE, "closed", sent=False, stale=True), Trouble)


def test_a_request_without_a_model_passes_though_the_stage_has_changed_since_it_came() -> None:
    stage = rig(Stages())
    one = stage.request()
    assert one.enter_raw(Target("raw", RAW)) == Target("raw", RAW)
    assert (one.is_raw, one.record.model, one.record.effective_target) == (True, None, "raw")


def test_an_unload_passes_as_any_request() -> None:
    stage = rig(SHADOW, attempt("a"))
    one = stage.request()
    assert one.enter_running(FACTS) == Target("raw", RAW)
    assert one.others == ()
    step = one.failed(Reason.UPSTREAM_UNREACHABLE, "gone", sent=False)
    assert isinstance(step, Trouble)
    assert step.reason is Reason.UPSTREAM_UNREACHABLE


UNKNOWN = Refused("unknown", Reason.MODEL_MISSING, "not found")
FORBIDDEN = Refused("forbidden", Reason.POLICY, "the key may not")


@pytest.mark.parametrize("stage", [Stage.OBSERVE, Stage.SHADOW, Stage.LANES])
@pytest.mark.parametrize(
    ("permit", "model", "role", "refused", "passes"),
    [
        (Permit("app", models=("tiny",)), "tiny", None, None, True),
        (Permit("app", models=("tiny",)), "tiny", None, FORBIDDEN, False),
        (Permit("app", models=("tiny",)), "other", None, UNKNOWN, False),
        (Permit("app", models=("tiny",)), "tiny@nowhere", None, UNKNOWN, True),
        (Permit("app", roles=frozenset({"output"})), "tiny", None, UNKNOWN, False),
        (Permit("app", roles=frozenset({"output"})), "output", "output", UNKNOWN, True),
        (Permit("app", roles=frozenset({"output"})), "control", "control", UNKNOWN, False),
        (Permit("app", instances=frozenset({"a"})), "unknown", None, UNKNOWN, True),
    ],
)
def test_what_a_limit_of_the_key_forbids_does_not_pass(  # noqa: PLR0917
    stage: Stage, permit: Permit, model: str, role: str | None, refused: Refused | None, passes: bool
) -> None:
    found = rig(Stages(stage, frozenset({"other"}), RAW))
    attempts = () if refused else (attempt("a"),)
    found.router.decision = decision(*attempts, refused=refused, role=role)
    one = found.request()
    one.grant = Grant("app", frozenset(), datetime(2026, 11, 28, tzinfo=UTC), permit=permit)
    step = one.enter(FACTS._replace(model=model))
    assert isinstance(step, Target) == passes
    if not passes:
        assert isinstance(step, Trouble)
        assert (step.refused, one.record.effective_target) == ("forbidden", None)


def test_observe_decides_only_for_the_limits_of_a_key() -> None:
    rollout = rig(Stages(Stage.OBSERVE, frozenset(), RAW)).routing.rollout
    assert not rollout.wants_decision(FACTS)
    assert rollout.wants_decision(FACTS._replace(permit=cast("Any", "a permit")))
    rollout.put(SHADOW)
    assert rollout.wants_decision(FACTS)
    assert not rollout.wants_decision(RequestFacts("", FACTS.kind))


def test_before_the_first_look_at_the_fleet_nothing_is_judged() -> None:
    stage = rig(SHADOW)
    stage.router.decision = decision(refused=Refused("unknown", Reason.MODEL_MISSING, "not found"))
    stage.router.is_known = False
    one = stage.request()
    one.enter(FACTS)
    one.record.status = 200
    one.close("ok")
    assert (one.record.disagreement, one.record.shadow_refused) == (None, None)


@pytest.mark.parametrize(("outcome", "status"), [("client_gone", 200), ("cut", 503), ("ok", 0)])
def test_a_request_that_did_not_end_by_itself_is_not_judged(outcome: Any, status: int) -> None:
    stage = rig(SHADOW)
    stage.router.decision = decision(refused=Refused("unknown", Reason.MODEL_MISSING, "not found"))
    one = stage.request()
    one.enter(FACTS)
    one.record.status = status
    one.close(outcome)
    assert one.record.disagreement is None


def ended(rollout: Rollout, role: str | None) -> None:
    facts = FACTS
    refused = decision(refused=Refused("unknown", Reason.MODEL_MISSING, "not found"), role=role)
    attempts = rollout.attempts(facts, refused, {}, is_known=True, is_run=False)
    one = Rig().request(role=role, status=200)
    rollout.ended(cast("Any", attempts), one.record)


def test_each_role_makes_one_event_and_another_one_in_the_next_stage() -> None:
    journal = Journal()
    rollout = Rollout(cast("Any", journal))
    rollout.put(SHADOW)
    for role in ("output", None, "output", None, "control"):
        ended(rollout, role)
    assert journal.kinds == ["rollout_disagreement"] * 3
    assert rollout.disagreements[Disagreement.REFUSED] == 5
    rollout.put(SHADOW)
    ended(rollout, "output")
    assert len(journal.kinds) == 3
    rollout.put(SHADOW._replace(lanes=frozenset({"output"})))
    ended(rollout, "output")
    assert len(journal.kinds) == 4


def test_the_roles_with_an_event_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manager.services.routing.rollout._MOST_ROLES", 2)
    journal = Journal()
    rollout = Rollout(cast("Any", journal))
    rollout.put(SHADOW)
    for number in range(10):
        ended(rollout, f"role{number}")
    assert len(journal.kinds) == 3
    assert rollout.disagreements[Disagreement.REFUSED] == 10


class Registry:
    """As much of a registry as a stage needs."""

    def __init__(self) -> None:
        self.saved: dict[tuple[str, str], str] = {}
        self.fails = False

    async def orders(self, kind: OrderKind, read: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
        return {key[0]: read(json.loads(one)) for key, one in self.saved.items() if key[1] == kind}

    async def save_order(self, instance: str, kind: OrderKind, value: Mapping[str, Any] | None) -> None:
        if self.fails:
            raise RegistryUnwritableError("the disk is full")
        self.saved.pop((instance, kind), None)
        if value is not None:
            self.saved[instance, kind] = json.dumps(value)


async def opened(
    registry: Registry, written: Mapping[str, Sourced] = DEFAULTS
) -> tuple[RolloutControl, Journal]:
    journal = Journal()
    control = RolloutControl(
        Rollout(), cast("Any", registry), cast("Any", journal), written=written, refusals=lambda _section: ()
    )
    await control.load()
    return control, journal


async def test_a_change_is_in_force_at_once_and_after_a_restart_and_can_be_taken_back() -> None:
    registry = Registry()
    control, journal = await opened(registry)
    await control.change({"stage": "observe", "raw_url": RAW})
    assert control.in_force.raw == Target("raw", RAW)
    assert control.partial == {"rollout": "observe"}
    assert journal.details == [f"stage: observe, raw_url: {RAW}"]
    again, _ = await opened(registry)
    assert again.in_force.raw == Target("raw", RAW)
    await again.change({"stage": None, "raw_url": None})
    assert again.in_force.raw is None
    assert (again.partial, registry.saved) == ({}, {})


async def test_a_change_that_cannot_be_saved_or_contradicts_itself_changes_nothing() -> None:
    registry = Registry()
    control, journal = await opened(registry)
    with pytest.raises(InvalidRequestError) as refused:
        await control.change({"stage": "observe"})
    assert refused.value.details == {
        "fields": [
            {
                "field": "body.rollout.raw_url",
                "message": "missing; the stage 'observe' passes requests there",
            }
        ]
    }
    registry.fails = True
    with pytest.raises(RegistryUnwritableError):
        await control.change({"stage": "observe", "raw_url": RAW})
    assert (control.in_force.stages, control.values, journal.kinds) == (Stages(), DEFAULTS, [])


async def test_overrides_that_a_new_configuration_has_no_room_for_are_ignored_until_it_has() -> None:
    written = {**DEFAULTS, "raw_url": Sourced(RAW, "file")}
    control, journal = await opened(Registry(), written)
    await control.change({"stage": "shadow"})
    control.reconfigure(DEFAULTS)
    assert (control.in_force.stages.stage, len(control.ignored)) == (Stage.ALL, 1)
    control.reconfigure(written)
    assert (control.in_force.stages.stage, control.ignored) == (Stage.SHADOW, ())
    assert journal.kinds == ["rollout_changed"] * 4
    # A change while they are ignored does not bring them back.
    control.reconfigure(DEFAULTS)
    await control.change({"lanes": ["output"]})
    assert control.values["stage"] == DEFAULTS["stage"]
    assert control.ignored == ()
