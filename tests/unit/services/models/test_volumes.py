"""Who is asked about a volume, who writes to it, and what is done there one after the other."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest

from manager.domain.instance import Explanation, Phase
from manager.errors import (
    AskFailedError,
    Reason,
    StartFailedError,
    UnavailableError,
    UnknownInstanceError,
)
from manager.services.models import volumes as module
from manager.services.models.volumes import NoSuchModelError, Volumes
from tests.support.instances import Ground

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from manager.services.ports import Question


class Server:
    """Takes requests to unload. `answers` are statuses, errors, or None for no answer at all."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, int | Exception | None] = {}

    @asynccontextmanager
    async def ask(self, question: Question) -> AsyncIterator[Any]:
        assert isinstance(question.body, bytes)
        self.asked.append((question.endpoint, orjson.loads(question.body)))
        answer = self.answers.get(question.endpoint, 200)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await asyncio.Event().wait()
        yield SimpleNamespace(status=answer)


class Rig(Ground):
    """Instances `a` and `b` on the volume `shared`, `c` on `other`, all of them ready and read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, chosen: Mapping[str, str] | None = None) -> None:
        on = {"a": "shared", "b": "shared", "c": "other"}
        self.read_only = {"b": False}
        for place in ("models.volumes", "models.model_lists", "routing.router"):
            monkeypatch.setattr(
                f"manager.services.{place}.volume_of", lambda spec: on.get(spec.id, f"instance:{spec.id}")
            )
        monkeypatch.setattr(
            "manager.services.models.model_lists.mount_of",
            lambda spec: SimpleNamespace(read_only=self.read_only.get(spec.id, False)),
        )
        super().__init__("a", "b", "c")
        self["c"].reads("big")
        self.server = Server()
        self.refreshed = 0
        self.on_refresh: tuple[str, ...] = ()
        self.volumes = Volumes(
            cast("Any", self.fleet),
            self.router,
            self.placement,
            cast("Any", self),
            self.lists,
            server=cast("Any", self.server),
            chosen=chosen or {},
        )

    async def refresh(self, *, lists: bool) -> None:
        """Stand in for the catalogue."""
        assert lists
        self.refreshed += 1
        if self.on_refresh:
            self["c"].reads(*self.on_refresh)
            self.lists.take(cast("Any", self["c"]))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


# --- which volume ---------------------------------------------------------------------------------


async def test_a_model_is_found_where_it_is_without_asking_anybody(rig: Rig) -> None:
    assert rig.volumes.names() == ("shared", "other")
    assert await rig.volumes.find("Tiny", None) == "shared"
    assert await rig.volumes.find("big", None) == "other"
    assert rig.refreshed == 0


async def test_a_pin_says_which_volume(rig: Rig) -> None:
    assert await rig.volumes.find("tiny", "c") == "other"
    assert (rig.volumes.default("c"), rig.volumes.default(None)) == ("other", "shared")
    with pytest.raises(UnknownInstanceError):
        await rig.volumes.find("tiny", "z")


async def test_a_model_that_somebody_else_pulled_is_found_by_asking_once_more(rig: Rig) -> None:
    rig.on_refresh = ("big", "fresh")
    assert await rig.volumes.find("fresh", None) == "other"
    assert rig.refreshed == 1


async def test_a_model_that_nobody_has_may_be_on_a_volume_that_was_never_listed(rig: Rig) -> None:
    with pytest.raises(NoSuchModelError, match="nope") as caught:
        await rig.volumes.find("nope", None)
    assert caught.value.reason is Reason.MODEL_MISSING
    rig.fleet.add("new")
    rig.revision.advance()
    assert await rig.volumes.find("nope", None) == "instance:new"


async def test_a_server_that_cannot_be_asked_makes_no_name_likely(rig: Rig) -> None:
    nas = rig.fleet.add("nas")
    nas.endpoint, nas.phase = None, Phase.UNAVAILABLE
    nas.explanation = Explanation(Reason.UPSTREAM_UNREACHABLE, "connection refused")
    with pytest.raises(NoSuchModelError) as caught:
        await rig.volumes.find("nope", None)
    assert caught.value.message == "model 'nope' not found; could not be asked: nas (upstream_unreachable)"
    rig.fleet.add("new")
    rig.revision.advance()
    assert await rig.volumes.find("nope", None) == "instance:new", "this one can be looked at"


def test_without_an_instance_there_is_no_volume(rig: Rig) -> None:
    rig.fleet.members.clear()
    with pytest.raises(UnavailableError, match="no instance") as caught:
        rig.volumes.default(None)
    assert caught.value.reason is Reason.INSTANCE_UNAVAILABLE


# --- who ------------------------------------------------------------------------------------------


def made(attempts: tuple[Any, ...]) -> list[tuple[str, str]]:
    return [(one.instance, one.because) for one in attempts]


def test_one_that_runs_comes_first_and_one_that_only_reads_never_writes(rig: Rig) -> None:
    rig["a"].endpoint = None
    assert made(rig.volumes.writers("shared", "m")) == [("b", "running"), ("a", "startable")]
    rig.read_only["b"] = True
    rig.settings.change()
    assert made(rig.volumes.writers("shared")) == [("a", "startable")]
    assert made(rig.volumes.readers("shared")) == [("b", "running"), ("a", "startable")]
    assert made(rig.volumes.running("shared")) == [("b", "running")]


def test_the_chosen_writer_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, {"shared": "b"})
    rig["b"].endpoint = None
    assert made(rig.volumes.writers("shared")) == [("b", "startable")]


async def test_a_writer_is_the_first_that_can_be_had(rig: Rig) -> None:
    rig["a"].endpoint = rig["b"].endpoint = None
    rig["a"].starts = [StartFailedError("exit 1", reason=Reason.START_FAILED)]
    prepared = await rig.volumes.writer("shared")
    assert prepared.lease.instance == "b"
    prepared.lease.release()


async def test_of_several_writers_that_fail_the_first_says_why(rig: Rig) -> None:
    for name in ("a", "b"):
        rig[name].endpoint = None
        rig[name].starts = [StartFailedError(f"{name} ended", reason=Reason.START_FAILED)]
    with pytest.raises(StartFailedError, match="a ended"):
        await rig.volumes.writer("shared")


async def test_a_volume_that_nobody_can_be_used_on_says_why(rig: Rig) -> None:
    for name in ("a", "b"):
        rig[name].endpoint = None
        rig[name].phase = Phase.UNAVAILABLE
    rig["a"].explanation = Explanation(Reason.IMAGE_MISSING, "no such image")
    rig.settings.change()
    with pytest.raises(UnavailableError, match=r"a \(image_missing\), b \(instance_unavailable\)") as caught:
        await rig.volumes.writer("shared")
    assert caught.value.retry_after_s == 5
    assert "none writes" in rig.volumes.none_left("elsewhere").message


# --- one after the other --------------------------------------------------------------------------


async def test_what_changes_a_volume_is_done_one_after_the_other_and_is_named(rig: Rig) -> None:
    done: list[str] = []
    goes_on = asyncio.Event()

    async def change(what: str) -> None:
        async with rig.volumes.alone("shared", what):
            done.append(str(rig.volumes.doing("shared")))
            await goes_on.wait()

    changes = [asyncio.ensure_future(change(what)) for what in ("one", "two")]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert done == ["one"]
    async with rig.volumes.alone("other", "three"):
        assert rig.volumes.doing("other") == "three"
    goes_on.set()
    await asyncio.gather(*changes)
    assert done == ["one", "two"]
    assert rig.volumes.doing("shared") is None


async def test_a_change_that_fails_leaves_the_volume_free(rig: Rig) -> None:
    with pytest.raises(KeyError):
        async with rig.volumes.alone("shared", "one"):
            raise KeyError
    async with rig.volumes.alone("shared", "two"):
        assert rig.volumes.doing("shared") == "two"


async def test_a_change_is_seen_at_once(rig: Rig) -> None:
    rig["a"].on_volume = ("tiny", "fresh")
    await rig.volumes.changed("a")
    assert rig.volumes.having("fresh") == ("shared",)


# --- unloading ------------------------------------------------------------------------------------


async def test_a_model_is_unloaded_from_the_others_on_the_volume_that_hold_it(rig: Rig) -> None:
    rig.fleet.add("d")
    for name in ("a", "b", "c", "d"):
        rig[name].loaded = ("Tiny:latest",)
    await rig.volumes.unload_elsewhere("shared", "tiny", except_on="a")
    assert rig.server.asked == [("http://b", {"model": "tiny", "keep_alive": 0})]
    assert rig["b"].probes


@pytest.mark.parametrize("how", ["stopped", "not loaded"])
async def test_who_does_not_hold_a_model_is_not_asked_to_unload_it(rig: Rig, how: str) -> None:
    if how == "stopped":
        rig["b"].endpoint = None
        rig["b"].loaded = ("tiny",)
    await rig.volumes.unload_elsewhere("shared", "tiny", except_on="a")
    await rig.volumes.unload("b", "tiny")
    assert rig.server.asked == []


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (500, "status 500"),
        (AskFailedError("refused", reason=Reason.UPSTREAM_UNREACHABLE, begun=False), "refused"),
        (None, "no answer within 0.01 s"),
    ],
)
async def test_an_unload_that_fails_keeps_nobody_from_the_change(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, answer: int | Exception | None, detail: str
) -> None:
    monkeypatch.setattr(module, "_UNLOAD_S", 0.01)
    warned: list[dict[str, Any]] = []
    monkeypatch.setattr(
        module, "_log", SimpleNamespace(warning=lambda kind, **told: warned.append({"kind": kind, **told}))
    )
    rig["b"].loaded = ("tiny",)
    rig.server.answers["http://b"] = answer
    await rig.volumes.unload("b", "tiny")
    assert warned == [{"kind": "model_not_unloaded", "instance": "b", "model": "tiny", "detail": detail}]


async def test_a_server_that_does_not_answer_its_probe_is_asked_by_what_is_known(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNLOAD_S", 0.01)

    async def hangs(**_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(rig["b"], "probe", hangs)
    rig["b"].loaded = ("tiny",)
    await rig.volumes.unload("b", "tiny")
    assert len(rig.server.asked) == 1
