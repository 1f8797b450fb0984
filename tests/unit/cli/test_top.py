"""`top` on terminals of several sizes: what it draws, on a real one too, and how it ends."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

import pytest
from rich.cells import cell_len

from manager.cli.live import Seen
from manager.cli.top_view import picture
from tests.unit.cli.stand_in import API, Answer, StandInDaemon, error, ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from click.testing import Result
    from rich.text import Text

LIMIT_S = 60
GIB = 2**30
HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]\u202eevil\u009b1m\nline\r[/red][link=http://x]"
DIED = {"code": "container_exited", "message": "it ended by itself with exit code 2", "log_tail": []}
MODEL = {"name": "qwen3:8b", "digest": "d", "size_bytes": 5 * GIB, "vram_bytes": 0, "expires_at": None}
IDLE_LANE: dict[str, Any] = {
    "in_flight": 0,
    "queued": 0,
    "oldest_wait_s": None,
    "concurrency": None,
    "reserved": 0,
    "keep_warm": [],
}


def card(index: int, used: int | None = 12 * GIB, **changes: Any) -> dict[str, Any]:
    processes = [
        {"pid": 1, "name": "ollama", "used_bytes": 6 * GIB, "instance": "gpu0"},
        {"pid": 2, "name": "ollama", "used_bytes": 4 * GIB, "instance": "gpu0"},
        {"pid": 3, "name": "blender", "used_bytes": None, "instance": None},
    ]
    return {
        "uuid": f"GPU-{index}",
        "index": index,
        "pci_bus_id": "0",
        "name": "NVIDIA RTX 6000 Ada",
        "vram_total_bytes": 48 * GIB,
        "vram_used_bytes": used,
        "vram_free_bytes": None,
        "lost": None,
        "processes": processes,
    } | changes


def asked(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "open": False,
        "ts": "2026-01-02T03:04:05Z",
        "request_id": f"r{number}",
        "project_id": "lab",
        "path": "/api/chat",
        "role": None,
        "model": "qwen3:8b",
        "effective_target": "gpu0",
        "fallback_reason": None,
        "outcome": "ok",
        "duration_ms": 1234.5,
        "output_tokens": 321,
    } | changes


def sections(*, instances: int = 3, cards: int = 1, lanes: int = 3, requests: int = 3) -> dict[str, Any]:
    return {
        "instances": [ready(f"gpu{number}", models=[MODEL]) for number in range(instances)],
        "gpus": {"gpus": [card(number) for number in range(cards)], "error": None},
        "lanes": {
            "lanes": [{"name": f"lane{number}", **IDLE_LANE} for number in range(lanes)],
            "instances": [
                {"id": f"gpu{number}", "slots": 4, "in_use": 1, "reserved_free": 0}
                for number in range(instances)
            ],
        },
        "models": [],
        "requests": [asked(number) for number in range(requests)],
    }


def drawn(seen: Mapping[str, Any], width: int = 80, height: int = 24, **more: Any) -> list[str]:
    return [line.plain for line in lines(seen, width, height, **more)]


def lines(seen: Mapping[str, Any], width: int = 80, height: int = 24, **more: Any) -> list[Text]:
    at = dict.fromkeys(seen, 100.0)
    return picture(Seen(seen, at, **more), width, height, now=100.0, title="http://127.0.0.1:11435")


@pytest.mark.parametrize("width", [10, 40, 80, 120, 200])
@pytest.mark.parametrize("height", [5, 24, 60])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_the_picture_fits_every_terminal(width: int, height: int, count: int) -> None:
    found = drawn(sections(instances=count, cards=count, lanes=count, requests=count), width, height)
    assert len(found) <= height
    assert max(map(cell_len, found)) <= width


def test_every_section_has_a_place_on_a_usual_terminal() -> None:
    found = drawn(sections(instances=64, cards=8, lanes=12, requests=50))
    heads = [line.split()[0] for line in found if line]
    assert [head for head in heads if head in ("GPU", "INSTANCE", "LANE", "REQUEST")] == [
        "GPU",
        "INSTANCE",
        "LANE",
        "REQUEST",
    ]
    more = [line for line in found if line.startswith("… ")]
    assert [line.split()[1] for line in more] == ["5", "61", "9", "48"]
    assert len(found) == 24


def test_a_wide_terminal_shows_what_there_is() -> None:
    seen = sections()
    seen["instances"][1] |= {"phase": "failed", "health": "unknown", "reason": DIED, "models": []}
    seen["instances"][2] |= {"in_flight": 2, "ttl_remaining_s": None}
    seen["lanes"]["lanes"][1] |= {"in_flight": 2, "queued": 3, "oldest_wait_s": 4.0, "concurrency": 2}
    seen["requests"][0] |= {"open": True, "outcome": None, "duration_ms": 61_000.0, "output_tokens": None}
    seen["requests"][1] |= {"outcome": "refused", "fallback_reason": "queue_full", "effective_target": None}
    found = [" ".join(line.split()) for line in drawn(seen, 140, 40)]
    assert found[0] == "ollama-manager http://127.0.0.1:11435 2/3 ready, 2 in flight, 1 open q ends"
    assert any(
        re.fullmatch(r"0 NVIDIA RTX 6000 Ada █{7}░{21} 12\.0G/48\.0G gpu0 10\.0G, blender unknown", line)
        for line in found
    )
    assert "gpu1 failed ! unknown 0 1/4 14m32s container_exited: it ended by itself with exit code 2" in found
    assert "gpu2 ready healthy 2 1/4 in use qwen3:8b 5.0G" in found
    assert found.index(
        "gpu1 failed ! unknown 0 1/4 14m32s container_exited: it ended by itself with exit code 2"
    ) < (found.index("gpu2 ready healthy 2 1/4 in use qwen3:8b 5.0G"))
    assert "lane1 2 3 4s 2" in found
    assert "open lab qwen3:8b gpu0 1 min 1 s - -" in found
    assert "refused lab qwen3:8b - 1.2 s 321 queue_full" in found


def test_what_is_unknown_is_said_to_be() -> None:
    seen = sections()
    seen["gpus"]["gpus"] = [card(0, None), card(1, lost="it fell off the bus")]
    found = drawn(seen, 140)
    assert any("unknown/48.0G" in line and "█" not in line for line in found)
    assert any("lost: it fell off the bus" in line for line in found)
    seen["gpus"] = {"gpus": [], "error": {"code": "gpu_missing", "message": "no driver"}}
    assert "no cards: no driver" in drawn(seen)


def test_a_card_of_another_host_is_shown_with_it() -> None:
    seen = sections()
    unknown = {"code": "vram_unknown", "message": "the memory of GPU-1 is unknown"}
    seen["gpus"] = {"gpus": [card(0), card(1, None, host="node-1\x1b[2J")], "error": unknown}
    found = drawn(seen, 140)
    assert unknown["message"] in found, "there are cards"
    (line,) = [line for line in found if line.startswith("node-1")]
    assert "\x1b" not in line
    assert "unknown/48.0G" in line


def test_clocks_go_on_between_two_frames() -> None:
    seen = sections()
    seen["lanes"]["lanes"][0] |= {"queued": 1, "oldest_wait_s": 4.0}
    seen["requests"][0] |= {"open": True, "outcome": None, "duration_ms": 1000.0}
    at = dict.fromkeys(seen, 100.0)
    found = "\n".join(
        line.plain for line in picture(Seen(seen, at), 120, 40, now=172.0, title="http://127.0.0.1:11435")
    )
    assert "13m20s" in found
    assert "1m16s" in found
    assert "1 min 13 s" in found


def test_a_terminal_of_one_line_has_one_line() -> None:
    assert len(drawn(sections(), 80, 1, trouble="gone")) == 1


def test_a_daemon_that_is_away_is_said_to_be() -> None:
    assert drawn(sections(), trouble="connection refused", since=98.0)[1] == (
        "daemon unreachable for 2s: connection refused"
    )


def test_hostile_names_reach_no_terminal() -> None:
    seen = sections()
    seen["instances"][0] |= {
        "models": [MODEL | {"name": HOSTILE}],
        "reason": {"code": HOSTILE, "message": HOSTILE, "log_tail": []},
    }
    seen["instances"][1] |= {"drained": {"since": "", "until": None, "reason": HOSTILE}}
    seen["gpus"]["gpus"] = [card(0, name=HOSTILE, processes=[card(0)["processes"][2] | {"name": HOSTILE}])]
    seen["lanes"]["lanes"][0] |= {"name": HOSTILE}
    seen["requests"] = [asked(0, project_id=HOSTILE, model=HOSTILE, role=HOSTILE, fallback_reason=HOSTILE)]
    found = lines(seen, 300, 40, trouble=HOSTILE)
    text = "\n".join(line.plain for line in found)
    assert text.replace("\n", "").isprintable()
    assert "\u202e" not in text
    assert text.count("[red]evil1m line[/red]") >= 8, "markup is text"
    styles = {str(span.style) for line in found for span in line.spans}
    assert not any("link" in style for style in styles)


# --- on a real terminal


class Terminal:
    """`top` on a pseudo-terminal; `screen` is what was drawn last, without its sequences."""

    def __init__(self, daemon_url: str, width: int, height: int) -> None:
        self.master, self._slave = pty.openpty()
        self.resize(width, height)
        self.before = termios.tcgetattr(self._slave)
        self.written = b""
        argv = [sys.executable, "-m", "manager", "top", "--url", daemon_url]
        self.process = subprocess.Popen(
            argv,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  (its controlling terminal)
        )

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read_until(self, holds: Callable[[str], object]) -> str:
        """Return the screen once it is such."""
        deadline = time.monotonic() + LIMIT_S
        while not holds(self.screen):
            assert time.monotonic() < deadline, self.screen
            assert self.process.poll() is None, self.written
            if select.select([self.master], [], [], 0.5)[0]:
                self.written += os.read(self.master, 65536)
        return self.screen

    @property
    def screen(self) -> str:
        frames = self.written.decode(errors="replace").split("\x1b[H")
        return re.sub(r"\x1b\[[0-?]*[a-zA-Z]", "", frames[-1]).replace("\r\n", "\n")

    def ended(self) -> int:
        """Return the exit code; the terminal is as it was."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.master], [], [], 0.05)[0]:
                self.written += os.read(self.master, 65536)
        while select.select([self.master], [], [], 0)[0]:
            self.written += os.read(self.master, 65536)
        assert termios.tcgetattr(self._slave) == self.before
        return int(self.process.returncode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self._slave)


