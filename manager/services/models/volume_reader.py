"""Lists the models of volumes that no server has listed yet. Nothing is started for it.

The engine hands out files of a container that was created and never started, its mounts included. Only
manifests and config blobs are read. What a server lists later takes precedence.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog

from manager.domain.container import LABEL_READER, reader_request
from manager.domain.instance import Driver
from manager.domain.models import model_key
from manager.domain.volumes import model_store
from manager.errors import ArchiveTooLargeError, EngineError, Reason
from manager.services.models.model_lists import mount_of, volume_of
from manager.wire import model_store as stores
from manager.wire.model_store import Manifest, ManifestReference, UnreadableStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from manager.domain.template import Template, Volume
    from manager.services.instances.engine_link import EngineLink
    from manager.services.instances.first_look import FirstLook
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.journal import Journal
    from manager.services.models.model_lists import ModelLists
    from manager.services.ports import Archive, Engine
    from manager.wire.model_store import ManifestFile

_log = structlog.get_logger("volumes")

# A manifest takes about 2.5 KiB of a tar archive, so that this is enough for `stores.MAX_MODELS`.
_MAX_MANIFESTS_BYTES = 16 * 2**20
# The blocks around a file in a tar archive.
_MAX_TAR_BYTES = 16 * 1024
_MAX_MANIFEST_BYTES = stores.MAX_MANIFEST_BYTES + _MAX_TAR_BYTES
# Real config blobs have less than a kilobyte.
_MAX_CONFIG_BYTES = 64 * 1024 + _MAX_TAR_BYTES
# Details cost two calls of about 0.06 s a model. The others are listed without them.
_MAX_DETAILED = 500
# A volume that could not be read is not tried again before this.
_RETRY_S = 30.0
_UNKNOWN = Manifest(0, None, "")


class VolumeReader:
    """Owns the readings of volumes, one at a time. `run` must go on while they are asked for.

    A list is taken whole or not at all; a volume without a store of models counts as never read. Where only
    the names could be read, they count, and the details are tried again.

    Args:
        fleet: its instances say which volumes there are.
        engine: reads them.
        lists: takes the models.
        journal: takes an event for each reading.
        manager_id: marks the containers, for `run` to remove those that an earlier daemon has left.
        now: seconds on a monotonic clock.
    """

    def __init__(
        self,
        fleet: Fleet,
        link: EngineLink,
        first_look: FirstLook,
        engine: Engine,
        lists: ModelLists,
        *,
        journal: Journal,
        manager_id: str,
        now: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._link = link
        self._first_look = first_look
        self._engine = engine
        self._lists = lists
        self._journal = journal
        self._manager_id = manager_id
        self._now = now
        self._wanted: asyncio.Queue[str] = asyncio.Queue()
        # By volume: all of these are bounded by the number of volumes in the configuration.
        self._pending: dict[str, asyncio.Event] = {}
        self._tried_at: dict[str, float] = {}
        self._troubles: dict[str, str] = {}
        self._without_details: set[str] = set()
        self._has_leftovers = True  # an earlier daemon may have been killed while it read

    async def run(self) -> None:
        """Read every volume that was never listed, then those that are asked for, until cancelled."""
        await self._link.came_up.wait()
        await self._remove_leftovers()
        for volume in self._unread():
            self._want(volume)
        while True:
            volume = await self._wanted.get()
            try:
                await self._try(volume)
            finally:
                self._pending.pop(volume).set()

    async def look(self, *, within_s: float, volume: str | None = None) -> None:
        """Have volumes that were never listed read, and wait for it at most `within_s`.

        Details that are missing are read as well, and not waited for.

        Args:
            within_s: the wait for the first look at the engine included.
            volume: the only one that matters; None for all.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._first_look.known(within_s=within_s)
                for one in self._without_details.copy():
                    if volume in (None, one):
                        self._want(one)
                wanted = [one for one in self._unread() if volume in (None, one)]
                for event in [event for one in wanted if (event := self._want(one)) is not None]:
                    await event.wait()

    # --- helpers, in call order ---

    async def _remove_leftovers(self) -> None:
        """Remove containers that a killed daemon has left, or whose removal failed after a reading."""
        if not self._has_leftovers:
            return
        try:
            left = await self._engine.list_containers(self._manager_id, label=LABEL_READER)
            for container in left:
                await self._engine.remove(container.id)
        except EngineError as error:
            _log.warning("readers_not_removed", detail=error.message)
        else:
            self._has_leftovers = False

    def _unread(self) -> list[str]:
        """Return the volumes that were never listed, in the order of the configuration."""
        instances = (one for one in self._fleet.instances() if one.spec.driver is Driver.DOCKER)
        mounted = (one for one in instances if mount_of(one.spec) is not None)
        volumes = dict.fromkeys(volume_of(one.spec) for one in mounted)
        return [volume for volume in volumes if self._lists.of(volume) is None]

    def _want(self, volume: str) -> asyncio.Event | None:
        """Return what is set once a volume was tried; None where trying it now is of no use."""
        pending = self._pending.get(volume)
        if pending is None and self._link.up:
            if self._now() - self._tried_at.get(volume, -math.inf) < _RETRY_S:
                return None
            pending = self._pending[volume] = asyncio.Event()
            self._wanted.put_nowait(volume)
        return pending

    async def _try(self, volume: str) -> None:
        try:
            await self._remove_leftovers()
            await self._read(volume)
        except (EngineError, UnreadableStoreError) as error:
            trouble = error.message if isinstance(error, EngineError) else str(error)
            if self._troubles.get(volume) != trouble:
                reason = error.reason if isinstance(error, EngineError) else None
                part = "only the names were read: " if volume in self._without_details else ""
                self._journal.record("volume_not_read", reason=reason, detail=f"{volume}: {part}{trouble}")
            self._troubles[volume] = trouble
        else:
            self._without_details.discard(volume)
        finally:
            self._tried_at[volume] = self._now()

    async def _read(self, volume: str) -> None:
        """Read a volume through the first image that is there."""
        on_it = [one for one in self._fleet.instances() if volume_of(one.spec) == volume]
        if any(one.usable_endpoint() is not None for one in on_it):
            return  # its server lists it
        missing: EngineError | None = None
        for template, mount in _by_image(on_it):
            if not mount.is_bind and not await self._engine.has_volume(mount.source):
                return
            try:
                await self._read_through(volume, template, mount)
            except EngineError as error:
                if error.reason is not Reason.IMAGE_MISSING:
                    raise
                missing = missing or error
            else:
                return
        if missing is not None:
            raise missing

    async def _read_through(self, volume: str, template: Template, mount: Volume) -> None:
        began = self._now()
        # A name of its own: whatever somebody else has is not in the way.
        name = f"{self._manager_id}-reader-{uuid.uuid4().hex[:12]}"
        request = reader_request(template, mount, manager_id=self._manager_id, name=name)
        try:
            await self._engine.create(request)
            store = _Store(self._engine, name, model_store(template))
            files = await store.manifests()
            if files is None:
                return
            # The names come first: details take their time.
            names = await asyncio.to_thread(_briefs, files)
            self._lists.read(volume, names, began, store=False)
            self._without_details.add(volume)
            entries = await store.entries(files)
            self._lists.read(volume, entries, math.nextafter(began, math.inf))
            self._journal.record("volume_read", detail=f"{volume}: {len(entries)} models")
        finally:
            await self._remove(name)

    async def _remove(self, name: str) -> None:
        """Remove the container of a reading. Where that fails, it is tried again before the next reading."""
        try:
            await self._engine.remove(name)
        except EngineError as error:
            _log.warning("reader_not_removed", container=name, detail=error.message)
            self._has_leftovers = True


