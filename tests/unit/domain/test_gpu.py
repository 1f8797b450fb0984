"""Cards: their spelling, which instance each belongs to for good, and what still fits on one."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.gpu import (
    Gpu,
    GpuProcess,
    Holder,
    Holding,
    Load,
    admitted_load,
    agree,
    bind_gpus,
    cards_in_slots,
    find_gpu,
    gib,
    held_by,
    in_bus_order,
    is_given_back,
    is_news,
    is_uuid,
    least_need,
    missing_bytes,
    normal_pci,
    outstanding_bytes,
    promised_bytes,
    room_bytes,
    unattributed_bytes,
    unknown_memory,
    unlisted_room_bytes,
    unmeasured,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def gpu(number: int, *, index: int = 0) -> Gpu:
    """A card whose place on the bus is in the order of its number."""
    return Gpu(f"GPU-{number}", index, f"00000000:{number:02X}:00.0", "card", None, None, None)


def bind(
    gpus: Sequence[Gpu],
    *,
    selectors: Mapping[str, str] | None = None,
    bindings: Mapping[str, str] | None = None,
    taken: Sequence[str] = (),
    auto: bool = True,
) -> dict[str, str]:
    return bound(gpus, selectors or {}, bindings or {}, taken, auto=auto)


def bound(
    gpus: Sequence[Gpu],
    selectors: Mapping[str, str],
    bindings: Mapping[str, str],
    taken: Sequence[str],
    *,
    auto: bool,
) -> dict[str, str]:
    """Both rules together, as `Cards` applies them: what is named is taken, the rest is given out."""
    named = {one: one for one in selectors.values() if is_uuid(one)} | cards_in_slots(
        gpus, selectors.values()
    )
    return bind_gpus(
        gpus,
        automatic=[instance for instance, selector in selectors.items() if selector == "auto"],
        named=named.values(),
        bindings={i: uuid for i, uuid in bindings.items() if selectors.get(i, "auto") == "auto"},
        taken_ids=[*taken, *selectors],
        auto=auto,
    )


# Spelling of a PCI bus id


@pytest.mark.parametrize(
    "text",
    ["00000000:81:00.0", "0000:81:00.0", "81:00.0", " 0000:81:00.0\n"],
)
def test_a_pci_bus_id_has_one_spelling(text: str) -> None:
    assert normal_pci(text) == "00000000:81:00.0"


def test_the_spelling_of_a_pci_bus_id_is_lower_case() -> None:
    assert normal_pci("0001:AF:1B.7") == "00000001:af:1b.7"


@pytest.mark.parametrize("text", ["", "auto", "0", "GPU-1", "81:00", "81:00.8", "000:81:00.0", "81:00.0 x"])
def test_other_text_is_no_pci_bus_id(text: str) -> None:
    assert normal_pci(text) is None


@given(
    domain=st.integers(0, 2**32 - 1),
    bus=st.integers(0, 255),
    device=st.integers(0, 255),
    function=st.integers(0, 7),
)
def test_spellings_of_one_place_agree_and_the_normal_one_stays(
    domain: int, bus: int, device: int, function: int
) -> None:
    place = f"{bus:02x}:{device:02X}.{function}"
    normal = normal_pci(f"{domain:08X}:{place}")
    assert normal is not None
    assert normal_pci(normal) == normal
    assert normal_pci(normal.upper()) == normal
    if domain < 2**16:
        assert normal_pci(f"{domain:04x}:{place}") == normal


# Finding a card


def test_a_card_is_found_by_uuid() -> None:
    assert find_gpu([gpu(1), gpu(2)], "GPU-2") == gpu(2)


def test_a_card_is_found_by_any_spelling_of_its_pci_bus_id() -> None:
    assert find_gpu([gpu(1), gpu(0xA)], "0a:00.0") == gpu(0xA)


@pytest.mark.parametrize("selector", ["GPU-9", "99:00.0", "auto", "", "0"])
def test_what_names_no_card_finds_none(selector: str) -> None:
    assert find_gpu([gpu(1), gpu(2)], selector) is None


def test_a_card_without_a_pci_bus_id_is_found_by_uuid_only() -> None:
    nameless = replace(gpu(1), pci_bus_id="")
    assert find_gpu([nameless], "GPU-1") == nameless
    assert find_gpu([nameless], "") is None


def test_a_bus_id_names_no_card_of_another_machine_and_a_uuid_does() -> None:
    there = replace(gpu(1), host="node-1")
    assert find_gpu([there], "01:00.0") is None
    assert find_gpu([there], "GPU-1") == there
    assert find_gpu([there, replace(gpu(2), pci_bus_id=there.pci_bus_id)], "01:00.0") is not None


@pytest.mark.parametrize("selector", ["", " ", "0", "node-1"])
def test_a_card_of_unknown_place_is_named_by_its_uuid_alone(selector: str) -> None:
    nowhere = replace(gpu(1), pci_bus_id="", host="node-1")
    assert find_gpu([nowhere, replace(nowhere, host=None)], selector) is None
    assert find_gpu([nowhere], "GPU-1") == nowhere


def test_cards_of_other_machines_come_after_the_own_ones_by_machine() -> None:
    there = [replace(gpu(n), host=host) for n, host in ((1, "b"), (3, "a"), (2, "a"))]
    nowhere = replace(gpu(0), pci_bus_id="", host="a")
    found = in_bus_order([*there, nowhere, gpu(9)])
    assert [one.uuid for one in found] == ["GPU-9", "GPU-0", "GPU-2", "GPU-3", "GPU-1"]


def test_cards_whose_memory_is_unknown_are_named_by_host() -> None:
    away = [replace(gpu(n), host="node-1", why_unknown="no exporter is set") for n in range(3)]
    assert unknown_memory([gpu(1), gpu(2)]) is None
    assert unknown_memory([gpu(5), away[0]]) == "the memory of GPU-0 on node-1 is unknown: no exporter is set"
    other = replace(away[1], host=None, why_unknown="why")
    assert unknown_memory([*away, other]) == (
        "the memory of 3 cards on node-1 is unknown: no exporter is set; the memory of GPU-1 is unknown: why"
    )
    many = unknown_memory([replace(gpu(n), host=f"node-{n}", why_unknown="why") for n in range(8)])
    assert many is not None
    assert many.count("; ") == 5
    assert many.endswith("; 3 more")


@pytest.mark.parametrize(
    ("free", "total", "room"),
    [
        (10, 24, 7),
        (20, 24, 12),
        (None, 24, 12),
        (10, None, 7),
        (1, 24, -2),
        (None, 9, -3),
        (None, None, None),
    ],
)
def test_room_on_a_card_whose_processes_are_not_listed(
    free: int | None, total: int | None, room: int | None
) -> None:
    one = replace(gpu(1), vram_free_bytes=free, vram_total_bytes=total)
    assert unlisted_room_bytes(one, outstanding_bytes=3, promised_bytes=8, held_bytes=4) == room


# Examples of bindings


def test_cards_get_instances_in_the_order_of_the_bus() -> None:
    assert bind([gpu(2), gpu(1), gpu(3)]) == {"gpu0": "GPU-1", "gpu1": "GPU-2", "gpu2": "GPU-3"}


def test_cards_without_a_pci_bus_id_are_ordered_by_uuid() -> None:
    nameless = [replace(gpu(number), pci_bus_id="") for number in (2, 1)]
    assert bind(nameless) == {"gpu0": "GPU-1", "gpu1": "GPU-2"}


def test_without_auto_only_the_configured_are_bound() -> None:
    assert bind([gpu(1), gpu(2)], selectors={"big": "auto"}, auto=False) == {"big": "GPU-1"}


def test_a_card_that_is_bound_adds_nothing() -> None:
    assert bind([gpu(1)], bindings={"gpu0": "GPU-1"}) == {}


def test_the_number_of_a_card_that_is_gone_stays_taken() -> None:
    assert bind([gpu(2)], bindings={"gpu0": "GPU-1"}) == {"gpu1": "GPU-2"}


def test_a_configured_id_is_not_given_to_another_card() -> None:
    assert bind([gpu(1)], taken=["gpu0", "cpu"]) == {"gpu1": "GPU-1"}


def test_a_configured_id_stays_its_own_while_its_card_is_missing() -> None:
    assert bind([gpu(1)], selectors={"gpu0": "GPU-9"}) == {"gpu1": "GPU-1"}


def test_a_configured_card_is_not_given_a_second_instance() -> None:
    selectors = {"big": "01:00.0"}
    assert bind([gpu(1), gpu(2)], selectors=selectors) == {"gpu0": "GPU-2"}


def test_an_auto_selector_takes_the_first_card_that_nobody_named() -> None:
    selectors = {"any": "auto", "big": "GPU-1"}
    assert bind([gpu(1), gpu(2)], selectors=selectors) == {"any": "GPU-2"}


def test_an_auto_selector_waits_while_no_card_is_free() -> None:
    assert bind([gpu(1)], selectors={"any": "auto"}, bindings={"gpu0": "GPU-1"}) == {}


def test_an_instance_that_was_bound_before_it_named_a_card_gives_its_old_one_back() -> None:
    bindings = {"big": "GPU-1", "any": "GPU-2"}
    selectors = {"big": "GPU-3", "any": "auto"}
    assert bind([gpu(1), gpu(2), gpu(3)], selectors=selectors, bindings=bindings) == {"gpu0": "GPU-1"}


# What holds for all bindings


class Setup(NamedTuple):
    cards: list[Gpu]
    selectors: dict[str, str]
    bindings: dict[str, str]
    taken: list[str]
    auto: bool


IDS = ["gpu0", "gpu1", "gpu2", "gpu5", "chat", "embed"]


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Any state that configuration, hardware and history can be in; taken ids contain the configured."""
    cards = [gpu(number) for number in draw(st.lists(st.integers(1, 6), unique=True, max_size=6))]
    named = [spelling for n in range(1, 8) for spelling in (f"GPU-{n}", f"0000:{n:02x}:00.0")]
    selectors = draw(st.dictionaries(st.sampled_from(IDS), st.sampled_from(["auto", "auto", *named])))
    bound = st.sampled_from([f"GPU-{n}" for n in range(1, 9)])
    bindings = draw(st.dictionaries(st.sampled_from([*IDS, "gpu3"]), bound))
    taken = [*selectors, *draw(st.lists(st.sampled_from(["cpu", "gpu0", "gpu4"])))]
    return Setup(cards, selectors, bindings, taken, draw(st.booleans()))


