"""Containers that belong to no instance, as `status` and `doctor` show them."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from manager.cli.client import Daemon
from manager.cli.doctor_engine import Needs, _containers
from manager.cli.findings import Verdict
from manager.cli.locate import Endpoint
from manager.cli.status import _picture, _Watch
from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER
from manager.domain.instance import ContainerFacts
from manager.domain.ownership import LABEL_OWNER, Owner
from manager.errors import EngineUnreachableError
from tests.unit.cli.stand_in import API, Answer, StandInDaemon, ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Run = Callable[..., Result]

ORPHAN = {
    "id": "0123",
    "name": "m-ollama-old",
    "image": "ollama/ollama:1",
    "instance": "old",
    "running": True,
    "why": "it is labelled as instance 'old', which is not configured",
    "remedy": "docker rm -f m-ollama-old",
}
LINE = (
    "orphan m-ollama-old (running): it is labelled as instance 'old', which is not configured; "
    "`docker rm -f m-ollama-old` removes it"
)


def with_orphans(daemon: StandInDaemon, *orphans: dict[str, Any]) -> None:
    daemon.has(ready("cpu"))
    daemon.answers[f"GET {API}/orphans"] = Answer({"orphans": orphans, "count": len(orphans)})


def test_columns_stay_one_line_an_instance_and_orphans_are_named_beside_them(
    run: Run, daemon: StandInDaemon
) -> None:
    with_orphans(daemon, ORPHAN)
    result = run("--url", daemon.url, "status")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.splitlines() == [LINE]


def test_json_has_the_orphans_and_an_older_daemon_has_none(run: Run, daemon: StandInDaemon) -> None:
    with_orphans(daemon, ORPHAN)
    assert json.loads(run("--url", daemon.url, "status", "--json").stdout)["orphans"] == [ORPHAN]
    del daemon.answers[f"GET {API}/orphans"]
    result = run("--url", daemon.url, "status", "--json")
    assert (result.exit_code, "orphans" in json.loads(result.stdout)) == (0, False)


@pytest.mark.parametrize("width", [200, 40])
def test_a_terminal_shows_orphans_below_the_instances(daemon: StandInDaemon, width: int) -> None:
    with_orphans(daemon, ORPHAN | {"running": False})
    watch = _Watch(lambda: Endpoint(daemon.url))
    watch.look()
    console = Console(width=width, record=True, file=StringIO())
    console.print(_picture(watch, width))
    words = " ".join(console.export_text().split())
    assert "orphan m-ollama-old (ended): it is labelled" in words


def test_no_instance_hides_no_orphan(daemon: StandInDaemon) -> None:
    daemon.has()
    daemon.answers[f"GET {API}/orphans"] = Answer({"orphans": [ORPHAN], "count": 1})
    reader = Daemon(Endpoint(daemon.url))
    assert [one.name for one in reader.read_orphans(reader.status_document())] == ["m-ollama-old"]


# --- doctor ---


class Engine:
    def __init__(self, *containers: ContainerFacts, error: Exception | None = None) -> None:
        self._containers = containers
        self._error = error

    async def list_containers(self, _manager_id: str) -> tuple[ContainerFacts, ...]:
        if self._error is not None:
            raise self._error
        return self._containers


def container(name: str, instance: str) -> ContainerFacts:
    return ContainerFacts("0123", name, "x", "running", {LABEL_MANAGER: "m", LABEL_INSTANCE: instance})


async def test_doctor_names_orphans_and_the_commands_that_remove_them() -> None:
    engine: Any = Engine(container("m-ollama-cpu", "cpu"), container("left", "cpu"), container("b", "old"))
    finding = await _containers(engine, "m", Needs(instances=("cpu",)))
    assert finding.verdict is Verdict.WARNING
    assert finding.message.splitlines() == [
        "b (running): it is labelled as instance 'old', which is not configured",
        "left (running): the container of instance 'cpu' is named m-ollama-cpu; this one was renamed",
    ]
    assert "`docker rm -f b`, `docker rm -f left`" in finding.remedy


@pytest.mark.parametrize("finds_cards", [True, False])
async def test_an_instance_of_a_card_is_configured_where_cards_are_found(*, finds_cards: bool) -> None:
    engine: Any = Engine(container("m-ollama-gpu0", "gpu0"))
    finding = await _containers(engine, "m", Needs(finds_cards=finds_cards))
    assert (finding.verdict is Verdict.FINE) == finds_cards


async def test_doctor_says_that_the_engine_gives_no_list() -> None:
    engine: Any = Engine(error=EngineUnreachableError("it hangs"))
    finding = await _containers(engine, "m", Needs())
    assert (finding.verdict, finding.message) == (Verdict.BROKEN, "it hangs")


@pytest.mark.parametrize(
    ("owner", "is_foreign"),
    [(None, True), (Owner("other"), True), (Owner("me"), False), (Owner("new", frozenset({"me"})), False)],
)
async def test_doctor_advises_no_removal_of_containers_of_another_state_directory(
    owner: Owner | None, *, is_foreign: bool
) -> None:
    one = container("m-ollama-cpu", "cpu")
    engine: Any = Engine(replace(one, labels={**one.labels, LABEL_OWNER: "me"}))
    finding = await _containers(engine, "m", Needs(instances=("cpu",)), owner)
    assert finding.verdict is (Verdict.BROKEN if is_foreign else Verdict.FINE)
    assert "docker rm" not in finding.remedy
    assert ("--take-over" in finding.remedy) is is_foreign


class ById:
    """An engine whose containers have several manager ids."""

    def __init__(self, **containers: ContainerFacts) -> None:
        self._containers = containers

    async def list_containers(self, manager_id: str) -> tuple[ContainerFacts, ...]:
        return (self._containers[manager_id],) if manager_id in self._containers else ()


async def test_doctor_names_the_containers_of_a_former_manager_id() -> None:
    engine: Any = ById(old=container("old-ollama-cpu", "cpu"))
    finding = await _containers(engine, "m", Needs(instances=("cpu",)), Owner("me", manager_id="old"))
    assert finding.verdict is Verdict.BROKEN
    assert "manager_id was 'old' and is 'm' now" in finding.message
    assert "old-ollama-cpu" in finding.message
    assert "docker rm -f old-ollama-cpu" in finding.remedy
    for same in ("m", "gone"):
        finding = await _containers(engine, "m", Needs(instances=("cpu",)), Owner("me", manager_id=same))
        assert finding.verdict is Verdict.FINE