@contextmanager
def shown(width: int = 80, height: int = 24) -> Iterator[tuple[StandInDaemon, Terminal]]:
    with StandInDaemon() as daemon:
        daemon.shows(**sections())
        with Terminal(daemon.url, width, height) as terminal:
            terminal.read_until(lambda screen: "REQUEST" in screen and "lane2" in screen)
            yield daemon, terminal


def test_it_follows_the_daemon_and_ends_with_q() -> None:
    with shown() as (daemon, terminal):
        daemon.shows(instances=[ready("gpu0", phase="draining")])
        screen = terminal.read_until(lambda screen: "draining" in screen)
        assert len(screen.split("\n")) <= 24
        assert max(map(cell_len, screen.split("\n"))) <= 80
        os.write(terminal.master, b"xq")
        assert terminal.ended() == 0
        assert terminal.written.endswith(b"\x1b[?1049l\x1b[?25h") or b"\x1b[?1049l" in terminal.written[-64:]


@pytest.mark.parametrize("by", ["key", "signal"])
def test_an_interrupt_ends_it_as_well(by: str) -> None:
    with shown() as (_, terminal):
        if by == "key":
            os.write(terminal.master, b"\x03")
        else:
            terminal.process.send_signal(signal.SIGINT)
        assert terminal.ended() == 0
        assert b"\x1b[?1049l" in terminal.written[-64:], "the screen is given back"