def added_to(it: Setup) -> dict[str, str]:
    return bound(it.cards, it.selectors, it.bindings, it.taken, auto=it.auto)


def named_in(it: Setup) -> set[str]:
    slots = cards_in_slots(it.cards, it.selectors.values())
    return {slots.get(one, one) for one in it.selectors.values()}


def bindings_in(it: Setup) -> dict[str, str]:
    """The bindings that are in force: an instance that names its card has no other one."""
    return {i: uuid for i, uuid in it.bindings.items() if it.selectors.get(i, "auto") == "auto"}


@given(setups())
def test_a_binding_never_changes(it: Setup) -> None:
    assert not added_to(it).keys() & it.bindings.keys()


@given(setups(), st.lists(st.integers(1, 9), unique=True))
def test_whatever_cards_come_and_go_what_was_bound_stays(it: Setup, later: list[int]) -> None:
    first = {**it.bindings, **added_to(it)}
    second = added_to(it._replace(cards=[gpu(number) for number in later], bindings=first))
    assert not second.keys() & first.keys()


@given(setups())
def test_binding_again_adds_nothing(it: Setup) -> None:
    assert added_to(it._replace(bindings={**it.bindings, **added_to(it)})) == {}


@given(setups())
def test_only_cards_that_are_there_are_bound(it: Setup) -> None:
    assert set(added_to(it).values()) <= {card.uuid for card in it.cards}


