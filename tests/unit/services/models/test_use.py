"""The use of models: of this daemon to the second, of earlier ones to the hour."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from manager.adapters.registry import open_registry
from manager.domain.history import Ended
from manager.domain.roles import Policy, RequestKind
from manager.domain.routing import Decision, RequestFacts
from manager.errors import RegistryUnwritableError
from manager.services.models import use
from manager.services.models.use import ModelUse, ModelUses
from manager.services.requests_history import History, Retention
from tests.support.records import a_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NOW = datetime(2026, 8, 1, 12, 30, tzinfo=UTC)
NOW_S = int(NOW.timestamp())


@pytest_asyncio.fixture
async def history(tmp_path: Path) -> AsyncIterator[History]:
    registry = await open_registry(tmp_path / "registry.sqlite3")
    made = History(registry.requests(), retention=Retention(14, 1000), utcnow=lambda: NOW)
    yield made
    await made.store.close()
    await registry.close()


_numbers = count(1)


def ended(**values: Any) -> Ended:
    usual = {
        "ts": NOW,
        "request_id": f"r{next(_numbers)}",
        "kind": RequestKind.GENERATE,
        "model": "tiny",
        "effective_target": "a",
        "duration_ms": 0.0,
        "input_tokens": 3,
        "output_tokens": 5,
        "outcome": "ok",
    }
    decision = Decision(RequestFacts("tiny", RequestKind.GENERATE), None, Policy.AUTO, None, (), ())
    return Ended(a_record(**{**usual, **values}), SimpleNamespace(decision=decision, made=()), (), "")


async def test_a_use_is_known_at_once_and_the_history_gets_it(history: History) -> None:
    uses = ModelUses(history.add, now_s=lambda: NOW_S)
    assert uses.of("tiny:latest") is None
    uses.keep(ended())
    uses.keep(ended(ts=NOW + timedelta(minutes=1)))
    uses.keep(ended(model="other", input_tokens=None))
    assert uses.of("tiny:latest") == ModelUse(NOW_S + 60, 2, 6, 10)
    assert uses.of("other:latest") == ModelUse(NOW_S, 1, 0, 5)
    assert (uses.version, history.waiting) == (3, 3)


@pytest.mark.parametrize("values", [{"kind": None}, {"model": None}, {"effective_target": None}])
async def test_what_went_to_no_model_on_an_instance_is_no_use(history: History, values: Any) -> None:
    uses = ModelUses(history.add, now_s=lambda: NOW_S)
    uses.keep(ended(**values))
    assert (uses.of("tiny:latest"), uses.version, history.waiting) == (None, 0, 1)


async def test_the_next_daemon_knows_the_hour_and_the_sums(history: History) -> None:
    before = ModelUses(history.add, now_s=lambda: NOW_S)
    before.keep(ended())
    before.keep(ended(ts=NOW - timedelta(hours=2)))
    before.keep(ended(model="old", ts=NOW - timedelta(days=200)))
    before.keep(ended(model="nowhere", effective_target=None))
    await history.flush()
    uses = ModelUses(history.add, now_s=lambda: NOW_S)
    await uses.seed(history.store)
    hour = NOW_S - NOW_S % 3600
    assert uses.of("tiny:latest") == ModelUse(hour, 2, 6, 10)
    old = int((NOW - timedelta(days=200)).timestamp())
    assert uses.of("old:latest") == ModelUse(old - old % 3600, 0, 0, 0)
    assert uses.of("nowhere:latest") is None


async def test_what_is_older_than_a_day_is_counted_no_longer(history: History) -> None:
    now = NOW_S
    uses = ModelUses(history.add, now_s=lambda: now)
    uses.keep(ended())
    now += 24 * 3600
    assert uses.of("tiny:latest") == ModelUse(NOW_S, 1, 3, 5)
    now += 3600
    assert uses.of("tiny:latest") == ModelUse(NOW_S, 0, 0, 0)


async def test_the_number_of_models_is_bounded(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "_MOST_MODELS", 2)
    uses = ModelUses(history.add, now_s=lambda: NOW_S)
    for name in ("a", "b", "c", "a"):
        uses.keep(ended(model=name))
    assert uses.of("c:latest") is None
    assert uses.of("a:latest") == ModelUse(NOW_S, 2, 6, 10)


async def test_a_store_that_cannot_be_read_leaves_it_unknown(history: History) -> None:
    class Unreadable:
        async def model_use(self, **_: Any) -> Any:
            raise RegistryUnwritableError("moved")

    uses = ModelUses(history.add, now_s=lambda: NOW_S)
    store: Any = Unreadable()
    await uses.seed(store)
    assert uses.of("tiny:latest") is None
