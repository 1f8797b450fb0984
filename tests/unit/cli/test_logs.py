"""The log as another program reads it: in a process of its own, because logging is set up for a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

KEY = 'an-operator-key-with-"quotes"'

PREAMBLE = """
import logging, sys, threading, warnings
from manager.cli.logs import configure_logging, silence
silence()
from manager.settings.model import LogSettings
import structlog
log = structlog.get_logger("daemon")
def configure(**settings):
    configure_logging(LogSettings(**settings), secrets=[KEY])
"""


def logged(program: str) -> subprocess.CompletedProcess[str]:
    source = f"KEY = {KEY!r}\n{PREAMBLE}\n{program}"
    return run("-W", "default", "-c", source)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)


def entries(program: str) -> list[dict[str, Any]]:
    done = logged(program)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_an_event_is_one_line_of_json_that_begins_with_time_level_logger_and_event() -> None:
    (entry,) = entries("configure(); log.info('ready', instance='cpu', detail='a\\nb\\u2028é')")
    assert list(entry) == ["ts", "level", "logger", "event", "instance", "detail"]
    assert entry["ts"].endswith("Z")
    assert entry | {"ts": ""} == {
        "ts": "", "level": "info", "logger": "daemon", "event": "ready",
        "instance": "cpu", "detail": "a\nb\u2028é",
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "json.dumps({'project_id': KEY})",
        "orjson.dumps({'model': KEY}).decode()",
        "'path=/api/chat?key=' + quote(KEY)",
        "'/key/' + quote(KEY, safe='')",
        "KEY * 2",
    ],
)
def test_a_line_that_was_finished_elsewhere_hides_the_key_too(line: str) -> None:
    """The lines of requests are such: a client chooses its project, its intent and the name of the model."""
    program = (
        "import json, orjson\nfrom urllib.parse import quote\n"
        "writer = configure_logging(LogSettings(), secrets=[KEY])\n"
        f"writer.write(({line} + '\\n').encode())"
    )
    (shown,) = logged(program).stderr.splitlines()
    assert "\u2026" in shown
    assert "operator-key" not in shown


def test_libraries_and_warnings_go_the_same_way() -> None:
    found = entries(
        "configure(); logging.getLogger('alembic.x').warning('said %s', 'so');"
        "warnings.warn('old', DeprecationWarning)"
    )
    assert [(one["logger"], one["level"]) for one in found] == [
        ("alembic.x", "warning"),
        ("py.warnings", "warning"),
    ]
    assert found[0]["event"] == "said so"


def test_chatty_libraries_are_heard_only_when_debugging_and_connections_never() -> None:
    talk = (
        "for name in ('uvicorn.error', 'apscheduler.scheduler', 'urllib3.connectionpool', 'docker.api'):\n"
        "    logging.getLogger(name).info('hello'); logging.getLogger(name).debug('hello')\n"
        "log.debug('own')"
    )
    assert entries(f"configure()\n{talk}") == []
    found = {one["logger"] for one in entries(f"configure(level='debug')\n{talk}")}
    assert found == {"uvicorn.error", "apscheduler.scheduler", "daemon"}


def test_the_level_hides_what_is_below_it() -> None:
    found = entries("configure(level='error'); log.warning('no'); log.error('yes')")
    assert [one["event"] for one in found] == ["yes"]


def test_secrets_are_never_logged() -> None:
    found = entries(
        "configure()\n"
        "log.info(f'key is {KEY}', api_key='s3cr3t', nested={'Authorization': 'Bearer s3cr3t'}, path='/k')\n"
        "log.info('url', url='http://user:s3cr3t@host/x', header='authorization: Bearer s3cr3t')\n"
        "log.info('header', header='X-API-Key: s3cr3t', tokens=5)\n"
        "try:\n    raise ValueError(KEY)\nexcept ValueError:\n    log.exception('failed')\n"
        "logging.getLogger('lib').error('Bearer s3cr3t %s', KEY)\n"
    )
    text = json.dumps(found)
    assert "s3cr3t" not in text
    assert "quotes" not in text
    assert found[0]["path"] == "/k"
    assert found[1]["url"] == "http://…@host/x"
    assert found[2]["tokens"] == 5


def test_an_exception_is_in_the_line_of_its_event() -> None:
    (entry,) = entries(
        "configure()\ntry:\n    raise ValueError('why')\nexcept ValueError:\n    log.exception('failed')"
    )
    assert entry["exception"].startswith("Traceback")
    assert "ValueError: why" in entry["exception"]


def test_a_thread_that_dies_is_logged_and_not_printed() -> None:
    (entry,) = entries(
        "configure()\nthread = threading.Thread(target=lambda: 1 / 0, name='docker-call')\n"
        "thread.start(); thread.join()"
    )
    assert entry["event"] == "the thread docker-call ended with an error"
    assert "ZeroDivisionError" in entry["exception"]


def test_the_console_is_readable_without_colours_where_nobody_sees_them() -> None:
    done = logged(
        "configure(format='console'); log.info('ready', instance='cpu', reason=None, said='\\x1b[2J!')"
    )
    assert "\x1b" not in done.stderr
    assert "ready" in done.stderr
    assert "instance=cpu" in done.stderr
    assert "said=!" in done.stderr
    assert "reason" not in done.stderr


def test_without_a_terminal_the_format_is_json_and_rich_is_not_imported() -> None:
    (entry,) = entries("configure(); log.info('modules', rich='rich' in sys.modules)")
    assert entry["rich"] is False


def test_nothing_is_printed_before_the_log_is_set_up() -> None:
    source = "from manager.cli.logs import silence; silence(); import structlog"
    done = run("-c", f"{source}; structlog.get_logger().error('x')")
    assert (done.stdout, done.stderr) == ("", "")


def test_a_log_that_cannot_be_written_stops_nobody() -> None:
    source = f"KEY = {KEY!r}\n{PREAMBLE}\nconfigure(); log.info('x'); print('done')"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=full, text=True, check=True,
            timeout=60, env=os.environ,
        )  # fmt: skip
    assert done.stdout == "done\n"


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize(
    "value",
    [
        "'\\ud800'",
        "b'\\xff'",
        "{(1, 2): 3}",
        "Hostile()",
        "circle",
        "deep",
        "object()",
        "2**70",
        "{'\\ud800': 1}",
    ],
)
def test_no_value_costs_the_line_of_another(form: str, value: str) -> None:
    done = logged(
        "class Hostile:\n"
        "    def __str__(self): raise RuntimeError('no text')\n"
        "    __repr__ = __str__\n"
        "circle = []; circle.append(circle)\n"
        "deep = []\n"
        "for _ in range(100_000): deep = [deep]\n"
        f"configure(format='{form}'); log.info('first')\n"
        f"log.info('this', value={value}); logging.getLogger('lib').info('that %s', {value})\n"
        "logging.getLogger('lib').info('%d', 'no number'); log.info('last')\n"
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    assert "first" in lines[0]
    assert "last" in lines[-1]
    assert "log_entry_not_rendered" in lines[3]
    if form == "json":
        assert all(json.loads(line)["level"] == "info" for line in lines)


def test_a_huge_entry_is_one_bounded_line() -> None:
    before, huge, after = entries(
        "configure(); log.info('a'); log.info('b', text='x' * 10_000_000); log.info('c')"
    )
    assert (before["event"], after["event"]) == ("a", "c")
    assert huge["event"] in ("b", "log_entry_not_rendered")
    assert len(json.dumps(huge)) < 256 * 1024


@pytest.mark.parametrize("key", ["e", "ts", "info", "7-chars"])
def test_a_short_key_is_hidden_by_name_and_leaves_the_rest_of_the_log_alone(key: str) -> None:
    (entry,) = entries(
        f"configure_logging(LogSettings(), secrets=[{key!r}])\n"
        f"log.info('the e info of 7-chars', api_key={key!r}, header='X-API-Key: {key}',"
        f" other='Authorization: Bearer {key}')"
    )
    assert (entry["level"], entry["logger"]) == ("info", "daemon")
    assert entry["event"] == "the e info of 7-chars"
    assert (entry["api_key"], entry["header"]) == ("…", "X-API-Key: …")
    assert entry["other"] == "Authorization: Bearer …"


def test_without_stderr_nothing_is_written_into_the_file_that_has_its_number(tmp_path: Path) -> None:
    source = f"KEY = {KEY!r}\n{PREAMBLE}\nother = open(sys.argv[1], 'wb')\n"
    source += "assert other.fileno() == 2, other.fileno()\nconfigure(); log.error('x')"
    argv = [sys.executable, "-c", source, str(tmp_path / "other")]
    subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *argv], check=True, timeout=60)
    assert (tmp_path / "other").read_bytes() == b""