@given(setups())
def test_a_card_that_is_chosen_belongs_to_nobody_else(it: Setup) -> None:
    added, named = added_to(it), named_in(it)
    for instance in added:
        others = {**bindings_in(it), **added}
        del others[instance]
        assert added[instance] not in {*others.values(), *named}


@given(setups())
def test_a_new_card_gets_the_lowest_number_never_used(it: Setup) -> None:
    added = added_to(it)
    used = {*it.bindings, *it.taken}
    place = {card.uuid: card.pci_bus_id for card in it.cards}
    new = [instance for instance in added if instance not in it.selectors]
    assert [place[added[instance]] for instance in new] == sorted(place[added[i]] for i in new)
    for instance in new:
        lower = range(int(instance.removeprefix("gpu")))
        assert instance not in used
        assert all(f"gpu{number}" in used for number in lower)
        used.add(instance)


@given(setups())
def test_with_auto_every_card_has_an_instance_and_without_it_none_is_invented(it: Setup) -> None:
    added = added_to(it)
    if it.auto:
        have = {*bindings_in(it).values(), *added.values(), *named_in(it)}
        assert {card.uuid for card in it.cards} <= have
    else:
        assert added.keys() <= it.selectors.keys()


@given(setups(), st.permutations(range(6)))
def test_renumbering_the_indexes_changes_nothing(it: Setup, indexes: list[int]) -> None:
    renumbered = [replace(card, index=index) for card, index in zip(it.cards, indexes, strict=False)]
    renumbered.sort(key=lambda card: card.index)
    assert added_to(it._replace(cards=renumbered)) == added_to(it)


