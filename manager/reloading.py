"""Reads the configuration again on SIGHUP, and a new key from the key file when that changes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import structlog

from manager.errors import ConfigurationError
from manager.settings import key_weaknesses, load_templates, read_key
from manager.settings.changes import changes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from manager.domain.template import Template
    from manager.settings import LoadedSettings, Settings
    from manager.settings.changes import Changes

_log = structlog.get_logger("reload")

_KEY_CHECK_S = 2.0

Signature = tuple[int, int, int, int] | None


class Applies(Protocol):
    """Puts what changed in force. `key` is the content of the key file, None without one."""

    def __call__(self, changed: Changes, key: str | None) -> None: ...


class Reloader:
    """Owns what is in force. `run` goes on until cancelled; nothing that is wrong with a file ends it.

    Files are read in a thread. An invalid configuration changes nothing. Keys that cannot change while the
    daemon runs are named in a warning, at each reload, until it is restarted or they have their old values.

    Args:
        running: the configuration that the daemon was started with.
        templates: its templates.
        key: the key in force.
        read: reads the configuration from all its sources again; None: it cannot be read again.
        apply: puts it in force, on the event loop.
        new_key: puts a new key in force.
    """

    def __init__(
        self,
        running: LoadedSettings,
        templates: Mapping[str, Template],
        key: str | None,
        *,
        read: Callable[[], LoadedSettings] | None,
        apply: Applies,
        new_key: Callable[[Settings, str], None],
    ) -> None:
        self._running = running
        self._templates = templates
        self._key = key
        self._read = read
        self._apply = apply
        self._new_key = new_key
        self._asked = asyncio.Event()
        self._seen: Signature = None

    @property
    def in_force(self) -> tuple[LoadedSettings, str | None]:
        """The configuration and the key in force."""
        return self._running, self._key

    def ask(self) -> None:
        """Have the configuration read again soon; several calls before that count as one."""
        self._asked.set()

    async def run(self) -> None:
        # The first look reads the key again: it may have changed while the daemon was starting.
        while True:
            try:
                async with asyncio.timeout(_KEY_CHECK_S):
                    await self._asked.wait()
            except TimeoutError:
                await self._guarded(self._reread_key)
            else:
                self._asked.clear()
                await self._guarded(self._reload)

    async def _guarded(self, work: Callable[[], object]) -> None:
        try:
            await work()  # type: ignore[misc]
        except ConfigurationError as error:
            _log.error("reload_refused", problem=error.message, hint="nothing was changed")
        except Exception:  # noqa: BLE001  (a reload that fails must not end a daemon that works)
            _log.exception("reload_failed", hint="what was in force may still be")

    async def _reload(self) -> None:
        if self._read is None:
            return
        wanted = await asyncio.to_thread(self._read)
        wanted_templates = await asyncio.to_thread(load_templates, wanted.settings)
        await asyncio.to_thread(_check, wanted, wanted_templates)
        try:
            changed = changes(
                self._running, wanted, templates=self._templates, wanted_templates=wanted_templates
            )
        except ConfigurationError as error:
            _log.warning(
                "reload_needs_restart",
                problem=error.message,
                hint="nothing was changed: what could change now does not fit what needs a restart",
            )
            return
        file = changed.loaded.settings.server.key_file
        seen = await asyncio.to_thread(_signature, file)
        key = await asyncio.to_thread(read_key, file) if file is not None else None
        weak = await asyncio.to_thread(key_weaknesses, file, key) if file is not None and key else ()
        self._apply(changed, key)
        self._running, self._key, self._seen = changed.loaded, key, seen
        log_weak_key(weak)
        _log.info("reloaded", applied=list(changed.applied), file=str(changed.loaded.file))
        if changed.waiting:
            _log.warning(
                "reload_needs_restart",
                waiting=list(changed.waiting),
                hint="the daemon uses the old values of these until it is restarted",
            )

    async def _reread_key(self) -> None:
        file = self._running.settings.server.key_file
        if file is None or (seen := await asyncio.to_thread(_signature, file)) == self._seen:
            return
        is_first, self._seen = self._seen is None, seen  # a file that is wrong is reported once
        key = await asyncio.to_thread(read_key, file)
        if not is_first or key != self._key:  # the start has reported the first one
            log_weak_key(await asyncio.to_thread(key_weaknesses, file, key))
        if key != self._key:
            self._new_key(self._running.settings, key)
            self._key = key
            _log.info("key_reread", file=str(file))


def log_weak_key(weaknesses: Iterable[str]) -> None:
    """Log what is wrong with a key that works; see `key_weaknesses`."""
    for weakness in weaknesses:
        _log.warning("weak_key", detail=weakness)


def _check(wanted: LoadedSettings, templates: Mapping[str, Template]) -> None:
    from manager.settings import resolve_instances  # noqa: PLC0415

    resolve_instances(wanted, templates)


def _signature(file: Path | None) -> Signature:
    """The identity of a file, which a new content or a replacement changes; None where it cannot be read."""
    if file is None:
        return None
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
