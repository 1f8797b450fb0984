# ruff: noqa: ASYNC220, ASYNC221, ASYNC240, ASYNC251  (a test's loop has nothing else to do meanwhile)
from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from manager.adapters.registry import SqlRegistry, log, open_registry, opening, tables
from manager.adapters.registry.migrate import migrate, migration_config
from manager.adapters.registry.postgres import PostgresDatabase
from manager.adapters.registry.sql import KEPT_EVENTS
from manager.domain.benchmark_results import Benchmark, BenchmarkStatus
from manager.domain.benchmarks import Sample
from manager.domain.benchmarks import Target as Measured
from manager.domain.drained import Drained, drained_from
from manager.domain.history import Filters
from manager.domain.idle import UsageSample
from manager.domain.instance import Target
from manager.domain.registry import Event, InstanceRow, LearnedSize, Operation, OrderKind
from manager.domain.runs import Run, RunCaller, RunError, RunResult, RunStatus, is_of
from manager.errors import ConflictError, RegistryCorruptError, RegistryUnwritableError
from tests.support.keys import grant
from tests.support.runs import a_run
from tests.support.users import give

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.support.postgres import Postgres

NOW = datetime(2026, 8, 1, 12, 30, 15, 123456, tzinfo=UTC)
FULL_ROW = InstanceRow(
    id="gpu0",
    target=Target.RUNNING,
    operation=Operation.START,
    ttl_s=0.5,
    pinned=False,
    starts=7,
    loopback_port=41000,
    last_used_at=NOW,
    recreated_at=NOW - timedelta(minutes=10),
    usage=UsageSample(
        at=1785587415.25,
        network_bytes=2**40,
        own_bytes=12,
        cpu_s=3.5,
        expirations=(("qwen3:latest", NOW.astimezone(timezone(timedelta(hours=2)))), ("llama3", None)),
    ),
)


def event(number: int) -> Event:
    return Event(number, NOW, "gpu0", "ContainerDied", "container_exited", f"number {number}")


# The tables of revisions later than 0007.
NEWEST = (
    *("keys", "ledger", "ledger_days", "usage_hours", "usage_days", "gpu_minutes", "benchmarks"),
    *("changes", "documents", "key_uses"),
)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@dataclass(frozen=True)
class Made:
    """A new registry, made once because that starts a process, and what was seen while it was made."""

    path: Path
    modes: dict[str, int]
    modules: set[str]


