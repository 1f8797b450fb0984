"""Reads the configuration again on SIGHUP, and the keys from the key files when these change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import structlog

from manager.errors import ConfigurationError
from manager.settings import key_weaknesses, load_templates, read_keys
from manager.settings.changes import changes
from manager.settings.signatures import signature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from manager.domain.template import Template
    from manager.settings import LoadedSettings, Settings
    from manager.settings.changes import Changes
    from manager.settings.signatures import Signature

_log = structlog.get_logger("reload")

_KEY_CHECK_S = 0.5


class Applies(Protocol):
    """Puts what changed in force. `keys` are those of the key files."""

    def __call__(self, changed: Changes, keys: tuple[str, ...]) -> None: ...


class Reloader:
    """Owns what is in force. `run` goes on until cancelled; nothing that is wrong with a file ends it.

    Files are read in a thread. An invalid configuration changes nothing. Keys that cannot change while the
    daemon runs are named in a warning, at each reload, until it is restarted or they have their old values.

    Args:
        running: the configuration that the daemon was started with.
        templates: its templates.
        keys: those of the key files that are in force.
        read: reads the configuration from all its sources again; None: it cannot be read again.
        apply: puts it in force, on the event loop.
        new_keys: puts new keys of the files in force, in place of the earlier ones.
    """

    def __init__(
        self,
        running: LoadedSettings,
        templates: Mapping[str, Template],
        keys: tuple[str, ...],
        *,
        read: Callable[[], LoadedSettings] | None,
        apply: Applies,
        new_keys: Callable[[Settings, tuple[str, ...]], None],
    ) -> None:
        self._running = running
        self._templates = templates
        self._keys = keys
        self._read = read
        self._apply = apply
        self._new_keys = new_keys
        self._asked = asyncio.Event()
        self._seen: Signature | None = None

    @property
    def in_force(self) -> tuple[LoadedSettings, tuple[str, ...]]:
        """The configuration and the keys in force."""
        return self._running, self._keys

    def ask(self) -> None:
        """Have the configuration read again soon; several calls before that count as one."""
        self._asked.set()

    async def run(self) -> None:
        # The first look reads the keys again: they may have changed while the daemon was starting.
        while True:
            try:
                async with asyncio.timeout(_KEY_CHECK_S):
                    await self._asked.wait()
            except TimeoutError:
                await self._guarded(self._reread_keys)
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
        files = changed.loaded.settings.server.key_files
        seen = await asyncio.to_thread(signature, files)
        keys = await asyncio.to_thread(read_keys, files)
        weak = await asyncio.to_thread(key_weaknesses, files, keys)
        self._apply(changed, keys)
        self._running, self._keys, self._seen = changed.loaded, keys, seen
        log_weak_key(weak)
        _log.info("reloaded", applied=list(changed.applied), file=str(changed.loaded.file))
        if changed.waiting:
            _log.warning(
                "reload_needs_restart",
                waiting=list(changed.waiting),
                hint="the daemon uses the old values of these until it is restarted",
            )

    async def _reread_keys(self) -> None:
        files = self._running.settings.server.key_files
        if not files or (seen := await asyncio.to_thread(signature, files)) == self._seen:
            return
        is_first, self._seen = self._seen is None, seen  # a file that is wrong is reported once
        keys = await asyncio.to_thread(read_keys, files)
        if not is_first or keys != self._keys:  # the start has reported the first ones
            log_weak_key(await asyncio.to_thread(key_weaknesses, files, keys))
        if keys != self._keys:
            self._new_keys(self._running.settings, keys)
            self._keys = keys
            _log.info("key_reread", file=", ".join(map(str, files)), count=len(keys))


def log_weak_key(weaknesses: Iterable[str]) -> None:
    """Log what is wrong with a key that works; see `key_weaknesses`."""
    for weakness in weaknesses:
        _log.warning("weak_key", detail=weakness)


def _check(wanted: LoadedSettings, templates: Mapping[str, Template]) -> None:
    from manager.settings import resolve_instances  # noqa: PLC0415

    resolve_instances(wanted, templates)
