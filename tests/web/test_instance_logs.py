"""The live log of an instance: hostile lines, search, pause, copy, bounds, a new container."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.support.engine import private_engine_obstacles
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.pages import button, knobs, opened, state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Locator

    from tests.support.browser import Visit
    from tests.support.daemon import Daemon
    from tests.support.engine import Engine

    NewVisit = Callable[..., Visit]

pytestmark = pytest.mark.skipif(
    bool(private_engine_obstacles()), reason="processes of containers are not seen from here"
)

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>",
    "{{ 7 * 7 }} ${7 * 7} </div></dialog><h1>gone</h1>",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 plain",
    "abc\u202etxt.exe\u202c and \x00\x08 bytes",
)


@pytest.fixture(scope="module")
def daemon(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with making_daemons(engine, tmp_path_factory.mktemp("logs"), new_manager_id()) as make:
        # Probes are logged: they would come in between.
        lifecycle = {"probe_interval_s": 60, "resync_interval_s": 60}
        instances = {"cpu": {"template": "sim"}, "never": {"template": "sim"}}
        yield make(instances=instances, templates={"sim": knobs()}, lifecycle=lifecycle).start()


class Container:
    """Writes to the log of the container of `cpu`, as its process would."""

    def __init__(self, daemon: Daemon, engine: Engine) -> None:
        container = daemon.started("cpu")["container"]["id"]
        with closing(engine.client()) as client:
            pid = client.containers.get(container).attrs["State"]["Pid"]
        self._output = Path(f"/proc/{pid}/fd/1")

    def write(self, *lines: str) -> None:
        output = os.open(self._output, os.O_WRONLY)
        with os.fdopen(output, "wb") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())


@pytest.fixture
def container(daemon: Daemon, engine: Engine) -> Iterator[Container]:
    yield Container(daemon, engine)
    daemon.stopped("cpu")


def open_log(visitor: Visit, daemon: Daemon, instance: str = "cpu") -> Locator:
    opened(visitor, daemon, "/ui/instances")
    button(visitor, instance, "Logs").click()
    dialog = visitor.page.get_by_role("dialog", name=f"Log of {instance}")
    expect(dialog).to_be_visible()
    return dialog


def test_lines_come_live_and_hostile_ones_are_only_text(
    daemon: Daemon, container: Container, new_visit: NewVisit
) -> None:
    visitor = new_visit()
    dialog = open_log(visitor, daemon)
    expect(dialog.get_by_role("status")).to_have_text("Live")
    container.write(*HOSTILE)
    lines = dialog.get_by_role("log")
    for line in (HOSTILE[0], HOSTILE[1], "red  plain", "abc·txt.exe· and ·· bytes"):
        expect(lines.get_by_text(line, exact=True)).to_be_visible()
    assert visitor.page.title().startswith("Instances")
    assert lines.locator("img, script, h1").count() == 0
    dialog.get_by_label("Search the log").fill("<script>")
    expect(lines.locator("mark")).to_have_text("<script>")
    assert lines.locator("script").count() == 0


def test_search_hides_the_other_lines_and_counts(
    daemon: Daemon, container: Container, new_visit: NewVisit
) -> None:
    dialog = open_log(new_visit(), daemon)
    container.write("needle one", "hay", "a NEEDLE too")
    lines = dialog.get_by_role("log")
    expect(lines.get_by_text("hay", exact=True)).to_be_visible()
    dialog.get_by_label("Search the log").fill("needle")
    expect(lines.locator("div:visible")).to_have_count(2)
    expect(dialog.get_by_role("status")).to_have_text("2 lines")
    container.write("hay again", "third needle")
    expect(lines.locator("div:visible")).to_have_count(3)
    dialog.get_by_label("Search the log").fill("")
    expect(lines.get_by_text("hay again")).to_be_visible()
    expect(dialog.get_by_role("status")).to_have_text("Live")


def test_a_paused_log_stands_still_and_goes_on_with_what_came(
    daemon: Daemon, container: Container, new_visit: NewVisit
) -> None:
    dialog = open_log(new_visit(), daemon)
    container.write("before")
    expect(dialog.get_by_text("before", exact=True)).to_be_visible()
    pause = dialog.get_by_role("button", name="Pause")
    pause.click()
    expect(pause).to_have_attribute("aria-pressed", "true")
    container.write("meanwhile")
    with dialog.page.expect_request(lambda request: "/ui/live" not in request.url, timeout=20_000):
        dialog.page.evaluate("fetch('/healthz')")  # another round trip has passed
    expect(dialog.get_by_text("meanwhile")).to_have_count(0)
    pause.click()
    expect(dialog.get_by_text("meanwhile")).to_be_visible()


def test_the_page_holds_the_last_lines_only_and_cuts_long_ones(
    daemon: Daemon, container: Container, new_visit: NewVisit
) -> None:
    dialog = open_log(new_visit(), daemon)
    container.write("x" * 10_000)
    cut = dialog.get_by_role("log").locator("div", has_text="xxxx")
    expect(cut.first).to_be_visible()
    assert len(cut.first.inner_text()) <= 4097
    container.write(*(f"line {number}" for number in range(3000)))
    expect(dialog.get_by_text("line 2999", exact=True)).to_be_visible()
    assert dialog.get_by_role("log").locator("div").count() == 2000
    # It follows the end, until somebody scrolls up.
    follow = dialog.get_by_label("Follow the end")
    expect(follow).to_be_checked()
    expect(dialog.get_by_text("line 2999", exact=True)).to_be_in_viewport()
    dialog.get_by_role("log").evaluate("one => { one.scrollTop = 100; }")
    expect(follow).not_to_be_checked()
    container.write("the end")
    expect(dialog.get_by_text("the end", exact=True)).to_be_attached()
    expect(dialog.get_by_text("the end", exact=True)).not_to_be_in_viewport()
    follow.check()
    expect(dialog.get_by_text("the end", exact=True)).to_be_in_viewport()


def test_what_is_shown_is_copied(daemon: Daemon, container: Container, new_visit: NewVisit) -> None:
    visitor = new_visit(permissions=["clipboard-read", "clipboard-write"])
    dialog = open_log(visitor, daemon)
    container.write("one line", "another line", "else")
    expect(dialog.get_by_text("else", exact=True)).to_be_visible()
    dialog.get_by_label("Search the log").fill("line")
    expect(dialog.get_by_text("else", exact=True)).to_be_hidden()
    dialog.get_by_role("button", name="Copy").click()
    expect(dialog.get_by_role("status")).to_have_text("Copied.")
    copied: str = visitor.page.evaluate("navigator.clipboard.readText()")
    assert copied.splitlines()[-2:] == ["one line", "another line"]


def test_the_log_ends_with_its_container_and_goes_on_with_the_next(
    daemon: Daemon, container: Container, engine: Engine, new_visit: NewVisit
) -> None:
    visitor = new_visit()
    dialog = open_log(visitor, daemon)
    container.write("the first")
    expect(dialog.get_by_text("the first")).to_be_visible()
    daemon.stopped("cpu")
    expect(dialog.get_by_role("status")).to_have_text("The log has ended with its container.")
    second = Container(daemon, engine)
    expect(dialog.get_by_text("A new container")).to_be_visible()
    second.write("the second")
    expect(dialog.get_by_text("the second")).to_be_visible()
    expect(dialog.get_by_text("the first")).to_be_attached()
    visitor.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(button(visitor, "cpu", "Logs")).to_be_focused()
    expect(state(visitor, "cpu")).to_have_text("ready")


def test_an_instance_that_never_ran_has_an_empty_log(daemon: Daemon, new_visit: NewVisit) -> None:
    dialog = open_log(new_visit(), daemon, "never")
    expect(dialog.get_by_role("status")).to_have_text("Nothing was written yet.")