# What is missing on a card

amounts = st.integers(0, 2**40)


class Claim(NamedTuple):
    needed_bytes: int
    used_bytes: int


def room(free: int | None, claims: Sequence[Claim]) -> int | None:
    """The room on one card beside instances that were promised and hold so much of it."""
    reserved = [outstanding_bytes({"A": one.needed_bytes}, {"A": one.used_bytes})["A"] for one in claims]
    return room_bytes(free, sum(reserved))


def lacking(free: int | None, needed: int, claims: Sequence[Claim]) -> int:
    return missing_bytes(needed, [room(free, claims)])


claim_lists = st.lists(st.builds(Claim, needed_bytes=amounts, used_bytes=amounts), max_size=5)


@pytest.mark.parametrize(
    ("free", "needed", "claims", "missing"),
    [
        (10, 10, [], 0),
        (10, 11, [], 1),
        (10, 0, [], 0),
        (10, 10, [Claim(needed_bytes=4, used_bytes=4)], 0),
        (10, 10, [Claim(needed_bytes=4, used_bytes=1)], 3),
        (10, 10, [Claim(needed_bytes=4, used_bytes=9)], 0),
        (10, 10, [Claim(needed_bytes=4, used_bytes=0), Claim(needed_bytes=2, used_bytes=1)], 5),
        (2, 1, [Claim(needed_bytes=9, used_bytes=0)], 8),
    ],
)
def test_what_is_promised_and_not_yet_taken_is_set_aside(
    free: int, needed: int, claims: list[Claim], missing: int
) -> None:
    assert lacking(free, needed, claims) == missing


@given(amounts, claim_lists)
def test_where_free_memory_is_unknown_nothing_is_said_to_be_missing(needed: int, claims: list[Claim]) -> None:
    assert lacking(None, needed, claims) == 0


@given(amounts, amounts, claim_lists)
def test_a_start_fits_once_what_is_missing_has_become_free(
    free: int, needed: int, claims: list[Claim]
) -> None:
    missing = lacking(free, needed, claims)
    assert missing >= max(0, needed - free)
    assert lacking(free + missing, needed, claims) == 0
    if missing:
        assert lacking(free + missing - 1, needed, claims) == 1


