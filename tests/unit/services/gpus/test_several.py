"""Instances over several cards: their cards, what they are promised on each, and the sizes learned there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manager.domain.gpu import Gpu, NamedCard
from manager.domain.registry import LearnedSize
from manager.errors import GpuQueryError, UnavailableError
from manager.services.gpus.admission import Admission
from tests.support.gpu_machine import GIB, A, B, card, filled, model

if TYPE_CHECKING:
    from manager.services.gpus import Gpus
    from tests.support.gpu_machine import Machine

C = "GPU-c"
BOTH, ONE, TWO = "b" * 64, "c" * 64, "d" * 64
PID_BOTH, PID_ONE, PID_TWO = 1, 11, 22
SLOTS = {A: "00000000:01:00.0", B: "00000000:02:00.0", C: "00000000:03:00.0"}


@pytest.fixture(autouse=True)
def time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits take no time but the machine's."""

    async def passes(seconds: float) -> None:
        machine.advance(seconds)

    monkeypatch.setattr("manager.services.gpus.gpus.asyncio.sleep", passes)


def slotted(gpu: Gpu, index: int = 0) -> Gpu:
    return replace(gpu, index=index, pci_bus_id=SLOTS[gpu.uuid])


def cards(*uuids: str) -> tuple[Gpu, ...]:
    return tuple(slotted(card(uuid), index) for index, uuid in enumerate(uuids))


def free(**amounts: int) -> tuple[Gpu, ...]:
    """The cards a and b with so many GiB free, the rest in use by somebody else."""
    return tuple(
        slotted(filled((99, (24 - amount) * GIB), uuid=f"GPU-{letter}")) for letter, amount in amounts.items()
    )


# --- which cards ---


async def test_cards_are_named_by_uuid_and_slot_and_kept_in_the_order_of_the_list(machine: Machine) -> None:
    machine.cards = cards(A, B, C)
    gpus = await machine.gpus(both=("03:00.0", A))
    assert gpus.cards_of("both") == (NamedCard("03:00.0", C), NamedCard(A, A))
    assert gpus.uuids_of("both") == gpus.wanted_uuids("both") == (C, A)
    assert gpus.why_missing("both") is None


async def test_a_card_that_a_list_names_gets_no_instance_of_its_own(machine: Machine) -> None:
    machine.cards = cards(A, B, C)
    gpus = await machine.gpus(auto=True, both=(A, "02:00.0"), any="auto")
    assert gpus.uuids_of("any") == (C,)
    assert gpus.instance_ids() == ()
    machine.stored_bindings = {"gpu0": A, "gpu1": C}
    gpus = await machine.gpus(auto=True, both=(A, "02:00.0"))
    assert gpus.instance_ids() == ("gpu1",)


async def test_while_one_card_is_not_known_the_others_are_shown_and_none_is_asked_for(
    machine: Machine,
) -> None:
    machine.cards = cards(A)
    gpus = await machine.gpus(both=(A, "02:00.0"))
    assert gpus.cards_of("both") == (NamedCard(A, A), NamedCard("02:00.0", None))
    assert gpus.uuids_of("both") == (A,)
    assert gpus.wanted_uuids("both") == gpus.wanted_usable("both") == ()
    assert gpus.why_missing("both") == "GPU 02:00.0 was not found"
    await machine.show(gpus, *cards(A, B))
    assert gpus.wanted_usable("both") == (A, B)
    await machine.show(gpus, *cards(A))
    assert gpus.wanted_uuids("both") == (A, B)  # a slot that is empty has the card that was in it
    assert gpus.wanted_usable("both") == ()


async def test_every_card_that_is_missing_is_named_and_each_loss_is_told(machine: Machine) -> None:
    machine.cards = cards(A, B)
    gpus = await machine.gpus(both=(A, B), one=A)
    await machine.show(gpus, *cards(A))
    assert gpus.why_missing("both") == f"GPU {B} is not in this machine (any more)"
    assert gpus.why_missing("one") is None
    await machine.show(gpus)
    why = gpus.why_missing("both")
    assert why is not None
    assert A in why
    assert B in why
    await machine.show(gpus, *cards(A, B))
    assert gpus.why_missing("both") is None
    told = [(kind, instance) for kind, instance, *_ in machine.events]
    of_both = [kind for kind, instance in told if instance == "both"]
    assert of_both == ["gpu_lost"] * 2 + ["gpu_back"] * 2
    assert [kind for kind, instance in told if instance == "one"] == ["gpu_lost", "gpu_back"]


