"""The log of the daemon: one JSON line an event on stderr, or a readable console on a terminal.

structlog and the standard library's logging, which libraries use, end in one handler and look alike. Keys are
`ts` (RFC 3339, UTC), `level`, `logger`, `event` and what belongs to the event. No secret gets through.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from manager.cli.failures import coloured, printable

if TYPE_CHECKING:
    from collections.abc import Collection, MutableMapping

    from manager.adapters.log_writer import LogWriter
    from manager.settings.model import LogSettings

    Entry = MutableMapping[str, Any]

HIDDEN = "…"
# A shorter secret is not looked for in finished lines.
SHORTEST_SECRET = 8
_MOST_SECRETS = 32

_FIRST_KEYS = ("ts", "level", "logger", "event")
_SECRET_NAME = re.compile(r"(?:^|[_-])(?:key|token|secret|password|authorization|cookie)s?$", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(?i)(\b(?:bearer|basic)\s+|x-api-key\W{1,4})[^\s,;\"']+|(?<=://)[^/\s@\"']+(?=@)|om_[\w-]{43}"
)
# A longer line is replaced by one that says so. A deep traceback has 20 KiB.
_MOST_LINE_CHARACTERS = 256 * 1024
# They tell of every connection and every tick at `info`; below `warning` only somebody who debugs wants them.
_CHATTY = ("apscheduler", "uvicorn", "tzlocal")
# They tell even more, and what they tell at `debug` contains headers.
_QUIET = ("urllib3", "docker", "requests", "asyncio", "filelock", "alembic", "sqlalchemy")


def silence() -> None:
    """Log nothing until `configure_logging`: structlog by itself writes to stdout, where results go.

    It is imported without rich, which it takes along wherever that is installed, for tracebacks: nothing of
    that is used here, and it costs a daemon some megabytes and every command a tenth of a second.
    """
    visible = "rich" in sys.modules
    if not visible:
        sys.modules["rich"] = None  # type: ignore[assignment]  # importing it now raises ImportError
    try:
        structlog = importlib.import_module("structlog")
    finally:
        if not visible:
            del sys.modules["rich"]
    if not structlog.is_configured():
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), cache_logger_on_first_use=False)


def configure_logging(
    settings: LogSettings,
    *,
    secrets: Collection[str] = (),
    least: str | None = None,
) -> LogWriter:
    """Send everything that is logged from now on to stderr, through the returned writer.

    Args:
        settings: format and level.
        secrets: texts that are hidden wherever they appear, unless they are shorter than `SHORTEST_SECRET`.
        least: a level that overrides a lower one of the settings.
    """
    silence()
    import structlog  # noqa: PLC0415  (see above)

    from manager.adapters.log_writer import LogWriter  # noqa: PLC0415

    writer = LogWriter(_stderr_descriptor(), secrets=_spellings(secrets), hidden=HIDDEN.encode())
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    if least is not None:
        level = max(level, logging.getLevelNamesMapping()[least.upper()])
    console = settings.format == "console" or (settings.format == "auto" and writer.is_terminal)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console, key="ts"),
        structlog.processors.UnicodeDecoder(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        # Loggers keep their class; the level may change later.
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    render = (
        _console_renderer(colours=writer.is_terminal and coloured(sys.stderr)) if console else _json_renderer
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            _Redactor(),
            render,
        ],
    )
    _route_standard_logging(_WriterHandler(writer, formatter, secrets), level)
    return writer


def reconfigure_logging(settings: LogSettings, secrets: Collection[str]) -> None:
    """Change the level of what is logged from now on, and hide more secrets."""
    root = logging.getLogger()
    _set_level(logging.getLevelNamesMapping()[settings.level.upper()])
    for handler in root.handlers:
        if isinstance(handler, _WriterHandler):
            for secret in secrets:
                handler.hide(secret)


def _stderr_descriptor() -> int | None:
    """None where stderr was closed before the start: its number may belong to another file by now."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None