@given(amounts, amounts, amounts, claim_lists)
def test_two_starts_are_not_let_in_by_the_same_memory(
    free: int, first: int, second: int, claims: list[Claim]
) -> None:
    admitted = [*claims, Claim(needed_bytes=first, used_bytes=0)]
    if lacking(free, first, claims) == 0 and lacking(free, second, admitted) == 0 and second > 0:
        assert first + second <= free


@given(amounts, amounts, claim_lists, st.integers(0, 2**40))
def test_memory_that_moves_from_promise_to_use_changes_nothing(
    free: int, needed: int, claims: list[Claim], promised: int
) -> None:
    before = [*claims, Claim(needed_bytes=promised, used_bytes=0)]
    after = [*claims, Claim(needed_bytes=promised, used_bytes=promised)]
    assert lacking(free + promised, needed, before) == lacking(free, needed, after)


# What a load may come to hold


@pytest.mark.parametrize(
    ("free", "needed", "held", "claims", "reserved"),
    [
        (12, 8, 0, [], 8),
        (12, 8, 3, [], 8),  # beside what is loaded already
        (6, 8, 3, [], 6),  # what is loaded makes room for some of it
        (6, 8, 3, [Claim(needed_bytes=4, used_bytes=3)], 5),
        (2, 8, 7, [], 2),
        (0, 8, 9, [], 0),
        (0, 8, 6, [Claim(needed_bytes=4, used_bytes=0)], 2),
        (None, 8, 3, [], 8),
    ],
)
def test_a_load_reserves_what_its_server_will_take(
    free: int | None, needed: int, held: int, claims: list[Claim], reserved: int
) -> None:
    load = admitted_load(room_bytes=room(free, claims), needed_bytes=needed, held_bytes=held)
    assert load == Load(held_bytes=held, bytes=reserved)


@pytest.mark.parametrize(
    ("claimed", "loads", "promised"),
    [
        (5, [], 5),
        (5, [Load(0, 3)], 5),
        (5, [Load(3, 4)], 7),
        (0, [Load(3, 4), Load(5, 2)], 9),  # the second was admitted while the first was being loaded
    ],
)
def test_an_instance_may_come_to_hold_its_claim_or_what_it_loads(
    claimed: int, loads: list[Load], promised: int
) -> None:
    assert promised_bytes(claimed, loads) == promised


load_lists = st.lists(st.builds(Load, held_bytes=st.just(0), bytes=amounts), max_size=4)


@given(amounts, amounts, load_lists, claim_lists)
def test_loads_that_are_let_in_one_after_the_other_fit_together(
    free: int, needed: int, loads: list[Load], claims: list[Claim]
) -> None:
    """A load fits beside all that were let in before exactly when the sum does."""
    before = [*claims, Claim(needed_bytes=promised_bytes(0, loads), used_bytes=0)]
    if lacking(free, needed, before) == 0 and needed:
        admitted = admitted_load(room_bytes=room(free, before), needed_bytes=needed, held_bytes=0)
        assert admitted.bytes == needed
        assert sum(load.bytes for load in loads) + needed <= free


@pytest.mark.parametrize(
    ("likely", "free", "used", "least"),
    [(9, 1, 9, 9), (10, 1, 9, 0), (9, None, 9, 0), (9, 9, None, 0), (0, 5, 5, 0)],
)
def test_what_was_never_measured_needs_its_weights_unless_they_cannot_fit(
    likely: int, free: int | None, used: int | None, least: int
) -> None:
    assert least_need(likely_bytes=likely, free_bytes=free, used_bytes=used) == least


# What is measured

NOW = datetime(2026, 1, 8, tzinfo=UTC)


