"""When a container is replaced by a better one, with the wall clock and the monotonic one as arguments."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from manager.domain.container import LABEL_DEVICE, LABEL_HASH
from manager.domain.instance import ContainerFacts, Model
from manager.errors import Reason
from manager.services.instances.staleness import Staleness

if TYPE_CHECKING:
    from manager.services.world import World

NOW = 1000.0
TODAY = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)
PAUSE = timedelta(minutes=10)
GPUS = SimpleNamespace(holds_memory=lambda _instance: None)
CLOCKS = SimpleNamespace(is_shared=False, now=lambda: NOW, utcnow=lambda: TODAY, gpus=GPUS)
WORLD = cast("World", CLOCKS)
CONTAINER = ContainerFacts("c", "default-ollama-gpu0", "image", "running", labels={LABEL_HASH: "new"})
ON_CPU = Model("m", "d", size_bytes=10, vram_bytes=0, expires_at=None)


async def fallen_back() -> Staleness:
    """A container on a card, seen to compute on the CPU."""
    stale = Staleness(WORLD, "gpu0")
    stale.fresh(CONTAINER, wanted_hash="new", on_gpu=True)
    assert await stale.prove_device(CONTAINER, [ON_CPU])
    assert stale.why is not None
    assert stale.why.code is Reason.GPU_FALLBACK
    return stale


async def test_the_first_fallback_is_repaired_at_once() -> None:
    assert (await fallen_back()).recreate_at(None) == 0.0


@pytest.mark.parametrize(
    ("ago", "wait"),
    [
        (timedelta(0), PAUSE),
        (timedelta(minutes=1), timedelta(minutes=9)),
        (timedelta(minutes=9, seconds=59), timedelta(seconds=1)),
        (PAUSE, timedelta(0)),
        (timedelta(minutes=15), timedelta(minutes=-5)),
    ],
)
async def test_another_fallback_is_repaired_ten_minutes_after_the_last_repair(
    ago: timedelta, wait: timedelta
) -> None:
    stale = await fallen_back()
    assert stale.recreate_at(TODAY - ago) == NOW + wait.total_seconds()


async def test_an_older_template_does_not_wait_for_that_pause() -> None:
    stale = Staleness(WORLD, "gpu0")
    stale.fresh(CONTAINER, wanted_hash="newer", on_gpu=False)
    assert stale.recreate_at(TODAY) == 0.0


async def test_with_a_shared_database_a_fallback_is_repaired_and_an_older_template_only_shown() -> None:
    shared = cast("World", SimpleNamespace(**{**vars(CLOCKS), "is_shared": True}))
    stale = Staleness(shared, "gpu0")
    stale.fresh(CONTAINER, wanted_hash="newer", on_gpu=True)
    assert stale.why is not None
    assert (stale.why.code, stale.recreate_at(None)) == (Reason.TEMPLATE_OUTDATED, None)
    assert "its next start replaces it" in stale.why.message
    stale.compare_template(CONTAINER, "new")
    assert stale.why is None
    assert on_cards(stale, "GPU-a")
    assert stale.recreate_at(None) is None
    assert await stale.prove_device(CONTAINER, [ON_CPU])
    assert stale.recreate_at(None) == 0.0


def on_cards(stale: Staleness, *uuids: str, made_for: str | None = "GPU-a,GPU-b") -> bool:
    labels = {LABEL_HASH: "new"} | ({} if made_for is None else {LABEL_DEVICE: made_for})
    return stale.compare_cards(replace(CONTAINER, labels=labels), uuids)


def compared() -> Staleness:
    stale = Staleness(WORLD, "every")
    stale.fresh(CONTAINER, wanted_hash="new", on_gpu=True)
    return stale


def test_a_container_with_the_cards_of_a_new_one_is_not_replaced() -> None:
    stale = compared()
    assert not on_cards(stale, "GPU-b", "GPU-a")
    assert not on_cards(stale)  # a new one would not start
    assert not on_cards(stale, "GPU-c", made_for=None)  # somebody else made it
    assert stale.why is None


def test_a_container_with_other_cards_than_a_new_one_is_replaced_and_told_once() -> None:
    stale = compared()
    assert on_cards(stale, "GPU-a", "GPU-b", "GPU-c")
    assert not on_cards(stale, "GPU-a", "GPU-b", "GPU-c")
    assert stale.why is not None
    assert stale.why.code is Reason.TEMPLATE_OUTDATED
    assert "was made for GPU-a,GPU-b, and its cards are GPU-a,GPU-b,GPU-c by now" in stale.why.message
    assert stale.recreate_at(None) == 0.0


def test_a_card_that_came_and_went_replaces_no_container() -> None:
    stale = compared()
    on_cards(stale, "GPU-a", "GPU-b", "GPU-c")
    assert not on_cards(stale)
    assert stale.why is None
    assert on_cards(stale, "GPU-a", "GPU-b", "GPU-c")


async def test_other_cards_do_not_hide_that_a_container_computes_on_the_processor() -> None:
    stale = await fallen_back()
    assert on_cards(stale, "GPU-c")
    assert stale.why is not None
    assert stale.why.code is Reason.GPU_FALLBACK
    assert not on_cards(stale)
    assert stale.why is not None


async def test_an_image_that_is_missing_postpones_the_repair() -> None:
    stale = await fallen_back()
    stale.postpone("image", 60.0)
    assert stale.recreate_at(None) == NOW + 60
    assert stale.recreate_at(TODAY) == NOW + 600


def test_what_is_in_order_is_never_replaced() -> None:
    stale = Staleness(WORLD, "gpu0")
    stale.fresh(CONTAINER, wanted_hash="new", on_gpu=True)
    assert stale.recreate_at(None) is None


async def test_a_container_that_has_gone_has_nothing_to_prove() -> None:
    asked: list[str] = []

    async def logs_between(container: str, *_: object) -> tuple[str, ...]:
        asked.append(container)
        return ()

    engine = SimpleNamespace(logs_between=logs_between)
    world = SimpleNamespace(**vars(CLOCKS), engine=engine)
    stale = Staleness(cast("World", world), "gpu0")
    running = replace(CONTAINER, started_at=TODAY)
    assert not await stale.prove_device(running, [])
    assert asked == []
    stale.fresh(running, wanted_hash="new", on_gpu=True)
    assert not await stale.prove_device(running, [])
    assert asked == ["c"]
    stale.clear()
    assert not await stale.prove_device(running, [])
    assert asked == ["c"]
    stale.fresh(CONTAINER, wanted_hash="new", on_gpu=True)
    assert not await stale.prove_device(CONTAINER, []), "nobody can tell when it was started"
    assert not await stale.prove_device(running, [])
    assert asked == ["c"]