async def test_the_same_card_by_uuid_and_by_slot_is_refused_when_the_driver_answers(
    machine: Machine,
) -> None:
    gpus = await machine.gpus(both=(A, "01:00.0"))
    await machine.show(gpus, *cards(A))
    why = gpus.why_missing("both")
    assert why is not None
    assert "twice" in why
    assert gpus.uuids_of("both") == (A,)
    assert gpus.wanted_usable("both") == ()


async def test_all_cards_are_every_card_that_was_seen_in_the_order_of_the_bus(machine: Machine) -> None:
    machine.cards = cards(B, A)
    gpus = await machine.gpus(auto=True, every="all", mine="auto")
    assert gpus.uuids_of("every") == (A, B)
    assert gpus.uuids_of("mine") == (A,)  # one that is written gets a card; none is made by itself
    assert gpus.instance_ids() == ()
    assert machine.stored_bindings == {"mine": A}
    await machine.show(gpus, *cards(A, B, C))
    assert gpus.uuids_of("every") == (A, B, C)
    await machine.show(gpus, *cards(A, C))
    assert gpus.uuids_of("every") == (A, B, C)  # never fewer silently
    assert gpus.why_missing("every") == f"GPU {B} is not in this machine (any more)"
    again = await machine.gpus(auto=True, every="all")
    assert again.uuids_of("every") == (A, C)  # B was not seen since the daemon began
    assert again.why_missing("every") is None


async def test_of_all_cards_a_container_that_runs_has_those_that_it_was_made_with(machine: Machine) -> None:
    machine.cards = cards(A, B)
    gpus = await machine.gpus(every="all", one=A)
    gpus.note_given("every", (A,))
    gpus.note_given("one", (B,))
    assert (gpus.uuids_of("every"), gpus.wanted_uuids("every")) == ((A,), (A, B))
    assert gpus.uuids_of("one") == (A,)  # the configuration says itself which
    await machine.show(gpus, *cards(A))
    assert gpus.why_missing("every") is None  # it does not use B
    assert gpus.wanted_usable("every") == ()
    gpus.note_given("every", ())
    assert gpus.uuids_of("every") == (A, B)
    assert gpus.why_missing("every") is not None


async def test_a_container_of_all_cards_misses_one_that_was_taken_out_while_the_daemon_was_away(
    machine: Machine,
) -> None:
    machine.cards = cards(A)
    gpus = await machine.gpus(every="all")
    gpus.note_given("every", (A, B))
    await gpus.refresh()
    assert gpus.why_missing("every") == f"GPU {B} is not in this machine (any more)"
    assert gpus.wanted_usable("every") == (A,)  # what a new container would get


async def test_without_a_driver_there_is_no_card_of_all_and_a_list_is_left_to_the_engine(
    machine: Machine,
) -> None:
    machine.refusal = GpuQueryError("the driver is gone", details={"nvml": "driver_not_loaded"})
    gpus = await machine.gpus(every="all", both=(A, B))
    assert gpus.why_missing("every") == "no GPU was found: the driver is gone"
    assert gpus.why_missing("both") is None
    assert gpus.wanted_usable("both") == (A, B)