@pytest.mark.parametrize(
    ("measured", "known", "days", "news"),
    [
        (100, None, 0, True),
        (100, 100, 30, False),
        (104, 100, 30, False),
        (106, 100, 0, True),
        (94, 100, 0, False),
        (94, 100, 6.9, False),
        (94, 100, 7, False),
        (94, 100, 7.1, True),
    ],
)
def test_the_largest_measurement_of_the_last_days_counts(
    measured: int, known: int | None, days: float, news: bool
) -> None:
    at = None if known is None else NOW - timedelta(days=days)
    assert is_news(measured, NOW, known, at) is news


@given(amounts, amounts)
def test_measurements_agree_both_ways(one: int, other: int) -> None:
    assert agree(one, other) is agree(other, one)
    assert agree(one, one)


def in_use(used: int | None, *processes: tuple[int, int | None]) -> Gpu:
    return replace(gpu(1), vram_used_bytes=used, processes=tuple(GpuProcess(*one) for one in processes))


def test_what_belongs_to_no_process_is_the_rest() -> None:
    assert unattributed_bytes(in_use(100, (1, 30), (2, 50))) == 20
    assert unattributed_bytes(in_use(100)) == 100
    assert unattributed_bytes(in_use(None, (1, 30))) is None
    assert unattributed_bytes(in_use(100, (1, 30), (2, None))) is None


@pytest.mark.parametrize(
    ("now", "held", "given_back"),
    [
        (in_use(100, (7, 60)), Holding(frozenset({7}), 60, 40), False),
        (in_use(100), Holding(frozenset({7}), 60, 40), False),  # the process has gone, its memory has not
        (in_use(46), Holding(frozenset({7}), 60, 40), True),
        (in_use(47), Holding(frozenset({7}), 60, 40), False),
        (in_use(140, (8, 100)), Holding(frozenset({7}), 60, 40), True),  # it is somebody else's by now
        (in_use(100), Holding(frozenset({7}), None, 40), True),
        (in_use(100), Holding(frozenset({7}), 60, None), True),
        (in_use(100, (8, None)), Holding(frozenset({7}), 60, 40), True),
        (in_use(100), Holding(frozenset({7}), 0, 40), True),
    ],
)
def test_memory_is_given_back_when_it_belongs_to_its_processes_no_more_and_is_free(
    now: Gpu, held: Holding, given_back: bool
) -> None:
    assert is_given_back(now, held) is given_back


def test_of_a_card_that_is_not_measured_only_its_identity_is_known() -> None:
    full = replace(in_use(1, (1, 1)), vram_total_bytes=2, vram_free_bytes=1, lost="why")
    assert unmeasured(full) == replace(gpu(1), lists_processes=False, lost="why")


# Words


def test_who_holds_memory_is_said_with_the_most_first() -> None:
    holders = [
        Holder(1, "python3", None, 3 * 2**30),
        Holder(2, None, None, 2**30),
        Holder(3, "ollama", "gpu1", 2 * 2**30),
        Holder(4, "ollama", "gpu1", 2 * 2**30),
        Holder(5, "ollama", "gpu2", None),
        Holder(6, "ollama", "gpu2", 5 * 2**30),
    ]
    assert held_by(holders) == (
        "gpu1 4.0 GiB, python3 (pid 1) 3.0 GiB, a process (pid 2) 1.0 GiB, gpu2 unknown"
    )


def test_of_many_who_hold_memory_five_are_named() -> None:
    holders = [Holder(pid, "x", None, pid * 2**30) for pid in range(1, 8)]
    assert held_by(holders).startswith("x (pid 7) 7.0 GiB, x (pid 6) 6.0 GiB")
    assert held_by(holders).endswith("x (pid 3) 3.0 GiB, 2 more")
    assert held_by(holders[:5]).endswith("x (pid 1) 1.0 GiB")
    assert held_by([]) == ""


def test_memory_is_said_in_gib() -> None:
    assert [gib(0), gib(2**30), gib(1_500_000_000)] == ["0.0 GiB", "1.0 GiB", "1.4 GiB"]
