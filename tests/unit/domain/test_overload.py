"""Where overloaded instances go. `test_routing.py` has the decisions."""

from __future__ import annotations

from manager.domain.overload import Order, Overloaded, Overloads, behind_others

REFUSES = Overloaded("full", refuses=True)
SLOW = Overloaded("slow", refuses=False)


def order(*, stage: int = 0, rank: int = 0, place: int = 0, tier: int = 0, priority: int = 0) -> Order:
    return stage, rank, place, tier, -priority


def ids(groups: list[tuple[Order, list[str]]]) -> list[list[str]]:
    return [names for _, names in groups]


def test_an_overload_is_of_every_model_or_of_some() -> None:
    assert Overloads("full", {"m": "slow"}).of("x") == REFUSES
    assert Overloads("", {"m": "slow"}).of("m") == SLOW
    assert Overloads("", {"m": "slow"}).of("x") is None


def test_the_only_one_stays_where_it_is() -> None:
    groups = [(order(), ["a"])]
    assert behind_others(groups, {"a": REFUSES}) == (groups, {})


def test_where_all_are_overloaded_none_is_moved() -> None:
    groups = [(order(priority=1), ["a"]), (order(), ["b"])]
    assert behind_others(groups, {"a": REFUSES, "b": SLOW}) == (groups, {})


def test_one_of_several_equals_goes_behind_the_others_and_keeps_its_order() -> None:
    placed, moved = behind_others([(order(), ["a", "b", "c"])], {"a": SLOW})
    assert placed == [(order(), ["b", "c"]), (order(), ["a"])]
    assert moved == {"a": order()}


def test_a_slow_one_goes_behind_those_of_its_rank_that_have_the_model_loaded_and_no_further() -> None:
    groups = [
        (order(priority=5), ["slow"]),
        (order(place=1), ["loaded"]),
        (order(place=2, tier=1), ["runs"]),
        (order(rank=1), ["cpu"]),
    ]
    placed, moved = behind_others(groups, {"slow": SLOW})
    assert ids(placed) == [["loaded"], ["slow"], ["runs"], ["cpu"]]
    assert list(moved) == ["slow"]
    without = [one for one in groups if one[1] != ["loaded"]]
    assert behind_others(without, {"slow": SLOW}) == (without, {})


def test_one_that_refuses_goes_behind_all_that_run_but_before_what_was_never_read() -> None:
    groups = [
        (order(), ["full"]),
        (order(tier=2), ["stopped"]),
        (order(rank=1, tier=1), ["cpu"]),
        (order(stage=1), ["unread"]),
    ]
    placed, moved = behind_others(groups, {"full": REFUSES})
    assert ids(placed) == [["stopped"], ["cpu"], ["full"], ["unread"]]
    assert list(moved) == ["full"]
    never = [groups[0], groups[1], groups[3]]
    assert behind_others(never, {"full": REFUSES}) == (never, {}), "nothing is started instead of it"
