"""Which models there are on each volume, across stops and restarts."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from manager.domain.instance import Driver
from manager.domain.models import model_key
from manager.domain.swarm import volume_on_node
from manager.domain.target import Protocol
from manager.domain.volumes import models_mount
from manager.errors import RegistryUnwritableError
from manager.wire.details import details_of, lacks_details, with_details
from manager.wire.ollama import name_of, parameters_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manager.domain.instance import InstanceSpec
    from manager.domain.template import Volume
    from manager.services.instances.instance import Instance
    from manager.services.journal import Journal
    from manager.services.ports import Registry
    from manager.wire.details import Details

    Entries = Sequence[Mapping[str, Any]]

_RETRY_S = 5.0
_NO_SIZES: Mapping[str, int] = MappingProxyType({})


def volume_of(spec: InstanceSpec) -> str:
    """Return the key of what an instance keeps its models on: its volume, else the instance itself."""
    mount = mount_of(spec)
    if mount is None:
        return f"instance:{spec.id}"
    if spec.driver is Driver.SWARM:
        return volume_on_node(mount.source, spec.placement, spec.id)
    return mount.source


def mount_of(spec: InstanceSpec) -> Volume | None:
    """Return the volume that an instance keeps its models on; None where that is a matter of its own."""
    return None if spec.template is None else models_mount(spec.template)


def may_write(spec: InstanceSpec) -> bool:
    """Return whether an instance can change the models on its volume."""
    mount = mount_of(spec)
    return spec.protocol is Protocol.OLLAMA and (mount is None or not mount.read_only)


class ModelLists:
    """Owns the last list read of each volume.

    `version` grows whenever the names or the numbers of parameters in one of them change.

    Args:
        registry: keeps them.
        journal: is told when it does not.
        stored: volume -> what it has kept.
    """

    def __init__(self, registry: Registry, journal: Journal, stored: Mapping[str, Entries]) -> None:
        self._registry = registry
        self._journal = journal
        self._entries = {volume: _by_key(entries) for volume, entries in stored.items()}
        self._names = {volume: _names(entries) for volume, entries in self._entries.items()}
        self._sizes = {volume: _sizes(entries) for volume, entries in self._entries.items()}
        self._read_at: dict[str, float] = {}
        self._unsaved: set[str] = set()
        self._unstored: set[str] = set()  # lists that were read with `store=False`
        self._news = asyncio.Event()
        self.version = 0

    def of(self, volume: str) -> Mapping[str, str] | None:
        """The name of each model by its key, None when the list was never read."""
        return self._names.get(volume)

    def sizes(self, volume: str) -> Mapping[str, int]:
        """The number of parameters of each model by its key, of those whose number is known."""
        return self._sizes.get(volume, _NO_SIZES)

    def entries(self, volume: str) -> Mapping[str, Mapping[str, Any]]:
        """All that a server said of each model, by its key; nothing when the list was never read."""
        return self._entries.get(volume, {})

    def take(self, instance: Instance) -> None:
        """Take in what an instance has last listed of its volume, if it ever has."""
        if instance.listed is not None:
            self.read(volume_of(instance.spec), instance.listed, instance.listed_at)

    def read(self, volume: str, entries: Entries, at: float, *, store: bool = True) -> None:
        """Take in a list of that monotonic time; an older one changes nothing.

        Args:
            volume: where the models are.
            entries: of `/api/tags`.
            at: when the reading began.
            store: whether the next daemon is to have it.
        """
        if at <= self._read_at.get(volume, float("-inf")):
            return
        self._read_at[volume] = at
        known = self._entries.get(volume, {})
        models = MappingProxyType(
            {key: _kept(entry, known.get(key)) for key, entry in _by_key(entries).items()}
        )
        if models == known and volume in self._entries and volume not in self._unstored:
            return
        self._take(volume, models, store=store)

    def learn(self, digest: str, found: Details) -> None:
        """Add what is known of a model to its entries in all lists; it is kept as long as they name it."""
        for volume, entries in self._entries.items():
            changed = {
                key: with_details(entry, found)
                for key, entry in entries.items()
                if entry.get("digest") == digest and lacks_details(entry)
            }
            if changed:
                self._take(
                    volume,
                    MappingProxyType({**entries, **changed}),
                    store=volume not in self._unstored,
                )

    def _take(self, volume: str, models: Mapping[str, Mapping[str, Any]], *, store: bool) -> None:
        self._entries[volume] = models
        names, sizes = _names(models), _sizes(models)
        if names != self._names.get(volume) or sizes != self._sizes.get(volume):
            self._names[volume], self._sizes[volume] = names, sizes
            self.version += 1
        if store:
            self._unstored.discard(volume)
            self._unsaved.add(volume)
            self._news.set()
        else:
            self._unstored.add(volume)

    async def run(self) -> None:
        """Store what changed, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            volumes, self._unsaved = self._unsaved, set()
            failed: set[str] = set()
            for volume in sorted(volumes):
                try:
                    await self._registry.save_model_list(volume, tuple(self._entries[volume].values()))
                except RegistryUnwritableError as error:
                    failed.add(volume)
                    self._journal.record("model_list_not_stored", detail=f"{volume}: {error.message}")
            if failed:
                self._unsaved |= failed
                await asyncio.sleep(_RETRY_S)
                self._news.set()


def _by_key(entries: Entries) -> Mapping[str, Mapping[str, Any]]:
    return MappingProxyType({model_key(name): entry for entry in entries if (name := name_of(entry))})


def _kept(entry: Mapping[str, Any], known: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return an entry with the details that are known of the same model."""
    if known is None or known.get("digest") != entry.get("digest") or not lacks_details(entry):
        return entry
    return with_details(entry, details_of(known))


def _names(entries: Mapping[str, Mapping[str, Any]]) -> Mapping[str, str]:
    return MappingProxyType({key: name_of(entry) for key, entry in entries.items()})


def _sizes(entries: Mapping[str, Mapping[str, Any]]) -> Mapping[str, int]:
    found = ((key, parameters_of(entry)) for key, entry in entries.items())
    return MappingProxyType({key: count for key, count in found if count is not None})