class _WriterHandler(logging.Handler):
    """Renders each entry to a line and queues it. An entry that cannot be rendered costs its fields only."""

    def __init__(self, writer: LogWriter, formatter: logging.Formatter, secrets: Collection[str]) -> None:
        super().__init__()
        self._writer = writer
        self._secrets = [*secrets]
        self.setFormatter(formatter)

    def hide(self, secret: str) -> None:
        """Hide one more secret in all lines. The newest `_MOST_SECRETS` are hidden."""
        if secret not in self._secrets:
            self._secrets = [*self._secrets, secret][-_MOST_SECRETS:]
            self._writer.secrets = _spellings(self._secrets)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            problem = f"{len(line)} characters" if len(line) > _MOST_LINE_CHARACTERS else None
        except Exception as error:  # noqa: BLE001  (a foreign value may raise anything)
            problem = type(error).__name__
        if problem is not None:
            line = json.dumps(
                {
                    "ts": datetime.fromtimestamp(record.created, UTC).isoformat(),
                    "level": record.levelname.lower(),
                    "logger": record.name,
                    "event": "log_entry_not_rendered",
                    "place": f"{record.pathname}:{record.lineno}",
                    "problem": problem,
                }
            )
        self._writer.write(line.encode("utf-8", "backslashreplace") + b"\n")


def _route_standard_logging(handler: logging.Handler, level: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler]
    _set_level(level)
    logging.captureWarnings(capture=True)
    logging.raiseExceptions = False
    threading.excepthook = _log_thread_error
    sys.unraisablehook = _log_unraisable


def _set_level(level: int) -> None:
    logging.getLogger().setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _log_thread_error(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None:
        name = failed.thread.name if failed.thread else "unknown"
        error = (failed.exc_type, failed.exc_value, failed.exc_traceback)
        logging.getLogger("thread").error("the thread %s ended with an error", name, exc_info=error)


def _log_unraisable(failed: Any) -> None:
    what = failed.err_msg or "Exception ignored in"
    error = (failed.exc_type, failed.exc_value, failed.exc_traceback)
    logging.getLogger("python").error("%s %r", what, failed.object, exc_info=error)


class _Redactor:
    """Hides what looks like a secret: the values of keys that are named so, and credentials inside texts."""

    def __call__(self, _logger: Any, _method: str, entry: Entry) -> Entry:
        return {name: self._shown(name, value) for name, value in entry.items()}

    def _shown(self, name: str, value: Any) -> Any:
        if isinstance(value, str):
            if _SECRET_NAME.search(name):
                return HIDDEN
            return _SECRET_TEXT.sub(lambda match: (match[1] or "") + HIDDEN, value)
        if isinstance(value, bytes) and _SECRET_NAME.search(name):
            return HIDDEN
        if isinstance(value, dict):
            return {inner: self._shown(str(inner), one) for inner, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._shown(name, one) for one in value]
        return value


def _spellings(secrets: Collection[str]) -> list[bytes]:
    """Return how secrets may be spelled in a finished line, the longest first.

    A short secret is part of many words. To replace it everywhere would garble the line, and show the secret
    to everyone who compares two lines. It is hidden by name only (`_Redactor`).
    """
    long = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]
    found = {
        spelt
        for secret in long
        for spelt in (
            secret,
            json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1],
            quote(secret),
            quote(secret, safe=""),
        )
    }
    return sorted((spelt.encode() for spelt in found), key=len, reverse=True)


def _json_renderer(_logger: Any, _method: str, entry: Entry) -> str:
    # ASCII only: a line stays valid JSON whatever encoding stderr has.
    ordered = {name: entry.pop(name) for name in _FIRST_KEYS if name in entry}
    return json.dumps(ordered | dict(entry), default=str)


def _console_renderer(*, colours: bool) -> Any:
    import structlog.dev  # noqa: PLC0415  (only for people)

    render = structlog.dev.ConsoleRenderer(
        colors=colours,
        timestamp_key="ts",
        pad_event_to=24,
        exception_formatter=structlog.dev.plain_traceback,
        sort_keys=False,
    )

    def readable(logger: Any, method: str, entry: Entry) -> str:
        shown = {
            name: printable(value) if isinstance(value, str) else value
            for name, value in entry.items()
            if value is not None
        }
        return str(render(logger, method, shown))

    return readable