def test_it_fills_a_terminal_that_grows() -> None:
    with shown() as (_, terminal):
        terminal.resize(150, 40)
        screen = terminal.read_until(lambda screen: "░" * 20 in screen)
        assert max(map(cell_len, screen.split("\n"))) == 150


def test_names_cannot_steer_a_real_terminal() -> None:
    with shown(150) as (daemon, terminal):
        daemon.shows(requests=[asked(0, project_id=HOSTILE)])
        terminal.read_until(lambda screen: "evil1m" in screen)
        for hostile in (b"\x1b[2J", b"\x1b]0;", b"\x07", "\u009b".encode(), "\u202e".encode()):
            assert hostile not in terminal.written
        assert "[red]evil1m line[/red]" in terminal.screen


def test_it_waits_for_a_daemon_that_went_away() -> None:
    with ExitStack() as stack:
        with StandInDaemon() as daemon:
            daemon.shows(**sections())
            terminal = stack.enter_context(Terminal(daemon.url, 80, 24))
            terminal.read_until(lambda screen: "REQUEST" in screen)
        terminal.read_until(lambda screen: "daemon unreachable for" in screen and "gpu2" in screen)
        again = stack.enter_context(StandInDaemon(daemon.port))
        again.shows(**sections(instances=1))
        terminal.read_until(lambda screen: "gpu0" in screen and "unreachable" not in screen)


def test_a_key_that_is_revoked_meanwhile_ends_it() -> None:
    with shown() as (daemon, terminal):
        daemon.answers[f"GET {API}/live"] = Answer(error("unauthorized", "the key was revoked"), 401)
        daemon.hang_up()
        assert terminal.ended() == 2
        assert b"the key was revoked" in terminal.written


def test_without_a_daemon_it_says_so() -> None:
    with Terminal("http://127.0.0.1:1", 80, 24) as terminal:
        assert terminal.ended() == 3
        assert b"cannot be reached" in terminal.written


def test_it_needs_a_terminal(run: Callable[..., Result], daemon: StandInDaemon) -> None:
    result = run("top", "--url", daemon.url)
    assert result.exit_code == 2
    assert "`top` needs a terminal" in result.output
    assert "status --watch" in result.output
