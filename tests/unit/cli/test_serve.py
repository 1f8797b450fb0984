"""`serve` as a process: how it ends, and what it writes where."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import requests

from manager.adapters.locks import StateDirLock
from tests.support.daemon import wait_for
from tests.support.users import need_root

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT_S = 120
KEY = "a-key-that-nobody-may-see"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with an unused port, a key and no engine."""
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path / "c.yaml"
    file.write_text(f"server: {{port: {port}, key_file: key}}\nstate: {{dir: state}}\n")
    return file


@contextmanager
def process(*argv: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def ended(*argv: str) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr."""
    with process(*argv) as running:
        out, err = running.communicate(timeout=LIMIT_S)
        return running.returncode, out, err.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_every_line_of_the_log_is_json(config: Path, number: int) -> None:
    with process("-m", "manager", "serve", "--config", str(config)) as running:
        assert running.stderr is not None
        lines = [running.stderr.readline()]
        while json.loads(lines[-1])["event"] != "serving":
            lines.append(running.stderr.readline())
        url = json.loads(lines[-1])["url"]
        assert requests.get(f"{url}/healthz", timeout=LIMIT_S).ok  # it serves, so it has its own handlers
        running.send_signal(number)
        out, rest = running.communicate(timeout=LIMIT_S)
    assert (running.returncode, out) == (0, "")
    events = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    assert events[-1]["event"] == "ended"
    assert {"ts", "level", "logger", "event"} <= set(events[0])
    assert KEY not in "".join([*lines, rest])


def test_a_state_directory_that_is_held_is_exit_4_and_names_the_holder(config: Path, tmp_path: Path) -> None:
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        code, out, err = ended("-m", "manager", "serve", "--config", str(config))
    finally:
        lock.release()
    assert (code, out) == (4, "")
    assert err[0].startswith(f"error: the state directory {tmp_path}/state is in use by process ")
    assert len(err) == 2
    assert "`ollama-manager serve --replace`" in err[1]


def test_a_port_that_is_taken_is_exit_1_with_the_way_out(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = ended("-m", "manager", "serve", "--config", str(config), "--port", str(port))
    assert code == 1
    (line,) = [line for line in err if line.startswith("error: ")]
    assert line == f"error: cannot listen on http://127.0.0.1:{port}: Address already in use"
    assert "--port" in err[err.index(line) + 1]


def test_a_corrupt_registry_is_exit_1_with_the_command_that_sets_it_aside(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "registry.sqlite3").write_bytes(b"this is no database")
    code, _, err = ended("-m", "manager", "serve", "--config", str(config))
    assert code == 1
    (line,) = [line for line in err if line.startswith("error: ")]
    assert "mv -n" in line
    assert (tmp_path / "state" / "registry.sqlite3").read_bytes() == b"this is no database"


@pytest.mark.timeout(60)
def test_a_registry_that_is_a_fifo_is_exit_1_at_once(config: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    os.mkfifo(tmp_path / "state" / "registry.sqlite3")
    code, _, err = ended("-m", "manager", "serve", "--config", str(config))
    assert code == 1
    (line,) = [line for line in err if line.startswith("error: ")]
    assert "registry.sqlite3 is a FIFO; expected a regular file" in line
    assert "mv -n" in line


def test_a_first_start_on_a_full_disk_is_exit_1_with_a_plain_sentence(config: Path, tmp_path: Path) -> None:
    need_root()
    disk = tmp_path / "state"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(disk)], check=True)
    try:
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        code, out, err = ended("-m", "manager", "serve", "--config", str(config))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert (code, out) == (1, "")
    (line,) = [line for line in err if not line.startswith("{")]
    assert line == (
        f"error: the registry {disk}/registry.sqlite3 could not be created: "
        "the disk is full (database or disk is full)"
    )


def test_a_state_directory_that_others_can_write_to_is_exit_2(config: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    code, out, err = ended("-m", "manager", "serve", "--config", str(config))
    assert (code, out) == (2, "")
    assert err[-1].startswith(f"error: the state directory {tmp_path}/state cannot be used: others may write")
    assert list((tmp_path / "state").iterdir()) == []


def test_readyz_turns_503_when_the_registry_is_deleted_and_back_when_it_is_restored(
    config: Path, tmp_path: Path
) -> None:
    registry = tmp_path / "state" / "registry.sqlite3"
    with process("-m", "manager", "serve", "--config", str(config)) as running:
        assert running.stderr is not None
        while json.loads(line := running.stderr.readline())["event"] != "serving":
            pass
        url = json.loads(line)["url"]

        def registry_reasons() -> list[str]:
            answer = requests.get(f"{url}/readyz", headers={"X-API-Key": KEY}, timeout=LIMIT_S).json()
            return [reason for reason in answer["reasons"] if reason.startswith("registry: ")]

        assert registry_reasons() == []
        aside = registry.rename(tmp_path / "aside")
        (reason,) = wait_for(registry_reasons)
        assert "registry.sqlite3 is gone" in reason
        shutil.copy(aside, registry)
        wait_for(registry_reasons, lambda reasons: "was replaced by another file" in "".join(reasons))
        aside.rename(registry)
        wait_for(registry_reasons, lambda reasons: reasons == [])


def test_listening_for_others_without_a_key_is_exit_2(tmp_path: Path) -> None:
    code, _, err = ended("-m", "manager", "serve", "--host", "0.0.0.0")
    assert code == 2
    assert "set server.key_file" in err[0]


def test_a_loop_that_dies_is_exit_1_with_the_traceback_in_the_log_only(config: Path) -> None:
    source = (
        "import sys, manager.daemon, manager.cli\n"
        "async def serve(loaded, **_):\n"
        "    raise BaseExceptionGroup('loops', [ExceptionGroup('inner', [ValueError('it broke')])])\n"
        "manager.daemon.serve = serve\n"
        "sys.argv = ['ollama-manager', 'serve', '--config', sys.argv[1]]\n"
        "manager.cli.main()\n"
    )
    code, out, err = ended("-c", source, str(config))
    assert (code, out) == (1, "")
    logged, *told = err
    assert json.loads(logged)["level"] == "critical"
    assert "ValueError: it broke" in json.loads(logged)["exception"]
    assert told[0] == "error: the daemon ended because of a defect: ValueError: it broke"
    assert not any("Traceback" in line for line in told)
