"""A request that asks for the processor tells its instance so, with each server that it is sent to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.roles import BodyChanges
from tests.support.attempts import attempt
from tests.support.exchanging import TINY, bench_of

if TYPE_CHECKING:
    import pytest

ON_CPU = {**TINY, "options": {"num_gpu": 0}}
LOAD_FAILED = b'{"error":"model failed to load"}'


async def test_the_instance_of_each_attempt_expects_the_model_on_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of(monkeypatch, attempt("a"), attempt("b"))
    first, second = bench.kept("a"), bench.kept("b")
    bench.ask(ON_CPU)
    assert bench.stage.placement.on_cpu == [("a", "tiny")]
    first.whole(500, LOAD_FAILED)
    await bench.settle()
    assert second.requests
    assert bench.stage.placement.on_cpu == [("a", "tiny"), ("b", "tiny")]


async def test_any_other_request_tells_its_instance_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(monkeypatch, attempt("a"))
    server = bench.kept("a")
    bench.ask({**TINY, "options": {"num_gpu": 99}})
    assert server.requests
    assert bench.stage.placement.on_cpu == []


async def test_what_a_role_overrides_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(monkeypatch, attempt("a"))
    bench.kept("a")
    bench.stage.router.changes["tiny", None] = BodyChanges(overrides={"options": {"num_gpu": 0}})
    bench.ask(TINY)
    assert bench.stage.placement.on_cpu == [("a", "tiny")]