_MAKE = """
import asyncio, json, sys
from pathlib import Path
from manager.adapters.registry import open_registry
async def main():
    path = Path(sys.argv[1])
    registry = await open_registry(path)
    modes = {each.name: each.stat().st_mode & 0o7777 for each in (path.parent, *path.parent.iterdir())}
    await registry.close()
    print(json.dumps([modes, list(sys.modules)]))
asyncio.run(main())
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("made") / "some" / "state" / "registry.sqlite3"
    argv = [sys.executable, "-W", "error", "-c", _MAKE, str(path)]
    modes, modules = json.loads(subprocess.run(argv, check=True, timeout=60, capture_output=True).stdout)
    return Made(path, modes, set(modules))


@pytest.fixture(scope="session")
def fresh(made: Made) -> Path:
    return made.path


@pytest.fixture
def path(fresh: Path, tmp_path: Path) -> Path:
    path = tmp_path / "state" / "registry.sqlite3"
    path.parent.mkdir()
    shutil.copy(fresh, path)
    return path


@pytest.fixture(scope="session")
def killed(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a registry whose writer was killed; its log has at least 100 transactions."""
    path = tmp_path_factory.mktemp("killed") / "registry.sqlite3"
    shutil.copy(fresh, path)
    kill_in_write_loop(path)
    return path.parent


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """A registry that was left by a writer that was killed."""
    return shutil.copytree(killed, tmp_path / "left") / "registry.sqlite3"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What a registry does it does in PostgreSQL too; tests that look into the file have only that."""
    arguments = inspect.signature(metafunc.function).parameters
    if "registry" in arguments:
        kinds = ["file"] if "path" in arguments else ["file", "postgresql"]
        metafunc.parametrize("registry", kinds, indirect=True)


@pytest.fixture
async def registry(path: Path, request: pytest.FixtureRequest) -> AsyncIterator[SqlRegistry]:
    shared = None
    if request.param == "postgresql":
        shared = PostgresDatabase(request.getfixturevalue("postgres").database())
    registry = await open_registry(path, busy_timeout_s=0.05, shared=shared)
    yield registry
    await registry.close()


SAMPLES = (
    Sample("w", "p", "cpu", "tiny:latest", ok=True, ttft_ms=12.5, tokens_per_s=3.0, quality=0.5),
    Sample("w", "p", "cpu", "tiny:latest", ok=False, error="half a character: \ud800"),
)


def a_benchmark(number: int, status: str = "succeeded") -> Benchmark:
    one = Benchmark(
        number=number,
        id=f"bench_{number}",
        status=BenchmarkStatus(status),
        source="local",
        project="default",
        workloads=("w",),
        targets=(Measured("cpu", "tiny:latest"),),
        repeat=2,
        total=2,
        created_at=NOW,
        ended_at=NOW,
        error="why",
    )
    return one.measured(SAMPLES)


async def test_a_benchmark_is_read_as_it_was_saved(registry: SqlRegistry) -> None:
    assert (await registry.benchmarks(), await registry.last_benchmark()) == ((), 0)
    await registry.save_benchmark(a_benchmark(1, "running"), (), 9)
    one = a_benchmark(1)
    await registry.save_benchmark(one, SAMPLES, 9)
    assert await registry.benchmarks() == (one,)
    found = await registry.benchmark("bench_1")
    assert found is not None
    assert found[0] == one
    assert found[1] == (SAMPLES[0], replace(SAMPLES[1], error="half a character: \\ud800"))
    await registry.forget_benchmark("bench_1")
    assert await registry.benchmark("bench_1") is None


async def test_the_oldest_benchmarks_that_have_ended_are_forgotten(registry: SqlRegistry) -> None:
    await registry.save_benchmark(a_benchmark(1, "queued"), (), 2)
    for number in range(2, 6):
        await registry.save_benchmark(a_benchmark(number), SAMPLES, 2)
    assert [one.number for one in await registry.benchmarks()] == [5, 4, 1]
    assert await registry.last_benchmark() == 5


async def test_a_benchmark_that_cannot_be_read_is_corruption(registry: SqlRegistry, path: Path) -> None:
    await registry.save_benchmark(a_benchmark(1), SAMPLES, 9)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE benchmarks SET groups = '{'")
    with pytest.raises(RegistryCorruptError):
        await registry.benchmarks()


async def test_a_registry_of_a_dry_run_reads_everything_and_stores_nothing(path: Path) -> None:
    registry = await open_registry(path)
    await registry.save_instance(FULL_ROW)
    await registry.save_benchmark(a_benchmark(1), SAMPLES, 9)
    await registry.close()
    with closing(sqlite3.connect(path)) as database:
        before = list(database.iterdump())
    registry = await open_registry(path, stores=False)
    assert await registry.instances() == {"gpu0": FULL_ROW}
    await registry.save_instance(replace(FULL_ROW, starts=8))
    await registry.save_pin_and_ttl("gpu0", {"pinned": None})
    await registry.add_bindings({"gpu0": "GPU-1"})
    await registry.append_events([Event(1, NOW, None, "engine_up", None, "")])
    await registry.save_learned_size(LearnedSize("gpu0", "m", "d", 1, NOW))
    await registry.save_overrides({"roles.a.model": "m"})
    await registry.save_model_list("v", [{"name": "m"}])
    await registry.save_run(a_run())
    assert await registry.forget_runs(NOW, 0) == ()
    await registry.save_order("gpu0", OrderKind.DRAINED, Drained(NOW).stored())
    await registry.end_order("gpu0", OrderKind.DRAINED, NOW)
    await registry.save_benchmark(a_benchmark(2), SAMPLES, 1)
    await registry.forget_benchmark("bench_1")
    await registry.close()
    with closing(sqlite3.connect(path)) as database:
        assert list(database.iterdump()) == before


# What it keeps


@pytest.mark.parametrize("row", [FULL_ROW, InstanceRow("gpu0"), InstanceRow("gpu0", pinned=True, ttl_s=0.0)])
async def test_an_instance_comes_back_as_it_was_saved(path: Path, row: InstanceRow) -> None:
    registry = await open_registry(path)
    await registry.save_instance(row)
    assert await registry.instances() == {"gpu0": row}
    await registry.close()
    registry = await open_registry(path)
    assert await registry.instances() == {"gpu0": row}
    await registry.close()


FULL_RUN = Run(
    number=7,
    id="run_7",
    status=RunStatus.FAILED,
    path="/api/chat",
    model="tiny",
    lane="deep-rca",
    caller=RunCaller("alpha", "why", "gpu0", True, ("a" * 32, "b" * 16, "01"), "ci"),
    idempotent=True,
    expires_s=60.5,
    body_bytes=12,
    created_at=NOW,
    started_at=NOW,
    ended_at=NOW,
    expires_at=NOW,
    executions=2,
    instance="gpu0",
    request_id="r1",
    error=RunError("upstream_error", "no"),
    result=RunResult(500, "application/json", 17),
)


@pytest.mark.parametrize("run", [FULL_RUN, a_run()])
async def test_a_run_comes_back_as_it_was_saved(path: Path, run: Run) -> None:
    registry = await open_registry(path)
    await registry.save_run(run)
    await registry.close()
    registry = await open_registry(path)
    assert await registry.run(run.id) == run
    assert await registry.run("run_0") is None
    await registry.close()


async def test_a_later_state_of_a_run_replaces_the_earlier_one(registry: SqlRegistry) -> None:
    await registry.save_run(a_run())
    await registry.save_run(replace(a_run(), status=RunStatus.CANCELLED, ended_at=NOW))
    (run,) = await registry.runs(None, None)
    assert (run.status, run.ended_at) == (RunStatus.CANCELLED, NOW)


async def test_runs_are_listed_newest_first_by_status_and_up_to_a_limit(registry: SqlRegistry) -> None:
    for number in range(1, 5):
        status = RunStatus.QUEUED if number % 2 else RunStatus.RUNNING
        await registry.save_run(a_run(number, status=status))
    assert [run.number for run in await registry.runs(None, None)] == [4, 3, 2, 1]
    assert [run.number for run in await registry.runs(RunStatus.QUEUED, None)] == [3, 1]
    assert [run.number for run in await registry.runs(None, 1)] == [4]


async def test_the_runs_of_a_key_are_those_that_it_has_submitted(registry: SqlRegistry) -> None:
    ci = replace(grant("ci"), created_at=NOW)
    callers = [RunCaller("default", key=name) for name in ("ci", "other", None, "ci", "ci")]
    for number, caller in enumerate(callers, 1):
        await registry.save_run(a_run(number, caller=caller))
    # One of an earlier key of that name.
    await registry.save_run(a_run(6, caller=callers[0], created_at=NOW - timedelta(microseconds=1)))
    assert [run.number for run in await registry.runs(None, None, ci)] == [5, 4, 1]
    assert [run.number for run in await registry.runs(RunStatus.QUEUED, 2, ci)] == [5, 4]
    assert await registry.runs(RunStatus.RUNNING, None, ci) == ()
    for run in await registry.runs(None, None):
        assert is_of(run, ci) is (run.number in (5, 4, 1))


async def test_a_run_of_an_earlier_version_has_no_key(path: Path) -> None:
    registry = await open_registry(path)
    await registry.save_run(a_run())
    await registry.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE runs SET caller = json_remove(caller, '$.key')")
    registry = await open_registry(path)
    assert await registry.run(a_run().id) == a_run()
    await registry.close()


async def test_results_are_due_at_their_time_and_the_next_one_is_known(registry: SqlRegistry) -> None:
    assert await registry.next_run_expiry() is None
    later = NOW + timedelta(seconds=1)
    for number, status in enumerate(RunStatus, 1):
        await registry.save_run(a_run(number, status=status, ended_at=NOW, expires_at=later))
    assert await registry.due_runs(NOW, 10) == ()
    assert {run.status for run in await registry.due_runs(later, 10)} == {
        RunStatus.SUCCEEDED,
        RunStatus.FAILED,
    }
    assert len(await registry.due_runs(later, 1)) == 1
    assert await registry.next_run_expiry() == later


async def test_runs_that_ended_long_ago_or_are_too_many_are_forgotten(registry: SqlRegistry) -> None:
    old = NOW - timedelta(days=1)
    for number in range(1, 9):
        ended_at = old if number < 3 else NOW
        await registry.save_run(a_run(number, status=RunStatus.EXPIRED, ended_at=ended_at))
    for number in (9, 10):
        await registry.save_run(a_run(number, status=RunStatus.QUEUED))
    forgotten = await registry.forget_runs(NOW, 4)
    assert sorted(run.number for run in forgotten) == [1, 2, 3, 4]
    assert [run.number for run in await registry.runs(None, None)] == [10, 9, 8, 7, 6, 5]
    assert await registry.forget_runs(NOW, 4) == ()


async def test_saving_an_instance_replaces_all_of_it(registry: SqlRegistry) -> None:
    await registry.save_instance(FULL_ROW)
    await registry.save_instance(InstanceRow("cpu"))
    await registry.save_instance(InstanceRow("gpu0", starts=8))
    # Gateways that share a database have one port for an instance, the first one.
    port = None if registry.gateway is None else FULL_ROW.loopback_port
    assert await registry.instances() == {
        "cpu": InstanceRow("cpu"),
        "gpu0": InstanceRow("gpu0", starts=8, loopback_port=port),
    }


async def test_a_pin_and_a_ttl_are_stored_by_themselves(registry: SqlRegistry) -> None:
    await registry.save_pin_and_ttl("cpu", {"pinned": True})
    await registry.save_pin_and_ttl("cpu", {"ttl_s": 5.0})
    assert await registry.pins_and_ttls() == {"cpu": {"pinned": True, "ttl_s": 5.0}}
    assert await registry.instances() == {"cpu": InstanceRow("cpu", pinned=True, ttl_s=5.0)}
    await registry.save_instance(InstanceRow("cpu", pinned=True, ttl_s=5.0, starts=3))
    await registry.save_pin_and_ttl("cpu", {"ttl_s": None})
    assert await registry.instances() == {"cpu": InstanceRow("cpu", pinned=True, starts=3)}


async def test_an_order_whose_time_has_passed_is_forgotten_unless_it_was_changed(
    registry: SqlRegistry,
) -> None:
    order = Drained(NOW, NOW + timedelta(hours=1), "repair")
    await registry.save_order("gpu0", OrderKind.DRAINED, order.stored())
    for other in (NOW, NOW + timedelta(hours=2)):
        await registry.end_order("gpu0", OrderKind.DRAINED, other)
    await registry.end_order("nas", OrderKind.DRAINED, NOW + timedelta(hours=1))
    await registry.end_order("gpu0", OrderKind.LIFTED, NOW + timedelta(hours=1))
    assert await registry.orders(OrderKind.DRAINED, drained_from) == {"gpu0": order}
    await registry.end_order("gpu0", OrderKind.DRAINED, NOW + timedelta(hours=1))
    assert await registry.orders(OrderKind.DRAINED, drained_from) == {}


async def test_what_goes_on_at_one_gateway_is_no_row_of_another(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    one, other = [
        await open_registry(tmp_path / name / "registry.sqlite3", shared=PostgresDatabase(url))
        for name in ("one", "other")
    ]
    await one.save_instance(FULL_ROW)
    port = FULL_ROW.loopback_port
    assert await other.instances() == {"gpu0": InstanceRow("gpu0", loopback_port=port)}
    await one.save_pin_and_ttl("gpu0", {"pinned": True, "ttl_s": 0.0})
    await other.save_instance(InstanceRow("gpu0", starts=2, loopback_port=5))
    common = {"pinned": True, "ttl_s": 0.0, "loopback_port": port}
    assert await other.instances() == {"gpu0": InstanceRow("gpu0", starts=2, **common)}  # type: ignore[arg-type]
    assert await one.instances() == {"gpu0": replace(FULL_ROW, **common)}  # type: ignore[arg-type]
    for registry in (one, other):
        await registry.close()


async def test_times_are_stored_as_utc_and_come_back_aware(registry: SqlRegistry, path: Path) -> None:
    tokyo = NOW.astimezone(timezone(timedelta(hours=9)))
    await registry.save_instance(InstanceRow("gpu0", last_used_at=tokyo))
    read = (await registry.instances())["gpu0"].last_used_at
    assert read == tokyo
    assert read is not None
    assert read.tzinfo is UTC
    with closing(sqlite3.connect(path)) as connection:
        stored = connection.execute("SELECT last_used_at FROM instances").fetchone()
    assert stored == ("2026-08-01 12:30:15.123456",)


async def test_a_time_without_a_zone_is_refused(registry: SqlRegistry) -> None:
    with pytest.raises(ValueError, match="has no time zone"):
        await registry.save_instance(InstanceRow("gpu0", last_used_at=NOW.replace(tzinfo=None)))
    assert await registry.instances() == {}


async def test_bindings_add_up_and_never_move(registry: SqlRegistry) -> None:
    assert await registry.bindings() == {}
    await registry.add_bindings({"gpu0": "GPU-a"})
    await registry.add_bindings({"gpu0": "GPU-a", "gpu1": "GPU-b"})
    with pytest.raises(ValueError, match="gpu1 is bound to GPU-b, it never moves to GPU-c"):
        await registry.add_bindings({"gpu2": "GPU-d", "gpu1": "GPU-c"})
    assert await registry.bindings() == {"gpu0": "GPU-a", "gpu1": "GPU-b"}
    await registry.add_bindings({})
    assert await registry.bindings() == {"gpu0": "GPU-a", "gpu1": "GPU-b"}


async def test_events_are_read_in_order_from_any_id(registry: SqlRegistry) -> None:
    assert await registry.last_event_id() == 0
    assert await registry.events_after(0, 10) == ()
    bare = Event(4, NOW, None, "EngineLost", None, "")
    await registry.append_events([event(1), event(2)])
    await registry.append_events([bare])
    assert await registry.events_after(0, 10) == (event(1), event(2), bare)
    assert await registry.events_after(1, 1) == (event(2),)
    assert await registry.events_after(2, 10) == (bare,)
    assert await registry.events_after(4, 10) == ()
    assert await registry.events_after(0, 0) == ()
    assert await registry.last_event_id() == 4


@pytest.mark.parametrize("numbers", [(5,), (3,), (6, 6), (7, 6)])
async def test_an_event_id_is_never_used_twice(registry: SqlRegistry, numbers: tuple[int, ...]) -> None:
    await registry.append_events([event(5)])
    with pytest.raises(ValueError, match="does not come after"):
        await registry.append_events([event(number) for number in numbers])
    assert await registry.events_after(0, 10) == (event(5),)


async def test_appending_no_event_changes_nothing(registry: SqlRegistry) -> None:
    await registry.append_events([])
    assert await registry.last_event_id() == 0


async def test_only_the_newest_events_are_kept(registry: SqlRegistry) -> None:
    await registry.append_events([event(2 * number) for number in range(1, KEPT_EVENTS + 1)])
    assert len(await registry.events_after(0, 2 * KEPT_EVENTS)) == KEPT_EVENTS
    await registry.append_events([event(30_001), event(30_002), event(30_005)])
    kept = await registry.events_after(0, 2 * KEPT_EVENTS)
    assert len(kept) == KEPT_EVENTS == 10_000
    assert (kept[0].id, kept[-1].id) == (8, 30_005)
    assert await registry.last_event_id() == 30_005


async def test_an_order_of_each_kind_is_kept_for_each_instance_until_it_is_forgotten(
    registry: SqlRegistry,
) -> None:
    drained = Drained(NOW, NOW + timedelta(hours=1), "driver update", stops=False, ran=True)
    await registry.save_order("gpu0", OrderKind.DRAINED, Drained(NOW).stored())
    await registry.save_order("gpu0", OrderKind.DRAINED, drained.stored())
    await registry.save_order("nas", OrderKind.DRAINED, Drained(NOW).stored())
    await registry.save_order("gpu0", OrderKind.LIFTED, {"until": "x"})
    assert await registry.orders(OrderKind.DRAINED, drained_from) == {"gpu0": drained, "nas": Drained(NOW)}
    await registry.save_order("gpu0", OrderKind.DRAINED, None)
    await registry.save_order("gpu0", OrderKind.DRAINED, None)
    assert await registry.orders(OrderKind.DRAINED, drained_from) == {"nas": Drained(NOW)}
    assert await registry.orders(OrderKind.LIFTED, dict) == {"gpu0": {"until": "x"}}


async def test_an_order_that_cannot_be_read_is_refused_and_not_reset(registry: SqlRegistry) -> None:
    await registry.save_order("gpu0", OrderKind.DRAINED, {"since": "yesterday"})
    with pytest.raises(RegistryCorruptError, match="a row in it cannot be read"):
        await registry.orders(OrderKind.DRAINED, drained_from)


async def test_a_learned_size_is_kept_once_for_instance_model_and_digest(registry: SqlRegistry) -> None:
    size = LearnedSize("gpu0", "qwen3", "sha256:a", 6 * 2**30, NOW)
    others = [
        LearnedSize("gpu1", "qwen3", "sha256:a", 1, NOW),
        LearnedSize("gpu0", "llama3", "sha256:a", 2, NOW),
        LearnedSize("gpu0", "qwen3", "sha256:b", 3, NOW),
    ]
    for each in (size, *others):
        await registry.save_learned_size(each)
    newer = LearnedSize("gpu0", "qwen3", "sha256:a", 7 * 2**30, NOW + timedelta(hours=1))
    await registry.save_learned_size(newer)
    assert set(await registry.learned_sizes()) == {newer, *others}


OVERRIDES = {
    "roles.output.model": "qwen3:8b",
    "roles.output.think": False,
    "roles.output.body.defaults": {"options": {"temperature": 0.5, "stop": ["\n"]}, "ünïcode": None},
    "roles.output.fallbacks": [],
}


async def test_overrides_are_replaced_as_a_whole_and_come_back_as_they_were(path: Path) -> None:
    registry = await open_registry(path)
    assert await registry.overrides() == {}
    await registry.save_overrides(OVERRIDES)
    await registry.close()
    registry = await open_registry(path)
    assert await registry.overrides() == OVERRIDES
    await registry.save_overrides({"a": [1]})
    await registry.save_overrides({"a": [True]})
    assert repr(await registry.overrides()) == "{'a': [True]}"
    await registry.save_overrides({})
    assert await registry.overrides() == {}
    await registry.close()


async def test_an_override_that_stays_keeps_its_time(registry: SqlRegistry, path: Path) -> None:
    def times() -> dict[str, str]:
        with closing(sqlite3.connect(path)) as connection:
            return dict(connection.execute("SELECT key, saved_at FROM overrides"))

    await registry.save_overrides({"a": 1, "b": 1})
    first = times()
    await registry.save_overrides({"a": 1, "b": 2, "c": 3})
    second = times()
    assert second["a"] == first["a"]
    assert second["c"] == second["b"] > first["b"]


async def test_overrides_are_those_that_were_stored_whatever_form_numbers_come_back_in(
    registry: SqlRegistry,
) -> None:
    stored = {"a": 120.0, "b": 1, "c": True, "d": [45.0, 60], "e": None, "f": 0.5}
    await registry.save_overrides(stored, was={})
    await registry.save_overrides(stored | {"a": 30.0}, was=stored)
    with pytest.raises(ConflictError):
        await registry.save_overrides({}, was=stored | {"a": 30.0, "b": True})


async def test_overrides_that_cannot_be_stored_leave_the_old_ones(registry: SqlRegistry) -> None:
    await registry.save_overrides(OVERRIDES)
    with pytest.raises(TypeError, match="not JSON serializable"):
        await registry.save_overrides({"a": 1, "b": object()})
    assert await registry.overrides() == OVERRIDES


async def test_the_models_of_a_volume_are_those_last_read(registry: SqlRegistry) -> None:
    assert await registry.model_lists() == {}
    entry = {"name": "bge-m3:latest", "size": 1_157_672_605, "details": {"families": ["bert"]}}
    await registry.save_model_list("ollama-models", ({"name": "qwen3:8b"}, {"name": "bge-m3:latest"}))
    await registry.save_model_list("/srv/models", ())
    await registry.save_model_list("ollama-models", (entry,))
    assert await registry.model_lists() == {"ollama-models": (entry,), "/srv/models": ()}


@pytest.mark.parametrize("entries", ["{", "{}", '["tiny"]', "null"])
async def test_a_list_of_models_that_is_none_is_corruption(
    registry: SqlRegistry, path: Path, entries: str
) -> None:
    await registry.save_model_list("ollama-models", ())
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE model_lists SET entries = ?", (entries,))
    with pytest.raises(RegistryCorruptError, match="a row in it cannot be read"):
        await registry.model_lists()


async def test_calls_of_many_tasks_do_not_get_in_each_others_way(registry: SqlRegistry) -> None:
    await asyncio.gather(*(registry.save_instance(InstanceRow(f"i{n}", starts=n)) for n in range(50)))
    rows = await registry.instances()
    assert {row.starts for row in rows.values()} == set(range(50))


async def test_a_cancelled_write_happened_completely_or_not_at_all(registry: SqlRegistry) -> None:
    first = asyncio.ensure_future(registry.append_events([event(n) for n in range(1, 2001)]))
    second = asyncio.ensure_future(registry.append_events([event(n) for n in range(2001, 4001)]))
    await asyncio.sleep(0)
    second.cancel()
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert len(await registry.events_after(0, 9999)) in {0, 2000, 4000}


# How it is made


def test_a_new_registry_is_its_owners_alone(made: Made) -> None:
    assert made.modes == {
        "state": 0o700,
        "registry.sqlite3": 0o600,
        "registry.sqlite3-wal": 0o600,
        "registry.sqlite3-shm": 0o600,
    }
    assert [each.name for each in made.path.parent.iterdir()] == ["registry.sqlite3"]


def test_making_a_registry_costs_the_daemon_neither_alembic_nor_an_orm(made: Made) -> None:
    assert "sqlalchemy" in made.modules
    assert not made.modules & {"alembic", "mako", "sqlalchemy.orm"}
    assert not made.modules & {"psycopg", "sqlalchemy.dialects.postgresql"}, "they are for a shared database"


async def test_every_commit_is_synced_to_a_write_ahead_log(registry: SqlRegistry, path: Path) -> None:
    def pragmas() -> list[object]:
        with registry._own._reads.connect() as connection:
            names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert await registry._own._call(pragmas) == ["wal", 2, 1, 50]


def test_the_known_revisions_are_those_of_the_migrations() -> None:
    scripts = ScriptDirectory.from_config(migration_config())
    assert scripts.get_current_head() == tables.HEAD
    assert tuple(script.revision for script in scripts.walk_revisions())[::-1] == tables.REVISIONS


def test_the_migrations_lead_to_the_tables(fresh: Path, tmp_path: Path) -> None:
    migrated = tmp_path / "migrated"
    migrated.touch()
    migrate(migrated)
    assert schema(migrated) == schema(fresh)
    engine = create_engine(f"sqlite:///{migrated}")
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, tables.metadata) == []
    engine.dispose()


def schema(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        statements = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {"".join(statement.split()) for (statement,) in statements}


async def test_a_registry_of_the_newest_schema_is_opened_without_alembic(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    await (await open_registry(path)).close()


async def test_a_registry_of_the_first_schema_is_brought_up_to_date_and_keeps_what_it_has(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await open_registry(path)
    await registry.save_instance(FULL_ROW)
    await registry.append_events([event(1)])
    await registry.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in ("overrides", "model_lists", "operator_state", "requests", "runs", *NEWEST):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("ALTER TABLE learned_sizes DROP COLUMN by_card")
    set_revision(path, "0001")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    registry = await open_registry(path)
    assert await registry.instances() == {"gpu0": FULL_ROW}
    assert await registry.events_after(0, 10) == (event(1),)
    await registry.save_overrides(OVERRIDES)
    await registry.save_model_list("ollama-models", ({"name": "qwen3:8b"},))
    await registry.close()
    assert opening.verify(path) == tables.HEAD == "0013"


async def test_names_of_models_of_the_second_schema_become_entries(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE operator_state")
        connection.execute("DROP TABLE requests")
        connection.execute("ALTER TABLE model_lists RENAME COLUMN entries TO names")
        connection.execute("ALTER TABLE learned_sizes DROP COLUMN by_card")
        for table in ("runs", *NEWEST):
            connection.execute(f"DROP TABLE {table}")
        connection.execute(
            "INSERT INTO model_lists VALUES ('ollama-models', '[\"qwen3:8b\", \"tiny\"]', '2026-01-01'),"
            " ('/srv/models', '[]', '2026-01-01')"
        )
    set_revision(path, "0002")
    registry = await open_registry(path)
    lists = await registry.model_lists()
    await registry.close()
    assert lists == {"ollama-models": ({"name": "qwen3:8b"}, {"name": "tiny"}), "/srv/models": ()}


async def test_a_learned_size_of_the_third_schema_is_one_of_a_single_card(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in ("operator_state", "requests", "runs", *NEWEST):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("ALTER TABLE learned_sizes DROP COLUMN by_card")
        connection.execute("INSERT INTO learned_sizes VALUES ('gpu0', 'm', 'd', 7, '2026-01-01 00:00:00')")
    set_revision(path, "0003")
    registry = await open_registry(path)
    (size,) = await registry.learned_sizes()
    assert (size.vram_bytes, size.by_card) == (7, {})
    await registry.save_learned_size(replace(size, vram_bytes=9, by_card={"GPU-a": 5, "GPU-b": 4}))
    (size,) = await registry.learned_sizes()
    await registry.close()
    assert (size.vram_bytes, size.by_card) == (9, {"GPU-a": 5, "GPU-b": 4})


@pytest.mark.parametrize("shares", ["[1]", '{"GPU-a": "5"}', '{"GPU-a": true}'])
async def test_shares_of_cards_that_are_no_numbers_are_a_row_that_cannot_be_read(
    path: Path, shares: str
) -> None:
    registry = await open_registry(path)
    await registry.save_learned_size(LearnedSize("gpu0", "m", "d", 1, NOW))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE learned_sizes SET by_card = ?", (shares,))
    with pytest.raises(RegistryCorruptError, match="no numbers by card"):
        await registry.learned_sizes()
    await registry.close()


async def test_a_failed_migration_leaves_the_file_as_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_revision(path, "0000")
    monkeypatch.setattr(opening, "REVISIONS", ("0000", *tables.REVISIONS))
    before = digests(path.parent)
    with pytest.raises(RegistryUnwritableError, match=r"could not be brought to schema .*0000"):
        await open_registry(path)
    assert digests(path.parent) == before


def set_revision(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))


# What cannot be used is left alone


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(8192))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def header_only(path: Path) -> None:
    os.truncate(path, 16)


def overwritten_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)


def other_program(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE songs (title)")


def newer_version(path: Path) -> None:
    set_revision(path, "9999")


def no_revision(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM alembic_version")


def bad_log(path: Path) -> None:
    Path(f"{path}-wal").write_bytes(b"no log at all" * 1000)


def lost_file(path: Path) -> None:
    Path(f"{path}-wal").write_bytes(b"\x37\x7f\x06\x82" + os.urandom(4200))
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (garbage, "it is not an SQLite database"),
        (empty, "it is empty"),
        (truncated, "malformed"),
        (header_only, "not a database"),
        (overwritten_page, "malformed"),
        (other_program, "it is a database of some other program"),
        (newer_version, "it was written by a newer version"),
        (no_revision, "it names 0 revisions"),
        (bad_log, "its write-ahead log"),
        (lost_file, "it is missing, but what was last written to it is in"),
    ],
)
@pytest.mark.parametrize("wholly_checked_bytes", [2**26, 0])
async def test_a_damaged_registry_is_refused_and_left_byte_for_byte(
    path: Path,
    damage: Callable[[Path], None],
    problem: str,
    wholly_checked_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "_WHOLLY_CHECKED_BYTES", wholly_checked_bytes)
    damage(path)
    before = digests(path.parent)
    with pytest.raises(RegistryCorruptError) as caught:
        await open_registry(path)
    assert digests(path.parent) == before
    assert str(path) in caught.value.message
    assert problem in caught.value.message
    assert "mv -n " in caught.value.message


async def test_the_history_in_a_large_registry_is_not_checked_at_each_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'requests'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(RegistryCorruptError):
        opening.verify(path)
    monkeypatch.setattr(opening, "_WHOLLY_CHECKED_BYTES", 0)
    registry = await open_registry(path)
    await registry.save_instance(FULL_ROW)
    history = registry.requests()
    with pytest.raises(RegistryCorruptError):
        await history.last(Filters(), 1)
    await history.close()
    await registry.close()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x40]))


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


_PAGE = 4096
_FRAME = _PAGE + 24


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        *(
            (functools.partial(flip, at=at), "the header of its write-ahead log")
            for at in (0, 3, 4, 7, 9, 13, 16, 22, 24, 31)
        ),
        (functools.partial(cut, size=31), "the header of its write-ahead log"),
        (functools.partial(cut, size=5), "the header of its write-ahead log"),
        (lambda wal: wal.write_bytes(bytes(32) + wal.read_bytes()[32:]), "the header of its write-ahead log"),
        (lambda wal: wal.write_bytes(bytes(_FRAME) + wal.read_bytes()[_FRAME:]), "the header of its"),
        (functools.partial(flip, at=32 + 24 + 100), "is damaged behind 0 pages, and goes on after that"),
        (functools.partial(flip, at=32 + 5 * _FRAME + 1000), "is damaged behind "),
        (functools.partial(flip, at=32 + 5 * _FRAME + 20), "is damaged behind "),
    ],
)
async def test_a_log_that_sqlite_would_drop_without_a_word_is_refused_and_left(
    left: Path, damage: Callable[[Path], None], problem: str
) -> None:
    damage(Path(f"{left}-wal"))
    before = digests(left.parent)
    with pytest.raises(RegistryCorruptError, match=problem):
        await open_registry(left)
    assert digests(left.parent) == before


@pytest.mark.parametrize("page_size", [0, 100, 4097, 2**17])
async def test_a_page_size_that_cannot_be_is_refused_although_its_checksum_fits(
    left: Path, page_size: int
) -> None:
    wal = Path(f"{left}-wal")
    start = struct.pack(">6I", 0x377F0683, 3007000, page_size, 0, 1, 2)
    end = struct.pack(">2I", *log._checksum(start, big_endian=True))
    wal.write_bytes(start + end + wal.read_bytes()[32:])
    with pytest.raises(RegistryCorruptError, match="the header of its write-ahead log"):
        await open_registry(left)


@pytest.mark.parametrize(
    "harmless",
    [
        lambda wal: cut(wal, 0),
        lambda wal: wal.write_bytes(bytes(32)),
        lambda wal: wal.write_bytes(bytes(5 * _FRAME)),
        lambda wal: cut(wal, 32),
        lambda wal: cut(wal, wal.stat().st_size - 1),
        lambda wal: cut(wal, 32 + 5 * _FRAME + 100),
        lambda wal: flip(wal, -10),
    ],
)
async def test_a_log_that_was_never_finished_is_no_damage(
    left: Path, harmless: Callable[[Path], None]
) -> None:
    harmless(Path(f"{left}-wal"))
    registry = await open_registry(left)
    await registry.save_instance(FULL_ROW)
    await registry.close()


async def test_frames_of_an_older_generation_behind_the_newest_are_no_damage(
    registry: SqlRegistry, path: Path, tmp_path: Path
) -> None:
    for number in range(1, 30):
        await registry.append_events([event(number)])
    wal = Path(f"{path}-wal")
    before = wal.read_bytes()
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(RESTART)")
    await registry.append_events([event(30)])
    after = wal.read_bytes()
    assert after[16:24] != before[16:24]
    assert len(after) == len(before)
    copy = shutil.copytree(path.parent, tmp_path / "copy") / path.name
    opened = await open_registry(copy)
    assert await opened.last_event_id() == 30
    await opened.close()


async def test_a_damaged_registry_with_a_log_is_left_byte_for_byte(path: Path) -> None:
    kill_in_write_loop(path)
    assert Path(f"{path}-wal").stat().st_size > 0
    overwritten_page(path)
    truncated(path)
    before = digests(path.parent)
    assert set(before) >= {"registry.sqlite3", "registry.sqlite3-wal", "registry.sqlite3-shm"}
    with pytest.raises(RegistryCorruptError):
        await open_registry(path)
    assert digests(path.parent) == before


async def test_the_printed_command_sets_everything_aside(path: Path) -> None:
    odd = path.parent.parent / "it's a state"
    path.parent.rename(odd)
    path = odd / path.name
    kill_in_write_loop(path)
    garbage(path)
    before = digests(odd)
    with pytest.raises(RegistryCorruptError) as caught:
        await open_registry(path)
    command = caught.value.details["command"]
    assert isinstance(command, str)
    assert caught.value.message.endswith(command)
    subprocess.run(["/bin/sh", "-c", command], check=True, timeout=60)
    assert sorted(digests(odd).values()) == sorted(before.values())
    assert all(name.startswith("registry.sqlite3.corrupt-2") for name in digests(odd))


async def test_a_row_that_cannot_be_read_is_corruption(registry: SqlRegistry, path: Path) -> None:
    await registry.save_instance(FULL_ROW)
    for change in (
        "target = 'flying'",
        "target = 'running', usage = '{}'",
        "usage = '{', last_used_at = NULL",
    ):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(f"UPDATE instances SET {change}")
        with pytest.raises(RegistryCorruptError, match="a row in it cannot be read"):
            await registry.instances()


async def test_a_missing_table_is_corruption(registry: SqlRegistry, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE events")
    with pytest.raises(RegistryCorruptError, match="no such table: events"):
        await registry.last_event_id()
    with pytest.raises(RegistryCorruptError, match="no such table: events"):
        await registry.append_events([event(1)])


def link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def dangling_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere.with_name("made"))


def second_name(path: Path, elsewhere: Path) -> None:
    path.hardlink_to(elsewhere)


def fifo(path: Path, _elsewhere: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, _elsewhere: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def a_directory(path: Path, _elsewhere: Path) -> None:
    path.mkdir()


def of_somebody_else(path: Path, elsewhere: Path) -> None:
    shutil.copy(elsewhere, path)
    give(path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("first_start", [True, False])
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize(
    "plant", [link, dangling_link, second_name, fifo, a_socket, a_directory, of_somebody_else]
)
async def test_an_odd_file_in_its_place_is_refused_and_left(
    path: Path, tmp_path: Path, plant: Callable[[Path, Path], None], suffix: str, first_start: bool
) -> None:
    content = path.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    shutil.copy(path, elsewhere)
    if first_start or not suffix:
        path.unlink()
    planted = Path(f"{path}{suffix}")
    plant(planted, elsewhere)
    before = planted.lstat()
    with pytest.raises(RegistryCorruptError, match=re.escape(f"cannot be used: {planted} ")) as caught:
        await open_registry(path)
    assert planted.lstat() == before
    assert elsewhere.read_bytes() == content
    assert not (tmp_path / "made").exists()
    subprocess.run(["/bin/sh", "-c", str(caught.value.details["command"])], check=True, timeout=60)
    await (await open_registry(path)).close()


# What cannot be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.fail("this test mounts a small tmpfs to fill it, which needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True, timeout=60)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True, timeout=60)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as exc:
            assert exc.errno == errno.ENOSPC  # noqa: PT017  (how often it may be written is not known)
    return filler


async def save_until_refused(registry: SqlRegistry) -> int:
    """Save until the disk is full; returns what was saved last."""
    for starts in range(2, 1000):
        try:
            await registry.save_instance(InstanceRow("gpu0", starts=starts))
        except RegistryUnwritableError as exc:
            assert "the disk is full" in exc.message  # noqa: PT017
            return starts - 1
    pytest.fail("the disk was never full")


async def test_a_full_disk_fails_the_write_and_nothing_else(small_disk: Path, fresh: Path) -> None:
    path = small_disk / "registry.sqlite3"
    shutil.copy(fresh, path)
    registry = await open_registry(path)
    await registry.save_instance(InstanceRow("gpu0", starts=1))
    await registry.append_events([event(1)])
    filler = fill(small_disk)
    saved = await save_until_refused(registry)
    with pytest.raises(RegistryUnwritableError, match="the disk is full"):
        await registry.append_events([event(number) for number in range(2, 500)])
    assert (await registry.instances())["gpu0"].starts == saved
    assert await registry.events_after(0, 1000) == (event(1),)
    filler.unlink()
    await registry.save_instance(InstanceRow("gpu0", starts=2000))
    await registry.append_events([event(number) for number in range(2, 500)])
    await registry.close()
    registry = await open_registry(path)
    assert (await registry.instances())["gpu0"].starts == 2000
    assert await registry.last_event_id() == 499
    await registry.close()


async def test_a_registry_that_fits_nowhere_leaves_nothing_behind(small_disk: Path) -> None:
    filler = fill(small_disk)
    path = small_disk / "registry.sqlite3"
    size = filler.stat().st_size
    for left in (0, 4096, 8192, 20480):  # room for the empty file, for some of its pages, for the journal
        os.truncate(filler, size - left)
        with pytest.raises(RegistryUnwritableError) as caught:
            await open_registry(path)
        assert caught.value.message == (
            f"the registry {path} could not be created: the disk is full (database or disk is full)"
        )
        assert [each.name for each in small_disk.iterdir()] == ["filler"]


async def test_a_disk_without_room_for_one_more_file_is_named(small_disk: Path) -> None:
    subprocess.run(
        ["mount", "-o", "remount,nr_inodes=2", str(small_disk)], check=True, timeout=60, capture_output=True
    )
    (small_disk / "filler").touch()
    path = small_disk / "registry.sqlite3"
    with pytest.raises(RegistryUnwritableError) as caught:
        await open_registry(path)
    assert caught.value.message == f"the registry {path} cannot be opened: No space left on device"


async def test_a_read_only_disk_is_named_when_opening(small_disk: Path, fresh: Path) -> None:
    path = small_disk / "registry.sqlite3"
    shutil.copy(fresh, path)
    before = digests(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=60)
    with pytest.raises(RegistryUnwritableError, match=r"read-only|cannot be opened"):
        await open_registry(path)
    with pytest.raises(RegistryUnwritableError, match="Read-only file system"):
        await open_registry(small_disk / "other.sqlite3")
    assert digests(small_disk) == before
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True, timeout=60)
    await (await open_registry(path)).close()


async def test_a_lock_of_another_program_fails_the_write_until_it_ends(
    registry: SqlRegistry, path: Path
) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryUnwritableError, match="another process has it locked"):
            await registry.save_instance(FULL_ROW)
        assert await registry.instances() == {}
        other.execute("ROLLBACK")
    await registry.save_instance(FULL_ROW)
    assert await registry.instances() == {"gpu0": FULL_ROW}


async def test_a_file_that_was_taken_away_fails_the_write(registry: SqlRegistry, path: Path) -> None:
    await registry.save_instance(InstanceRow("cpu"))
    aside = path.with_suffix(".aside")
    path.rename(aside)
    with pytest.raises(RegistryUnwritableError, match="No such file"):
        await registry.save_instance(FULL_ROW)
    shutil.copy(aside, path)
    with pytest.raises(RegistryUnwritableError, match="was replaced by another file"):
        await registry.save_instance(FULL_ROW)
    aside.rename(path)
    await registry.save_instance(FULL_ROW)


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_a_check_finds_what_was_deleted_replaced_or_linked_without_a_write(
    registry: SqlRegistry, path: Path, suffix: str
) -> None:
    await registry.check()
    file = Path(f"{path}{suffix}")
    aside = file.with_name("aside")
    file.rename(aside)
    with pytest.raises(RegistryUnwritableError, match=rf"{file.name} is gone \(No such file"):
        await registry.check()
    file.symlink_to(aside)
    with pytest.raises(RegistryUnwritableError, match=f"{file.name} was replaced by another file"):
        await registry.check()
    file.unlink()
    shutil.copy(aside, file)
    with pytest.raises(RegistryUnwritableError, match=f"{file.name} was replaced by another file"):
        await registry.save_instance(FULL_ROW)
    aside.rename(file)
    await registry.check()
    await registry.save_instance(FULL_ROW)


async def test_a_closed_registry_says_so(path: Path) -> None:
    registry = await open_registry(path)
    await registry.close()
    await registry.close()
    with pytest.raises(RegistryUnwritableError, match="is closed"):
        await registry.save_instance(FULL_ROW)
    with pytest.raises(RegistryUnwritableError, match="is closed"):
        await registry.instances()


async def test_opening_may_be_cancelled(path: Path) -> None:
    opening_task = asyncio.ensure_future(open_registry(path))
    await asyncio.sleep(0)
    opening_task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening_task
    registry = await open_registry(path)
    await registry.save_instance(FULL_ROW)
    await registry.close()


# Killed


_WRITE_LOOP = """
import asyncio, itertools, sys
from datetime import UTC, datetime
from pathlib import Path
from manager.adapters.registry import open_registry
from manager.domain.registry import Event, InstanceRow
async def main():
    registry = await open_registry(Path(sys.argv[1]))
    first = await registry.last_event_id() + 1
    for number in itertools.count(first):
        await registry.save_instance(InstanceRow("gpu0", starts=number))
        await registry.append_events([Event(number, datetime.now(UTC), "gpu0", "k", None, "x" * 500)])
        print(number, flush=True)
