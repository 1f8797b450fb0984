"""The overview: the verdict, the devices with what is on them, lanes, requests and the last problems."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import requests
from playwright.sync_api import expect

from tests.nvml.standin import Card, Process
from tests.support.cards import GIB, A, B, Machine
from tests.support.engine import private_engine_obstacles
from tests.support.engine_kinds import needs_cards
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.pages import knobs, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Locator

    from tests.support.browser import Visit
    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

    NewVisit = Callable[..., Visit]

TOTAL = 24 * GIB
GPU_MODEL = "llama3.1:8b"
INSTANCES = {
    "gcp-a": {"template": "gpu", "device": A, "slots": 1},
    "gcp-b": {"template": "gpu", "device": A},
    "gpu1": {"template": "claims", "device": B},
    "cpu": {"template": "sim"},
    "slow": {"template": "slow"},
    "bad": {"template": "bad"},
}
TEMPLATES = {
    "gpu": {"device": "gpu", **knobs(models=GPU_MODEL, vram_bytes=6 * GIB, tokens_per_s=40)},
    "claims": {"device": "gpu", "limits": {"vram": "8g"}},
    "slow": knobs(start_delay_s=8),
    "bad": knobs(crash="start"),
}


def cards(a_used: int = 0, a_processes: tuple[Process, ...] = ()) -> tuple[Card, Card]:
    return (
        Card(
            A, "00000000:01:00.0", "NVIDIA L4", vram_total=24 * GIB, vram_used=a_used, processes=a_processes
        ),
        Card(B, "00000000:02:00.0", "NVIDIA L4", vram_total=TOTAL),
    )


class Box:
    """A machine with two cards and six instances."""

    def __init__(self, daemon: Daemon, machine: Machine, engine: Engine) -> None:
        self.daemon = daemon
        self.machine = machine
        self.engine = engine

    def pid_of(self, instance: str) -> int:
        container = self.daemon.started(instance)["container"]["id"]
        with closing(self.engine.client()) as client:
            return int(client.containers.get(container).attrs["State"]["Pid"])

    def ask(self, tokens: int = 8) -> requests.Response:
        body = {
            "model": GPU_MODEL,
            "messages": [{"role": "user", "content": "hi"}],
            "options": {"num_predict": tokens},
        }
        headers = {"X-Instance": "gcp-a"}
        return requests.post(f"{self.daemon.url}/api/chat", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def box(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    if obstacles := private_engine_obstacles():
        pytest.skip("; ".join(obstacles))
    directory: Path = tmp_path_factory.mktemp("overview")
    machine = Machine(directory, *cards())
    with making_daemons(engine, directory, new_manager_id()) as make:
        daemon = make(instances=INSTANCES, templates=TEMPLATES, environment=machine.environment).start()
        yield Box(daemon, machine, engine)


def device(visitor: Visit, title: str) -> Locator:
    heading = visitor.page.get_by_role("heading", name=title)
    return visitor.page.locator("section.device").filter(has=heading)


def line(visitor: Visit, instance: str) -> Locator:
    link = visitor.page.get_by_role("link", name=instance, exact=True)
    return visitor.page.locator("li.line").filter(has=link)


def bar(visitor: Visit, title: str) -> dict[str, str]:
    """Return the parts of the bar of a device: their labels, by their names."""
    titles: list[str] = device(visitor, title).locator("svg.bar title").all_text_contents()
    return {name: size for name, _, size in (one.partition(": ") for one in titles)}


@needs_cards()
def test_cards_show_who_holds_their_memory_and_what_is_reserved(box: Box, new_visit: NewVisit) -> None:
    visitor = opened(new_visit(), box.daemon, "/ui")
    expect(device(visitor, "GPU 1")).to_contain_text("0 B of 24.0 GiB")
    pid = box.pid_of("gcp-a")
    assert box.daemon.call("POST", "instances/gcp-a/load", json={"model": GPU_MODEL}).status_code == 200
    held = (Process(pid, 6 * GIB), Process(os.getpid(), 2 * GIB))
    box.machine.show(*cards(9 * GIB, held))
    expect(device(visitor, "GPU 0")).to_contain_text("9.0 GiB of 24.0 GiB")
    expect(device(visitor, "GPU 0")).to_contain_text("other: 1.0 GiB")
    parts = bar(visitor, "GPU 0")
    assert (parts["gcp-a"], parts["other"]) == ("6.0 GiB", "1.0 GiB")
    assert "2.0 GiB" in parts.values(), "a foreign process, by its name"
    assert "reserved" not in parts
    expect(line(visitor, "gcp-a")).to_contain_text(GPU_MODEL)
    # What an instance claims and does not hold yet is reserved.
    box.daemon.started("gpu1")
    expect(device(visitor, "GPU 1")).to_contain_text("reserved: 8.0 GiB")
    box.daemon.stopped("gpu1")
    expect(device(visitor, "GPU 1")).not_to_contain_text("reserved")


@needs_cards()
def test_it_shows_what_each_instance_does(box: Box, new_visit: NewVisit) -> None:
    box.machine.show(*cards())
    box.daemon.started("gcp-a")
    visitor = opened(new_visit(), box.daemon, "/ui")
    assert box.ask().status_code == 200
    expect(line(visitor, "gcp-a")).to_contain_text("tok/s")
    waiting = [threading.Thread(target=box.ask, args=(80,)) for _ in range(3)]
    for one in waiting:
        one.start()
    expect(line(visitor, "gcp-a")).to_contain_text("1/1 in flight")
    expect(line(visitor, "gcp-a")).to_contain_text("2 queued")
    expect(visitor.page.locator("#lanes")).to_contain_text("without a role")
    expect(visitor.page.locator("#requests")).to_contain_text("open")
    for one in waiting:
        one.join()
    expect(line(visitor, "gcp-a")).to_contain_text("0/1 in flight")
    box.daemon.begin("slow", "start", wait="false")
    expect(line(visitor, "slow")).to_contain_text("Waits for the server to answer")
    expect(line(visitor, "slow")).to_contain_text("stops in")
    box.daemon.stopped("slow")


@needs_cards()
def test_the_verdict_names_a_problem_with_its_remedy_and_is_well_again(box: Box, new_visit: NewVisit) -> None:
    visitor = opened(new_visit(), box.daemon, "/ui")
    verdict = visitor.page.locator("#verdict")
    box.daemon.begin("bad", "start")
    expect(verdict.get_by_role("heading")).to_have_text("Needs attention")
    expect(verdict).to_contain_text("ended by itself with exit code 2")
    expect(verdict).to_contain_text("What to do: Look at the last lines of the log.")
    problems = visitor.page.locator("#problems")
    expect(problems).to_contain_text("start failed")
    expect(problems).to_contain_text("ago")
    verdict.get_by_role("link", name="bad").click()
    expect(visitor.page).to_have_url(f"{box.daemon.url}/ui/instances#instance-bad")
    visitor.page.go_back()
    # Stopping it settles the failure: all is well, and the journal still tells what happened.
    box.daemon.stopped("bad")
    expect(verdict.get_by_role("heading")).to_have_text("All is well")
    expect(problems).to_contain_text("start failed")


@needs_cards()
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")]
)
def test_two_cards_and_six_instances_fit(box: Box, new_visit: NewVisit, width: int, scheme: str) -> None:
    box.daemon.begin("bad", "start")
    visitor = opened(new_visit(width=width, scheme=scheme), box.daemon, "/ui")
    visitor.assert_accessible()
    visitor.assert_fits()
    if width > 1000:
        height = visitor.page.locator("section.device").last.evaluate(
            "one => one.getBoundingClientRect().bottom"
        )
        assert height <= 900, "the devices are on one screen"


def test_where_no_instance_wants_a_card_no_driver_is_missed(
    new_daemon: NewDaemon, new_visit: NewVisit
) -> None:
    daemon = new_daemon(instances={"cpu": {"template": "sim"}}).start()
    visitor = opened(new_visit(), daemon, "/ui")
    verdict = visitor.page.locator("#verdict")
    expect(verdict.get_by_role("heading")).to_have_text("All is well")
    assert daemon.get("gpus")["error"], "the API says that there is no driver"
    expect(verdict).not_to_contain_text("NVML")
    expect(visitor.page.locator("#problems")).to_contain_text("No problem")


@pytest.mark.parametrize("width", [1280, 360])
def test_sixty_four_instances_are_compact(new_daemon: NewDaemon, new_visit: NewVisit, width: int) -> None:
    instances: dict[str, Any] = {f"cpu{number:02}": {"template": "sim"} for number in range(64)}
    daemon = new_daemon(instances=instances).start()
    visitor = opened(new_visit(width=width), daemon, "/ui")
    tiles = visitor.page.locator(".tile")
    expect(tiles).to_have_count(64)
    visitor.assert_accessible()
    visitor.assert_fits()
    daemon.started("cpu63")
    expect(tiles.nth(63)).to_contain_text("ready")
    if width > 1000:
        bottom = tiles.last.evaluate("one => one.getBoundingClientRect().bottom")
        assert bottom <= 900, "all of them are on one screen"
    visitor.page.goto(f"{daemon.url}/ui/instances")
    expect(visitor.page.get_by_role("article")).to_have_count(64)
    visitor.assert_fits()
