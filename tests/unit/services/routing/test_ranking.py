"""The order of instances by the strategy of a role, over a fleet: turns, loads and scores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from manager.domain.instance import Phase
from manager.domain.roles import Role, RoutingSettings, Strategy
from manager.domain.rollout import Stage, Stages
from manager.domain.routing import RequestFacts
from manager.domain.scoring import DEFAULT_WEIGHTS, Weights
from manager.services.routing import ranking as module
from manager.services.routing.ranking import Ranking, wish_of
from manager.services.routing.rollout import RawAttempts, Rollout
from tests.support.attempts import FACTS
from tests.support.instances import KIND, Ground

if TYPE_CHECKING:
    import pytest

    from manager.services.routing.router import Attempts

ROLE = RequestFacts("r", KIND)


class Measured:
    def __init__(self, **results: float) -> None:
        self.results = results

    def of(self, instance: str, key: str) -> float | None:
        return self.results.get(instance) if key == "tiny:latest" else None


def ground(strategy: Strategy, *names: str, weights: Weights | None = None, **role: object) -> Ground:
    found = Ground(*names)
    one = replace(Role("r", KIND, "tiny", strategy=strategy), **role)  # type: ignore[arg-type]
    found.settings.routing = RoutingSettings({"r": one}, weights=weights or DEFAULT_WEIGHTS)
    found.settings.version += 1
    return found


def only(**weights: float) -> Weights:
    return Weights(*[0.0] * len(Weights._fields))._replace(**weights)


def where(attempts: Attempts) -> list[str]:
    found = []
    while (one := attempts.next()) is not None:
        found.append(one.instance)
    return found


def route(at: Ground, facts: RequestFacts = ROLE) -> list[str]:
    return where(at.router.attempts(facts))


# --- round robin ---


def test_each_instance_is_first_in_turn_and_the_others_follow() -> None:
    at = ground(Strategy.ROUND_ROBIN, "a", "b", "c")
    assert [route(at) for _ in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_the_turn_depends_on_no_load_no_warmth_and_no_priority() -> None:
    at = ground(Strategy.ROUND_ROBIN, "a", "b")
    at["b"].loaded = ("tiny",)
    held = [at["a"].try_lease() for _ in range(3)]
    at.revision.advance()
    assert [route(at)[0] for _ in range(4)] == ["a", "b", "a", "b"]
    assert all(held)


def test_an_instance_that_is_out_or_stopped_takes_no_turn() -> None:
    at = ground(Strategy.ROUND_ROBIN, "a", "b", "c", "d")
    at["b"].endpoint, at["b"].phase = None, Phase.STOPPED
    at["c"].endpoint, at["c"].phase = None, Phase.UNAVAILABLE
    at.revision.advance()
    assert [route(at) for _ in range(3)] == [["a", "d", "b"], ["d", "a", "b"], ["a", "d", "b"]]


def test_a_request_takes_one_turn_however_often_it_looks_and_decides() -> None:
    at = ground(Strategy.ROUND_ROBIN, "a", "b")
    attempts = at.router.attempts(ROLE)
    assert attempts.first == attempts.first
    assert attempts.more
    attempts.renew()
    assert [one.instance for one in attempts.choices()] == ["a", "b"]
    assert at.router.attempts(ROLE).first is not None
    assert route(at)[0] == "a"


def test_a_look_takes_no_turn() -> None:
    at = ground(Strategy.ROUND_ROBIN, "a", "b")
    route(at)
    decision = at.router.decide(ROLE)
    for _ in range(3):
        first = decision.first(at.router.load(), at.router.ranks(decision))
        assert first is not None
        assert first.instance == "b"


def test_each_role_has_a_turn_of_its_own_and_they_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = Ranking(Ground().overload)
    assert [ranking.take_turn("r") for _ in range(3)] == [0, 1, 2]
    assert (ranking.take_turn("s"), ranking.take_turn(None), ranking.turn("r")) == (0, 0, 3)
    monkeypatch.setattr(module, "MOST_TURNS", 3)
    assert ranking.take_turn("t") == 0
    assert (ranking.turn("r"), ranking.turn("t")) == (0, 1), "all begin again"
    monkeypatch.setattr(module, "_WRAPS_AT", 2)
    assert [ranking.take_turn("u") for _ in range(3)] == [0, 1, 0]


# --- least loaded ---


def test_the_fewest_requests_in_flight_go_first() -> None:
    at = ground(Strategy.LEAST_LOADED, "a", "b")
    at["a"].loaded = ("tiny",)
    at.revision.advance()
    assert route(at) == ["a", "b"]
    held = at["a"].try_lease()
    assert route(at) == ["b", "a"]
    assert held is not None
    held.release()
    assert route(at) == ["a", "b"]


def test_a_request_without_a_role_goes_to_a_loaded_instance_first() -> None:
    at = ground(Strategy.LEAST_LOADED, "a", "b")
    at["b"].loaded = ("tiny",)
    at.revision.advance()
    held = at["b"].try_lease()
    assert route(at, FACTS) == ["b", "a"]
    assert route(at, RequestFacts("tiny", KIND, lane="r")) == ["a", "b"], "a lane brings its strategy"
    assert held is not None
    assert at.router.ranks(at.router.decide(FACTS)) is None


# --- scored ---


def test_the_best_score_goes_first() -> None:
    at = ground(Strategy.SCORED, "a", "b", weights=only(loaded=1))
    at["b"].loaded = ("tiny",)
    at.revision.advance()
    assert route(at) == ["b", "a"]


def test_requests_in_flight_count_at_once() -> None:
    at = ground(Strategy.SCORED, "a", "b", weights=only(queue=1))
    assert route(at) == ["a", "b"]
    held = at["a"].try_lease()
    assert route(at) == ["b", "a"]
    assert held is not None


def test_times_and_speeds_count_from_the_next_snapshot_on() -> None:
    for weights in (only(latency=1), only(throughput=1)):
        at = ground(Strategy.SCORED, "a", "b", weights=weights)
        at.overload.first_token("a", "tiny:latest", 4000)
        at.overload.first_token("b", "tiny:latest", 40)
        at.overload.generated("a", "tiny:latest", 11, 1.0)
        at.overload.generated("b", "tiny:latest", 101, 1.0)
        assert route(at) == ["b", "a"]
        at.overload.generated("a", "tiny:latest", 5001, 1.0)
        at.overload.first_token("a", "tiny:latest", 0)
        assert route(at) == ["b", "a"]
        for _ in range(40):
            at.overload.first_token("a", "tiny:latest", 0)
        at.fleet.clock.advance(1.1)
        assert route(at) == ["a", "b"]


def test_the_words_of_the_request_choose_among_equals() -> None:
    at = ground(Strategy.SCORED, "a", "b", weights=only(text=1))
    at["b"].reads("tiny", "qwen-coder:7b")
    at.settings.routing = RoutingSettings(
        {"coder": replace(at.settings.routing.roles["r"], name="coder")}, weights=only(text=1)
    )
    at.settings.version += 1
    assert route(at, RequestFacts("coder", KIND)) == ["b", "a"]
    assert route(at, RequestFacts("tiny", KIND, lane="coder")) == ["b", "a"]


def test_a_benchmark_counts() -> None:
    at = ground(Strategy.SCORED, "a", "b", weights=only(benchmark=1))
    at.router.ranking = Ranking(at.overload, Measured(b=0.9, a=0.2))
    assert route(at) == ["b", "a"]


def test_scores_are_kept_as_long_as_a_snapshot_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    at = ground(Strategy.SCORED, "a", "b", weights=only(benchmark=1))
    measured = Measured(b=0.9)
    at.router.ranking = Ranking(at.overload, measured)
    assert route(at) == ["b", "a"]
    measured.results = {"a": 1.0}
    assert route(at) == ["b", "a"]
    monkeypatch.setattr(module, "_MOST_SCORES", 1)
    assert route(at) == ["a", "b"], "worked out anew"


def test_an_instance_that_has_gone_meanwhile_has_no_score() -> None:
    at = ground(Strategy.SCORED, "a", "b")
    decision = at.router.decide(ROLE)
    del at.fleet.members["b"]
    at.revision.advance()
    at.router.snapshot()
    order = decision.in_order({"a": 0, "b": 0}, at.router.ranks(decision))
    assert [one.instance for one in order] == ["a", "b"]


def test_what_was_not_measured_is_unknown() -> None:
    at = ground(Strategy.SCORED, "a")
    candidate = at.router.snapshot().get("a")
    assert candidate is not None
    wish = wish_of(ROLE, "r", "tiny", "a text")
    signals = at.router.ranking.signals(wish, candidate, "tiny", in_flight=1)
    assert signals._asdict() == {
        "text": 0.0,
        "family": 1.0,
        "loaded": 0.0,
        "latency": None,
        "throughput": None,
        "queue": 0.5,
        "benchmark": None,
    }
    paid = replace(candidate, paid=True, models=None)
    assert at.router.ranking.signals(wish, paid, "tiny", in_flight=None)[2:6] == (None, None, None, None)


def test_what_a_request_would_do_beside_the_raw_server_follows_the_strategy() -> None:
    at = ground(Strategy.ROUND_ROBIN, "a", "b")
    route(at)
    rollout = Rollout()
    rollout.put(Stages(Stage.SHADOW, raw_url="http://raw:1"))
    decision = at.router.decide(ROLE)
    found = rollout.attempts(
        ROLE, decision, at.router.load(), is_known=True, is_run=False, ranks=at.router.ranks(decision)
    )
    assert isinstance(found, RawAttempts)
    assert found.would is not None
    assert found.would.instance == "b"