async def test_slices_that_are_made_again_and_again_are_forgotten(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.services.gpus.cards._MOST_GONE", 3)
    gpus = await machine.gpus(every="all")
    for number in range(9):
        await machine.show(gpus, card(f"MIG-{number}"))
    assert len(gpus.uuids_of("every")) == 4
    why = gpus.why_missing("every")
    assert why is not None
    assert "MIG-7" in why


# --- what is held, and what fits ---


@pytest.fixture
async def gpus(machine: Machine) -> Gpus:
    """Running instances: `both` over two cards, and one on each of these."""
    machine.containers = {PID_BOTH: BOTH, PID_ONE: ONE, PID_TWO: TWO}
    machine.cards = cards(A, B)
    gpus = await machine.gpus(both=(A, B), one=A, two=B)
    for container, instance in ((BOTH, "both"), (ONE, "one"), (TWO, "two")):
        gpus.note_container(container, instance, 5)
    return gpus


async def learned(machine: Machine, gpus: Gpus, a: int, b: int, *, times: int = 2) -> None:
    """`both` holds so many GiB with the model `big` in memory."""
    await machine.show(
        gpus,
        slotted(filled((PID_BOTH, a * GIB), uuid=A)),
        slotted(filled((PID_BOTH, b * GIB), uuid=B)),
    )
    for _ in range(times):
        await gpus.learn("both", [model("big:latest", digest="big", size=(a + b) * GIB)])


async def test_an_instance_holds_what_its_processes_hold_on_each_card(machine: Machine, gpus: Gpus) -> None:
    await learned(machine, gpus, 5, 3, times=1)
    assert gpus.held("both") == {A: 5 * GIB, B: 3 * GIB}
    assert gpus.held_bytes("both") == 8 * GIB
    assert gpus.holds_memory("both") is True
    await machine.show(gpus, slotted(filled((PID_BOTH, 5 * GIB), uuid=A)), slotted(card(B, free=None)))
    assert gpus.holds_memory("both") is True
    await machine.show(
        gpus, slotted(filled((99, GIB), uuid=A)), slotted(card(B, free=None, lists_processes=False))
    )
    assert gpus.holds_memory("both") is None  # one card does not tell
    await machine.show(gpus, slotted(filled((PID_BOTH, None), uuid=A)), slotted(filled(uuid=B)))
    assert gpus.held_bytes("both") is None


async def test_a_stop_names_each_card_on_which_memory_is_still_held(machine: Machine, gpus: Gpus) -> None:
    await learned(machine, gpus, 5, 3, times=1)
    held = gpus.holdings("both")
    assert await gpus.given_back(held, 0) == (A, B)
    machine.cards = (slotted(filled(uuid=A)), slotted(filled(uuid=B, driver=3 * GIB)))
    assert await gpus.given_back(held, 1) == (B,)
    machine.cards = (slotted(filled(uuid=A)),)
    assert await gpus.given_back(held, 1) == ()


async def test_a_claim_counts_on_each_card_for_the_others(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, *free(a=24, b=12))
    await gpus.admit("both", needed_bytes=30 * GIB, wait_s=0)  # 20 and 10, by what is free
    with pytest.raises(UnavailableError, match=r"20\.0 GiB are reserved for other instances"):
        await gpus.admit("one", needed_bytes=5 * GIB, wait_s=0)
    await gpus.admit("one", needed_bytes=4 * GIB, wait_s=0)
    with pytest.raises(UnavailableError, match=r"10\.0 GiB are reserved for other instances"):
        await gpus.admit("two", needed_bytes=3 * GIB, wait_s=0)
    gpus.drop_claim("both")
    await gpus.admit("two", needed_bytes=12 * GIB, wait_s=0)
    with pytest.raises(UnavailableError) as caught:
        await gpus.admit("both", needed_bytes=30 * GIB, wait_s=0)
    assert caught.value.details["lacking_bytes"] == 10 * GIB  # 20 beside `one`, nothing beside `two`
    assert caught.value.details["cards"] == [
        {"uuid": A, "vram_free_bytes": 24 * GIB, "reserved_bytes": 4 * GIB},
        {"uuid": B, "vram_free_bytes": 12 * GIB, "reserved_bytes": 12 * GIB},
    ]
    assert f"free on its cards: {A} 24.0 GiB, {B} 12.0 GiB" in caught.value.message


async def test_a_process_on_two_cards_is_named_once(machine: Machine, gpus: Gpus) -> None:
    machine.names = {99: "python3"}
    await machine.show(gpus, *free(a=4, b=4))
    with pytest.raises(UnavailableError, match=r"held by python3 \(pid 99\) 40\.0 GiB$"):
        await gpus.admit("both", needed_bytes=9 * GIB, wait_s=0)


async def test_the_share_of_each_card_is_learned_and_promised_at_the_next_start(
    machine: Machine, gpus: Gpus
) -> None:
    await learned(machine, gpus, 20, 10)
    assert machine.stored_sizes[0].by_card == {A: 20 * GIB, B: 10 * GIB}
    assert gpus.need_of("both", None) == 30 * GIB
    gpus = await machine.gpus(both=(A, B), one=A, two=B)
    await machine.show(gpus, *free(a=24, b=24))
    await gpus.admit("both", needed_bytes=gpus.need_of("both", None), wait_s=0)
    with pytest.raises(UnavailableError, match=r"20\.0 GiB are reserved"):
        await gpus.admit("one", needed_bytes=5 * GIB, wait_s=0)
    await gpus.admit("two", needed_bytes=14 * GIB, wait_s=0)


async def test_a_size_counts_on_the_cards_that_it_was_measured_on(machine: Machine, gpus: Gpus) -> None:
    await learned(machine, gpus, 20, 10)
    other = await machine.gpus(both=(A, C))
    assert other.need_of("both", None) == 0
    single = await machine.gpus(both=A)
    assert single.need_of("both", None) == 0
    machine.stored_sizes = [LearnedSize("both", "big:latest", "big", 30 * GIB, machine.time)]
    assert (await machine.gpus(both=(A, B))).need_of("both", None) == 0  # of one card: another one
    assert (await machine.gpus(both=B)).need_of("both", None) == 30 * GIB  # as it always was


async def test_a_size_of_other_cards_is_replaced_by_a_smaller_one_at_once(machine: Machine) -> None:
    machine.containers = {PID_BOTH: BOTH}
    machine.stored_sizes = [LearnedSize("both", "big:latest", "big", 40 * GIB, machine.time)]
    gpus = await machine.gpus(both=(A, B))
    gpus.note_container(BOTH, "both")
    await learned(machine, gpus, 20, 10)
    assert gpus.need_of("both", None) == 30 * GIB


@pytest.mark.parametrize(("a", "b"), [(20, 9), (18, 10)])
async def test_a_size_is_learned_only_when_it_stands_still_on_every_card(
    machine: Machine, gpus: Gpus, a: int, b: int
) -> None:
    await learned(machine, gpus, 20, 10, times=1)
    await learned(machine, gpus, a, b, times=1)
    assert machine.stored_sizes == []


# --- loads ---

LISTED: list[dict[str, Any]] = [{"name": "new:latest", "digest": "new", "size": 30 * GIB}]


async def test_a_load_over_two_cards_needs_the_room_of_both_and_reserves_its_share_on_each(
    machine: Machine, gpus: Gpus
) -> None:
    await learned(machine, gpus, 20, 10)
    await machine.show(gpus, *free(a=24, b=5))
    assert not gpus.take_room("both", "big")
    await machine.show(gpus, *free(a=24, b=12))
    assert gpus.take_room("both", "big")
    assert gpus._admission.reserved_for_others("one") == {A: 20 * GIB, B: 10 * GIB}
    gpus.end_loads("both")
    assert not gpus._admission.reserved_for_others("one")


async def test_a_load_takes_the_room_of_the_other_card_where_its_own_share_does_not_fit(
    machine: Machine, gpus: Gpus
) -> None:
    await learned(machine, gpus, 20, 2)
    await machine.show(gpus, *free(a=2, b=24))
    assert gpus.take_room("both", "big")
    assert gpus._admission.reserved_for_others("one") == {A: 2 * GIB, B: 20 * GIB}


async def test_a_model_that_was_never_loaded_needs_its_file_on_all_cards_together(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, *free(a=20, b=9))
    assert not gpus.take_room("both", "new", LISTED)
    await machine.show(gpus, *free(a=20, b=10))
    assert gpus.take_room("both", "new", LISTED)
    assert gpus._admission.reserved_for_others("one") == {A: 20 * GIB, B: 10 * GIB}
    assert gpus.take_room("one", "new", LISTED)  # too large for one card in any case


async def test_a_load_that_its_server_placed_otherwise_is_over_once_all_of_it_is_seen(
    machine: Machine, gpus: Gpus
) -> None:
    await learned(machine, gpus, 10, 10)
    await machine.show(gpus, *free(a=24, b=24))
    assert gpus.take_room("both", "big")
    await machine.show(gpus, slotted(filled((PID_BOTH, 15 * GIB), uuid=A)), slotted(filled(uuid=B)))
    assert gpus._admission.reserved_for_others("one") == {A: 0, B: 5 * GIB}
    await machine.show(gpus, slotted(filled((PID_BOTH, 20 * GIB), uuid=A)), slotted(filled(uuid=B)))
    assert not gpus._admission.reserved_for_others("one")


async def test_what_an_instance_holds_on_any_of_its_cards_makes_room_for_its_next_model(
    machine: Machine, gpus: Gpus
) -> None:
    await learned(machine, gpus, 12, 12)
    await machine.show(
        gpus,
        slotted(filled((PID_BOTH, 10 * GIB), (99, 12 * GIB), uuid=A)),
        slotted(filled((PID_BOTH, 10 * GIB), (99, 12 * GIB), uuid=B)),
    )
    assert gpus.take_room("both", "big")
    assert gpus._admission.reserved_for_others("one") == {A: 2 * GIB, B: 2 * GIB}


async def test_a_shortage_over_two_cards_ends_when_either_has_room(machine: Machine, gpus: Gpus) -> None:
    await learned(machine, gpus, 20, 10)
    await machine.show(gpus, *free(a=20, b=2))
    with pytest.raises(UnavailableError):
        await gpus.admit_load("both", "big", wait_s=1)
    assert gpus.shortage("both") is not None
    await machine.show(gpus, *free(a=6, b=24))
    assert gpus.shortage("both") is None


# --- what holds whatever happens ---

CARDS_OF = {"one": (A,), "two": (B,), "both": (A, B), "every": (A, B, C)}
TOTAL = 24
instances = st.sampled_from(sorted(CARDS_OF))
amounts = st.integers(0, TOTAL + 6)


class Cards:
    """Cards and what instances hold of them, by instance and UUID, without a driver."""

    def __init__(self, foreign: dict[str, int]) -> None:
        self.foreign = foreign
        self.held: dict[str, dict[str, int]] = {
            one: dict.fromkeys(uuids, 0) for one, uuids in CARDS_OF.items()
        }

    def uuids_of(self, instance: str) -> tuple[str, ...]:
        return CARDS_OF[instance]

    def free(self, uuid: str) -> int:
        return TOTAL - self.foreign[uuid] - sum(held.get(uuid, 0) for held in self.held.values())

    def gpu(self, uuid: str) -> Gpu:
        return Gpu(uuid, 0, "", "", TOTAL, TOTAL - self.free(uuid), self.free(uuid))


class PromisesOfCards(RuleBasedStateMachine):
    """Starts and loads that are let in where nothing lacks, and servers that take what they were promised."""

    @initialize(foreign=st.fixed_dictionaries(dict.fromkeys((A, B, C), st.integers(0, TOTAL))))
    def begin(self, foreign: dict[str, int]) -> None:
        self.cards = Cards(foreign)
        self.admission = Admission(
            cast("Any", self.cards), held=lambda one: dict(self.cards.held[one]), now=lambda: 0.0
        )
        self.running: set[str] = set()
        self.loading: set[str] = set()

    def promised(self) -> dict[str, int]:
        """What all instances were promised on each card and do not hold yet."""
        return dict(self.admission.reserved_for_others("nobody"))

    @rule(instance=instances, needed=amounts, likely=st.dictionaries(st.sampled_from((A, B, C)), amounts))
    def starts(self, instance: str, needed: int, likely: dict[str, int]) -> None:
        if instance not in self.running and self.admission.lacking(instance, needed) == 0:
            self.admission.claim(instance, needed, likely)
            self.running.add(instance)

    @rule(instance=instances, needed=amounts, likely=st.dictionaries(st.sampled_from((A, B, C)), amounts))
    def loads(self, instance: str, needed: int, likely: dict[str, int]) -> None:
        more = needed - sum(self.cards.held[instance].values())
        if instance in self.running - self.loading and self.admission.lacking(instance, max(0, more)) == 0:
            self.admission.reserve(instance, "model", needed, likely)
            self.loading.add(instance)

    @rule(instance=instances, share=st.floats(0, 1))
    def takes_memory(self, instance: str, share: float) -> None:
        """Memory of each card, no more than it was promised there."""
        others = self.admission.reserved_for_others(instance)
        mine = {uuid: most - others[uuid] for uuid, most in self.promised().items()}
        for uuid in CARDS_OF[instance]:
            self.cards.held[instance][uuid] += int(mine.get(uuid, 0) * share)

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def ends_its_loads(self, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(sorted(self.loading)))
        self.admission.end_loads(instance)
        self.loading.remove(instance)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(sorted(self.running)))
        self.admission.drop(instance)
        self.running.remove(instance)
        self.loading.discard(instance)
        self.cards.held[instance] = dict.fromkeys(CARDS_OF[instance], 0)

    @invariant()
    def no_card_is_promised_more_than_it_has_free(self) -> None:
        for uuid, promised in self.promised().items():
            assert promised <= max(0, self.cards.free(uuid)), uuid


TestPromisesOfCards = PromisesOfCards.TestCase
