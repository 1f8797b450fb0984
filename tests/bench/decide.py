"""What a decision costs the processor, when everything is known and nothing of it is remembered."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from manager.domain.denial import Denials, DenyRules
from manager.domain.instance import DeviceKind
from manager.domain.models import model_key
from manager.domain.roles import Policy, RequestKind, Role, RoutingSettings, Strategy
from manager.domain.routing import Candidate, RequestFacts, Snapshot, State, decide
from tests.bench.table import Row, at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

_INSTANCES = 32
_MODELS = 200
_MOST_US = 50
_CALLS = 100
_ROUNDS = 100
_RULES = DenyRules(("*:32b", "*:70b"), 14 * 10**9)


def decisions() -> Iterator[Row]:
    """The dearest of each kind: every instance has every model, so that each of them is an attempt."""
    snapshot = snapshot_of(_INSTANCES)
    settings = RoutingSettings(
        {
            role.name: role
            for role in (
                Role("output", RequestKind.GENERATE, model_name(1)),
                Role("thinking", RequestKind.GENERATE, model_name(2), "i01", Policy.PREFER_GPU),
                Role("spread", RequestKind.GENERATE, model_name(4), strategy=Strategy.LEAST_LOADED),
                Role(
                    "control",
                    RequestKind.GENERATE,
                    model_name(3),
                    None,
                    Policy.CPU_ONLY,
                    ("output", "thinking"),
                ),
            )
        }
    )
    many = f"{_INSTANCES} instances x {_MODELS} models"
    for what, model in (
        ("a model", model_name(0)),
        ("a role", "output"),
        ("a role with a target", "thinking"),
        ("a role with a strategy", "spread"),
        ("a pin", f"{model_name(0)}@i01"),
        ("an unknown name", "nobody-has-it"),
    ):
        spent_us = _spent_us(RequestFacts(model, RequestKind.GENERATE), settings, snapshot)
        yield at_most(f"decision, {many}: {what}", spent_us, _MOST_US, " µs")
    spent_us = _spent_us(
        RequestFacts(model_name(0), RequestKind.GENERATE), settings, snapshot_of(_INSTANCES, _RULES)
    )
    yield at_most(f"decision, {many}: a model, with deny rules everywhere", spent_us, _MOST_US, " µs")
    spent_us = _spent_us(RequestFacts("control", RequestKind.GENERATE), settings, snapshot)
    yield Row(f"decision, {many}: a role with two fallbacks", f"{spent_us:.1f} µs")


def snapshot_of(instances: int, rules: DenyRules | None = None) -> Snapshot:
    """So many instances, of which every other one is ready; each has all models."""
    names = [model_name(number) for number in range(_MODELS)]
    models = {model_key(name): name for name in names}
    sizes = dict.fromkeys(models, 8 * 10**9)
    return Snapshot(
        tuple(
            Candidate(
                id=f"i{number:02}",
                denials=None if rules is None else Denials(rules, sizes),
                device=DeviceKind.GPU if number % 4 else DeviceKind.CPU,
                state=State.READY if number % 2 else State.STARTABLE,
                priority=number % 3,
                models=models,
                loaded=frozenset(list(models)[number % 8 :: 8]) if number % 2 else frozenset(),
            )
            for number in range(instances)
        )
    )


def model_name(number: int) -> str:
    return f"model{number:03}:8b"


def _spent_us(request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot) -> float:
    """Of processor time, the least of many rounds: whatever else goes on only ever adds to it."""
    rounds = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        for _ in range(_CALLS):
            decide(request, settings, snapshot)
        rounds.append(time.process_time() - began)
    return min(rounds) / _CALLS * 1e6