class _Store:
    """The store of models in one container."""

    def __init__(self, engine: Engine, container: str, directory: str) -> None:
        self._engine = engine
        self._container = container
        self._directory = directory

    async def manifests(self) -> list[ManifestFile] | None:
        """Return the manifests, newest first and each model once; None where there is no store."""
        found: dict[str, ManifestFile] = {}
        is_there = False
        for folder in stores.MANIFEST_FOLDERS:
            archive = await self._archive(folder, _MAX_MANIFESTS_BYTES)
            if archive is not None:
                is_there = True
                # Megabytes, at worst: too much for the event loop.
                for file in await asyncio.to_thread(stores.manifest_files, archive.tar, folder):
                    found.setdefault(model_key(file.name), file)
        return sorted(found.values(), key=lambda one: one.modified_at, reverse=True) if is_there else None

    async def entries(self, files: Sequence[ManifestFile]) -> list[dict[str, Any]]:
        """Return the entries of `/api/tags`. A model that Ollama would not list has none."""
        detailed = [await self._detailed(file) for file in files[:_MAX_DETAILED]]
        return [entry for entry in detailed if entry is not None] + _briefs(files[_MAX_DETAILED:])

    async def _detailed(self, file: ManifestFile) -> dict[str, Any] | None:
        archive = await self._archive(
            file.path if file.blob is None else f"{stores.BLOB_FOLDER}/{file.blob}", _MAX_MANIFEST_BYTES
        )
        content = None if archive is None else stores.only_file(archive.tar)
        manifest = None if content is None else await self._manifest(content)
        if archive is None or content is None or manifest is None:
            return None
        config = None
        if manifest.config is not None:
            try:
                config = await self._blob(manifest.config, _MAX_CONFIG_BYTES)
            except ArchiveTooLargeError:
                _log.warning("config_not_read", model=file.name, detail=f"{manifest.config} is too large")
            else:
                if config is None:
                    return None
        modified_at = stores.modified_at(archive.stat) or file.modified_at
        return stores.list_entry(file, manifest, stores.digest_of(content), modified_at, config)

    async def _manifest(self, content: bytes) -> Manifest | None:
        manifest = stores.read_manifest(content)
        if isinstance(manifest, ManifestReference):
            child = await self._blob(manifest.blob, _MAX_MANIFEST_BYTES)
            manifest = None if child is None else stores.read_manifest(child)
        return manifest if isinstance(manifest, Manifest) else None

    async def _blob(self, name: str, most_bytes: int) -> bytes | None:
        archive = await self._archive(f"{stores.BLOB_FOLDER}/{name}", most_bytes)
        return None if archive is None else stores.only_file(archive.tar)

    async def _archive(self, path: str, most_bytes: int) -> Archive | None:
        return await self._engine.read_archive(self._container, f"{self._directory}/{path}", most_bytes)


def _by_image(instances: Sequence[Instance]) -> list[tuple[Template, Volume]]:
    """Return a template for each image, with its mount of the volume."""
    found: dict[str, tuple[Template, Volume]] = {}
    for one in instances:
        template, mount = one.spec.template, mount_of(one.spec)
        if template is not None and mount is not None:
            found.setdefault(template.image, (template, mount))
    return list(found.values())


def _briefs(files: Sequence[ManifestFile]) -> list[dict[str, Any]]:
    """Return the entries of models without details, out of their manifests alone."""
    return [entry for file in files if (entry := _brief(file)) is not None]


def _brief(file: ManifestFile) -> dict[str, Any] | None:
    if file.blob is not None:
        digest = file.blob.removeprefix("sha256-")
        return stores.list_entry(file, _UNKNOWN, digest, file.modified_at, None)
    manifest = stores.read_manifest(file.content)
    if manifest is None:
        return None
    known = manifest if isinstance(manifest, Manifest) else _UNKNOWN
    return stores.list_entry(file, known, stores.digest_of(file.content), file.modified_at, None)