asyncio.run(main())
"""


def kill_in_write_loop(path: Path, after: int = 50) -> int:
    """Let a second process write; kill it in the middle. Returns the last write that it reported as done."""
    argv = [sys.executable, "-c", _WRITE_LOOP, str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        lines = [int(writer.stdout.readline()) for _ in range(after)]
        writer.kill()
        lines += [int(line) for line in writer.stdout.read().splitlines()]
    assert writer.returncode == -signal.SIGKILL
    return lines[-1]


async def test_every_write_that_returned_survives_a_kill(path: Path) -> None:
    for after in (1, 20, 150):
        done = kill_in_write_loop(path, after)
        registry = await open_registry(path)
        events = await registry.events_after(0, 100_000)
        rows = await registry.instances()
        await registry.close()
        assert [each.id for each in events] == list(range(1, len(events) + 1))
        assert len(events) in {done, done + 1}
        assert rows["gpu0"].starts in {len(events), len(events) + 1}


async def test_a_kill_while_it_is_made_leaves_no_half_registry(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite3"
    moments: list[Callable[[], bool]] = [
        lambda: any(tmp_path.glob(".registry.sqlite3.new-*")),
        lambda: any(tmp_path.glob(".registry.sqlite3.new-*-journal")) or path.exists(),
    ]
    for moment in moments:
        argv = [sys.executable, "-c", _WRITE_LOOP, str(path)]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as maker:
            deadline = time.monotonic() + 60
            while not moment():
                assert time.monotonic() < deadline
                assert maker.poll() is None
                time.sleep(0.001)
            maker.kill()
        registry = await open_registry(path)
        await registry.save_instance(FULL_ROW)
        await registry.close()
        assert [each.name for each in tmp_path.iterdir()] == ["registry.sqlite3"]
        path.unlink()
