"""The page of the cards: what they say now, who holds their memory, and their history as charts."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from manager.adapters.registry import open_registry
from manager.domain.gpu_history import CardMinute, Sample
from manager.web.words import UNKNOWN, size
from tests.nvml.standin import Card, Process, Sensors
from tests.support.cards import GIB, A, B, Machine
from tests.support.daemon import wait_for
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

MODEL = "llama3.1:8b"
# A name of a process has at most 15 bytes.
HOSTILE = "<img src=x>&'\""
INSTANCES = {
    "gcp-a": {"template": "gpu", "device": A},
    "gcp-b": {"template": "gpu", "device": A},
    "cpu": {"template": "sim"},
}
TEMPLATES = {"gpu": {"device": "gpu", **knobs(models=MODEL, vram_bytes=6 * GIB)}}
HOT = Sensors(97, 61, 412_500, 700_000)
MINUTE_S = 60
# Minutes before now: the cards were read from the first to the second, and from the third to the last.
READ = (1200, 600, 300, 2)


class Box:
    """A machine with two cards, a program of somebody else, and a day behind it."""

    def __init__(self, daemon: Daemon, machine: Machine, engine: Engine, foreign: int) -> None:
        self.daemon = daemon
        self.machine = machine
        self.engine = engine
        self.foreign = foreign

    def pid_of(self, instance: str) -> int:
        # A card that an earlier test has lost is found again by the next reading.
        wait_for(lambda: not any(gpu["lost"] for gpu in self.daemon.get("gpus")["gpus"]))
        container = self.daemon.started(instance)["container"]["id"]
        with closing(self.engine.client()) as client:
            return int(client.containers.get(container).attrs["State"]["Pid"])

    def show(
        self,
        used: int = 0,
        *processes: Process,
        sensors: Sensors = HOT,
        error: int = 0,
        handle_error: int = 0,
    ) -> None:
        """Have the first card say this; the second one has no sensors."""
        first = Card(
            A, "00000000:01:00.0", "NVIDIA L4", 24 * GIB, used, processes=processes, sensors=sensors,
            error=error, handle_error=handle_error,
        )  # fmt: skip
        self.machine.show(first, Card(B, "00000000:02:00.0", "NVIDIA L4", vram_total=24 * GIB))


@pytest.fixture(scope="module")
def box(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    if obstacles := private_engine_obstacles():
        pytest.skip("; ".join(obstacles))
    directory: Path = tmp_path_factory.mktemp("gpus")
    program = directory / HOSTILE
    shutil.copy("/bin/sleep", program)
    machine = Machine(directory)
    with (
        making_daemons(engine, directory, new_manager_id()) as make,
        subprocess.Popen([program, "3600"]) as foreign,
    ):
        try:
            daemon = make(instances=INSTANCES, templates=TEMPLATES, environment=machine.environment)
            # The browser of these tests has an event loop in this thread.
            daemon.state_dir.mkdir(mode=0o700)
            with ThreadPoolExecutor(1) as thread:
                thread.submit(asyncio.run, remember_a_day(daemon.state_dir)).result()
            box = Box(daemon, machine, engine, foreign.pid)
            box.show()
            daemon.start()
            yield box
        finally:
            foreign.kill()


async def remember_a_day(state_dir: Path) -> None:
    """Store minutes as an earlier run has: 6 GiB of an instance and 2 GiB of another program."""
    now = int(time.time()) // MINUTE_S
    minutes = {}
    first, gone, back, last = READ
    for ago in (*range(first, gone, -1), *range(back, last, -1)):
        is_late = ago <= back
        sample = Sample(
            used_bytes=9 * GIB if is_late else 8 * GIB,
            utilisation_percent=90.0 if is_late else 50.0,
            temperature_c=60.0,
            power_watts=None,
            instances={"gcp-a": 6.0 * GIB},
            processes={"python3": 2.0 * GIB},
        )
        minutes[(now - ago) * MINUTE_S] = [CardMinute(A, "NVIDIA L4", 24 * GIB, sample)]
    registry = await open_registry(state_dir / "registry.sqlite3")
    await registry.save_gpu_minutes(minutes, 0)
    await registry.close()


def card(visitor: Visit, index: int) -> Locator:
    heading = visitor.page.get_by_role("heading", name=f"GPU {index}")
    return visitor.page.get_by_role("article").filter(has=heading)


def figure(visitor: Visit, index: int, name: str) -> Locator:
    return card(visitor, index).locator(f"[data-figure={name}] dd")


def chart(visitor: Visit, index: int, name: str) -> Locator:
    return card(visitor, index).locator(f"[data-chart={name}]")


def cells(visitor: Visit, index: int, name: str, series: str) -> list[str]:
    """Return last, mean, highest and gaps of a series, from the table below its chart."""
    row = chart(visitor, index, name).locator("tbody tr").filter(has_text=series)
    return [one.strip() for one in row.locator("td").all_text_contents()]


def ink(place: Locator, number: int, share: float) -> bool:
    """Return whether a chart has the colour of a series of its legend at a share of its width."""
    found: bool = place.evaluate(
        """(figure, { number, share }) => {
          const [canvas, over] = [figure.querySelector("canvas"), figure.querySelector(".u-over")];
          const { fill } = getComputedStyle(figure.querySelectorAll(".key rect")[number]);
          const wanted = fill.match(/\\d+/g).map(Number);
          const [outer, inner] = [canvas.getBoundingClientRect(), over.getBoundingClientRect()];
          const scale = canvas.width / outer.width;
          const at = Math.round((inner.left - outer.left + inner.width * share) * scale);
          const { data } = canvas.getContext("2d").getImageData(at, 0, 1, canvas.height);
          for (let pixel = 0; pixel < data.length; pixel += 4) {
            if (wanted.every((one, part) => Math.abs(data[pixel + part] - one) < 4)) return true;
          }
          return false;
        }""",
        {"number": number, "share": share},
    )
    return found


@needs_cards()
def test_numbers_bars_and_processes_follow_the_cards(box: Box, new_visit: NewVisit) -> None:
    visitor = opened(new_visit(), box.daemon, "/ui/gpus")
    expect(figure(visitor, 0, "utilisation")).to_have_text("97 %")
    expect(figure(visitor, 0, "temperature")).to_have_text("61 °C")
    expect(card(visitor, 0)).to_contain_text("power, of 700 W")
    for name in ("utilisation", "temperature", "power"):
        expect(figure(visitor, 1, name)).to_have_text(UNKNOWN)
    pid = box.pid_of("gcp-a")
    assert box.daemon.call("POST", "instances/gcp-a/load", json={"model": MODEL}).status_code == 200
    held = (Process(pid, 6 * GIB), Process(box.foreign, 2 * GIB), Process(os.getpid(), None))
    box.show(9 * GIB, *held, sensors=Sensors(12, None, 70_000, None))
    expect(figure(visitor, 0, "used")).to_have_text("9.0 GiB")
    expect(figure(visitor, 0, "free")).to_have_text("15.0 GiB")
    expect(figure(visitor, 0, "utilisation")).to_have_text("12 %")
    expect(figure(visitor, 0, "temperature")).to_have_text(UNKNOWN)
    expect(figure(visitor, 0, "power")).to_have_text("70 W")
    processes = card(visitor, 0).locator("section", has_text="Processes").locator("tbody tr")
    expect(processes).to_have_count(3)
    expect(processes.nth(0)).to_contain_text("gcp-a")
    expect(processes.nth(1)).to_contain_text(HOSTILE)
    expect(processes.nth(1)).to_contain_text("foreign")
    expect(processes.nth(2).locator("td").last).to_have_text(UNKNOWN)
    parts = card(visitor, 0).locator("svg.bar title").all_text_contents()
    assert {"gcp-a: 6.0 GiB", f"{HOSTILE}: 2.0 GiB", "other: 1.0 GiB"} <= set(parts)
    bound = card(visitor, 0).get_by_role("row", name="gcp-a").first
    expect(bound).to_contain_text(MODEL)
    expect(bound.locator("td").last).to_have_text("6.0 GiB")
    expect(card(visitor, 1)).to_contain_text("No instance is bound to this card.")
    uuid = card(visitor, 0).get_by_text(A, exact=True)
    expect(uuid).to_be_hidden()
    card(visitor, 0).get_by_text("UUID").click()
    expect(uuid).to_be_visible()
    # It stays open when the numbers change.
    box.show(3 * GIB, *held[1:2])
    expect(figure(visitor, 0, "used")).to_have_text("3.0 GiB")
    expect(uuid).to_be_visible()


@needs_cards()
def test_the_last_hour_grows_while_the_page_is_open(box: Box, new_visit: NewVisit) -> None:
    box.show(5 * GIB, Process(box.foreign, 2 * GIB))
    visitor = opened(new_visit(), box.daemon, "/ui/gpus")
    total = chart(visitor, 0, "memory").locator("tbody tr").first.locator("td").first
    expect(total).to_have_text("5.0 GiB")
    expect(chart(visitor, 0, "memory").locator(".legend")).to_contain_text(HOSTILE)
    expect(chart(visitor, 0, "utilisation").locator(".reading")).to_have_text("97 %")
    expect(chart(visitor, 1, "utilisation").locator(".reading")).to_have_text(UNKNOWN)
    drawn = chart(visitor, 0, "power").locator("canvas").element_handle()
    box.show(7 * GIB, Process(box.foreign, 2 * GIB), sensors=Sensors(40, 50, 100_000, 700_000))
    expect(total).to_have_text("7.0 GiB")
    expect(chart(visitor, 0, "power").locator(".reading")).to_have_text("100 W")
    assert drawn.evaluate("one => one.isConnected"), "new numbers need no new chart"
    # What cannot be read is a gap, and the last value is unknown.
    box.show(error=999)
    expect(total).to_have_text(UNKNOWN)
    assert int(cells(visitor, 0, "memory", "in use")[3]) >= 1
    expect(chart(visitor, 0, "power").locator(".reading")).to_have_text(UNKNOWN)


@needs_cards()
def test_the_last_day_has_its_numbers_and_its_gap(box: Box, new_visit: NewVisit) -> None:
    visitor = opened(new_visit(), box.daemon, "/ui/gpus")
    visitor.page.get_by_role("link", name="Last day").click()
    expect(visitor.page).to_have_url(f"{box.daemon.url}/ui/gpus?span=24h")
    expect(chart(visitor, 0, "memory").locator("canvas")).to_be_visible()

    def agrees() -> bool:
        (history,) = box.daemon.get(f"gpus/history?span=24h&gpu={A}")["gpus"]
        known = [value for value in history["used_bytes"] if value is not None]
        gaps = len(history["used_bytes"]) - len(known)
        return cells(visitor, 0, "memory", "in use")[1:] == [
            size(sum(known) / len(known)), size(max(known)), str(gaps)
        ]  # fmt: skip

    wait_for(agrees, within_s=20)
    first, gone, back, _ = READ
    assert int(cells(visitor, 0, "memory", "in use")[3]) >= gone - back
    assert cells(visitor, 0, "memory", "gcp-a")[2] == "6.0 GiB"
    assert cells(visitor, 0, "utilisation", "Utilisation")[2] in ("90 %", "97 %")
    minutes = 24 * 60
    memory = chart(visitor, 0, "memory")
    legend = memory.locator(".legend li").all_text_contents()
    number = next(place for place, text in enumerate(legend) if "gcp-a" in text) - 1
    for name, place in ((memory, number), (chart(visitor, 0, "utilisation"), 0)):
        assert ink(name, place, 1 - (first + gone) / 2 / minutes)
        assert not ink(name, place, 1 - (gone + back) / 2 / minutes), "a gap stays a gap"
        assert ink(name, place, 1 - back / 2 / minutes)
    # Under the pointer are the values of that time.
    over = memory.locator(".u-over").bounding_box()
    assert over is not None
    visitor.page.mouse.move(over["x"] + over["width"] * (1 - (first + gone) / 2 / minutes), over["y"] + 20)
    expect(memory.locator(".reading").first).to_have_text("8.0 GiB")
    visitor.page.mouse.move(over["x"] + over["width"] * (1 - (gone + back) / 2 / minutes), over["y"] + 20)
    expect(memory.locator(".reading").first).to_have_text(UNKNOWN)


@needs_cards()
def test_a_lost_card_says_why_and_what_to_do(box: Box, new_visit: NewVisit) -> None:
    box.show(1 * GIB)
    visitor = opened(new_visit(), box.daemon, "/ui/gpus")
    box.show(handle_error=15, error=15)
    lost = card(visitor, 0)
    expect(lost).to_contain_text("This card is lost.")
    expect(lost).to_contain_text("What to do: Check that the card is there")
    for name in ("used", "free", "utilisation", "power"):
        expect(figure(visitor, 0, name)).to_have_text(UNKNOWN)
    reason = box.daemon.get("gpus")["gpus"][0]["lost"]
    expect(lost).to_contain_text(reason)
    visitor.assert_accessible()
    box.show(1 * GIB)
    expect(lost).not_to_contain_text("This card is lost.")
    expect(figure(visitor, 0, "used")).to_have_text("1.0 GiB")


@needs_cards()
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")]
)
def test_it_fits_and_follows_the_theme(box: Box, new_visit: NewVisit, width: int, scheme: str) -> None:
    pid = box.pid_of("gcp-a")
    box.daemon.call("POST", "instances/gcp-a/load", json={"model": MODEL})
    box.show(9 * GIB, Process(pid, 6 * GIB), Process(box.foreign, 2 * GIB))
    visitor = opened(new_visit(width=width, scheme=scheme), box.daemon, "/ui/gpus?span=24h")
    expect(chart(visitor, 0, "memory").locator("canvas")).to_be_visible()
    visitor.assert_accessible()
    visitor.assert_fits()
    share = 1 - READ[2] / 2 / (24 * 60)
    assert ink(chart(visitor, 0, "utilisation"), 0, share)
    visitor.page.get_by_role("button", name="Light or dark").click()
    assert ink(chart(visitor, 0, "utilisation"), 0, share), "in the colour of the other theme"
    visitor.page.set_viewport_size({"width": width - 40, "height": 900})
    plot = chart(visitor, 0, "memory").locator(".plot")
    wait_for(lambda: plot.evaluate("one => one.querySelector('.uplot').offsetWidth === one.clientWidth"))
    visitor.assert_fits()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_without_a_card_it_says_what_to_do(new_daemon: NewDaemon, new_visit: NewVisit, kind: str) -> None:
    daemon = new_daemon(instances={"one": {"template": "sim" if kind == "cpu" else "sim-gpu"}}).start()
    visitor = opened(new_visit(), daemon, "/ui/gpus")
    notice = visitor.page.locator("#gpus-notice")
    expect(notice).to_contain_text("No card is known.")
    expect(notice).to_contain_text("ollama-manager doctor")
    message = daemon.get("gpus")["error"]["message"]
    if kind == "cpu":
        expect(notice).not_to_contain_text(message)
    else:
        expect(notice).to_contain_text(message)
    visitor.assert_accessible()
    visitor.assert_fits()
