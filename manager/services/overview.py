"""One immutable overview of all instances, cards, lanes and models: what the API, metrics and pages show."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from manager.domain.instance import Health, Phase, Target
from manager.domain.models import model_key
from manager.services.instances.supervisor import Supervisor
from manager.services.models.model_lists import may_write, volume_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from manager.domain.gpu import Gpu, Holder
    from manager.domain.instance import ContainerFacts, InstanceSpec
    from manager.domain.lifted import Lifted
    from manager.domain.orphans import Orphan
    from manager.domain.roles import RequestKind
    from manager.services.gpus import Gpus, GpuSnapshot
    from manager.services.gpus.cards import GpuTrouble
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.engine_link import EngineLink
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance, View
    from manager.services.models.model_lists import ModelLists
    from manager.services.routing.breakers import Breakers, BreakerView
    from manager.services.routing.router import SettingsSource

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InstanceState:
    """One instance.

    `is_usable` is whether leases can be had without a start. `gpus` are the last readings of the cards of the
    view, in their order; None for a card that was never read. The starts are those since the daemon began.
    `lifted` is the order that its deny rules do not hold, None while they do. `loading` are the models that
    are being loaded on it, by their keys. `node` is the host name of the node of its service, None where it
    is no service of Docker Swarm, or has no node yet.
    """

    view: View
    is_usable: bool
    gpus: tuple[Gpu | None, ...]
    starts_done: int
    starts_failed: int
    breaker: BreakerView
    lifted: Lifted | None = None
    loading: tuple[str, ...] = ()
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """One card, and the processes that hold its memory.

    `reserved_bytes` were promised and are not held yet, None where that cannot be told.
    """

    gpu: Gpu
    holders: tuple[Holder, ...]
    reserved_bytes: int | None = 0


@dataclass(frozen=True, slots=True)
class Lane:
    """A role that requests can name, and the model that it has."""

    name: str
    kind: RequestKind
    model: str | None
    target: str | None


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """A model on one volume, and the instances that see it there.

    `entry` is what a server last said of it there; `may_change` is whether one of the instances can delete
    or copy it.
    """

    volume: str
    instances: tuple[str, ...]
    entry: Mapping[str, Any]
    may_change: bool


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model, the instances that have it, and those of them that hold it in memory.

    `entry` is what a server last said of it. `offload` is the largest share of it in a card's memory, None
    where it is not loaded. `digests` are the instances that have it by its digest there: with more than one,
    the same name is different models. `places` are the volumes that it is on, in the order of the instances.
    """

    entry: Mapping[str, Any]
    instances: tuple[str, ...]
    loaded_on: tuple[str, ...]
    offload: float | None
    digests: Mapping[str, tuple[str, ...]]
    places: tuple[ModelPlace, ...] = ()


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything at one moment. `revision` grows with each change of what is shown.

    Clocks and sensors advance no revision: the rest of a TTL, the moments of the last use and the last
    answer, and the sensors of cards. `cards` is another object where a sensor has moved.
    """

    revision: int
    instances: tuple[InstanceState, ...]
    cards: tuple[Card, ...]
    cards_trouble: GpuTrouble | None
    lanes: tuple[Lane, ...]
    models: Mapping[str, ModelState]
    orphans: tuple[Orphan, ...]
    engine_up: bool


def nowhere(_spec: InstanceSpec, _container: ContainerFacts | None) -> None:
    """Name no node: there is no swarm."""


def _never(_instance_id: str) -> None:
    """Lift no rules."""


class _Part(Generic[T]):
    """A value and what it was built from."""

    def __init__(self) -> None:
        self._built_from: object = None
        self._value: T | None = None

    def of(self, sources: object, build: Callable[[], T]) -> T:
        """Return the value, built anew if `sources` differ from those of the last time."""
        if self._value is None or self._built_from != sources:
            self._value, self._built_from = build(), sources
        return self._value


class Overviews:
    """Owns the latest overview.

    A reading takes the view of each instance (64 take about half a millisecond), so that it is never out of
    date. What is derived from them is built again only after a change.

    Args:
        fleet: the instances.
        capacity: knows which of them wait for a place.
        links: the engines and the orphans.
        gpus: the cards, of each engine.
        lists: the models of each volume.
        settings: the lanes.
        lifted: the order that lifts the deny rules of an instance, None where they hold.
        breakers: of the instances.
        loading: the models that are being loaded, by their instance.
        node: the host name of the node of an instance, None where it has none.
    """

    def __init__(
        self,
        fleet: Fleet,
        capacity: Capacity,
        links: Sequence[EngineLink],
        gpus: Sequence[Gpus],
        *,
        lists: ModelLists,
        settings: SettingsSource,
        lifted: Callable[[str], Lifted | None] = _never,
        breakers: Breakers,
        loading: Callable[[], Mapping[str, tuple[str, ...]]] = dict,
        node: Callable[[InstanceSpec, ContainerFacts | None], str | None] = nowhere,
    ) -> None:
        self._lifted = lifted
        self._fleet = fleet
        self._capacity = capacity
        self._links = tuple(links)
        self._lists = lists
        self._settings = settings
        self._breakers = breakers
        self._loading = loading
        self._node = node
        self._readings = tuple(_Reading(one) for one in gpus)
        self._cards: tuple[Card, ...] = ()
        self._lanes: _Part[tuple[Lane, ...]] = _Part()
        self._models: _Part[Mapping[str, ModelState]] = _Part()
        self._shown: tuple[object, ...] = ()
        self._latest: Overview | None = None

    def current(self) -> Overview:
        """Return the overview of this moment: the same object while nothing has changed."""
        loading = self._loading()
        instances = tuple([self._state(one, loading) for one in self._fleet.instances()])
        trouble = next((one.gpus.trouble for one in self._readings if one.gpus.trouble is not None), None)
        orphans = tuple(orphan for link in self._links for orphan in link.orphans)
        needed = [link for link in self._links if link.is_needed] or self._links[:1]
        is_up = all(link.up for link in needed)
        cards = self._read_cards()
        lanes = self._lanes.of(self._settings.version, self._read_lanes)
        models = self.models()
        shown = (
            [_without_clocks(one) for one in instances],
            cards,
            trouble,
            lanes,
            models,
            orphans,
            is_up,
        )
        latest = self._latest
        if latest is None or shown != self._shown:
            revision = 1 if latest is None else latest.revision + 1
            latest = Overview(
                revision,
                instances,
                cards,
                trouble,
                lanes,
                models,
                orphans,
                engine_up=is_up,
            )
        elif latest.instances != instances or latest.cards is not cards:  # only clocks or sensors have moved
            latest = replace(latest, instances=instances, cards=cards)
        self._latest, self._shown = latest, shown
        return latest

    def of(self, instance_id: str) -> InstanceState:
        """Return one instance as it is now.

        Raises:
            UnknownInstanceError: there is none of that id.
        """
        return self._state(self._fleet.get(instance_id), self._loading())

    def models(self) -> Mapping[str, ModelState]:
        """Return every model that some instance has, by its key: the models of `current`, and cheaper."""
        instances = self._fleet.instances()
        lists = tuple([self._lists.entries(volume_of(one.spec)) or None for one in instances])
        held = tuple([(one.id, one.models if one.usable_endpoint() is not None else ()) for one in instances])
        volumes = tuple([(volume_of(one.spec), may_write(one.spec)) for one in instances])
        return self._models.of((lists, held, volumes), lambda: _models(lists, held, volumes))

    def _state(self, instance: Instance, loading: Mapping[str, tuple[str, ...]]) -> InstanceState:
        view = instance.view()
        waits = self._capacity.waiting(instance.id)
        if waits is not None and view.phase in (Phase.STOPPED, Phase.FAILED):
            view = replace(view, target=Target.RUNNING, explanation=waits)
        supervisor = instance if isinstance(instance, Supervisor) else None
        breaker = self._breakers.view(instance.id)
        if view.spec.is_paid and view.health is Health.UNKNOWN and view.last_used_at is not None:
            # It is never probed: its answers are all that is known of it.
            view = replace(view, health=Health.UNHEALTHY if breaker.failures else Health.HEALTHY)
        return InstanceState(
            view=view,
            is_usable=instance.usable_endpoint() is not None,
            gpus=tuple([instance.gpus.gpu(card.uuid) if card.uuid else None for card in view.cards]),
            starts_done=supervisor.starts_done if supervisor else 0,
            starts_failed=supervisor.starts_failed if supervisor else 0,
            lifted=self._lifted(instance.id),
            breaker=breaker,
            loading=loading.get(instance.id, ()),
            node=self._node(view.spec, view.container),
        )

    def _read_cards(self) -> tuple[Card, ...]:
        """Return the cards of the last readings: the same object while nothing of them has changed."""
        changed = [one.renew() for one in self._readings]
        if any(changed):
            self._cards = tuple(card for one in self._readings for card in one.cards)
        return self._cards

    def _read_lanes(self) -> tuple[Lane, ...]:
        roles = self._settings.routing.roles.values()
        return tuple(Lane(role.name, role.kind, role.model, role.target) for role in roles)


class _Reading:
    """The cards of one reader, and what they were built from."""

    def __init__(self, gpus: Gpus) -> None:
        self.gpus = gpus
        self._built_from: tuple[GpuSnapshot | None, int, Mapping[str, int | None]] = (None, 0, {})
        self.cards: tuple[Card, ...] = ()

    def renew(self) -> bool:
        """Build the cards again if something of them has changed; return whether they were."""
        reading, version, reserved = self.gpus.snapshot, self.gpus.holders_version, self.gpus.reserved()
        before, known, kept = self._built_from
        if reading is before and version == known and reserved == kept:
            return False
        self._built_from = reading, version, reserved
        if version == known and reserved == kept and _same_cards(reading, before):
            return False
        self.cards = tuple(
            Card(gpu, self.gpus.holders(gpu), reserved.get(gpu.uuid, 0)) for gpu in reading.gpus
        )
        return True


def _same_cards(reading: GpuSnapshot, before: GpuSnapshot | None) -> bool:
    """Return whether two readings agree in all that is shown, the sensors too."""
    if before is None or reading.gpus != before.gpus:
        return False
    return all(one.sensors == other.sensors for one, other in zip(reading.gpus, before.gpus, strict=True))


def _without_clocks(state: InstanceState) -> tuple[object, ...]:
    view = state.view
    return (
        view.spec,
        view.cards,
        view.endpoint,
        view.target,
        view.phase,
        view.health,
        view.explanation,
        view.in_flight,
        view.pinned,
        view.ttl_s,
        view.started_at,
        view.ready_at,
        view.starts,
        view.container,
        view.template_hash,
        view.models,
        view.available_models,
        view.drained,
        view.image,
        view.start,
        state.is_usable,
        state.gpus,
        state.starts_done,
        state.starts_failed,
        state.lifted,
        state.breaker,
        state.loading,
        state.node,
    )


def _models(
    lists: tuple[Any, ...], held: tuple[Any, ...], volumes: tuple[tuple[str, bool], ...]
) -> Mapping[str, ModelState]:
    entries: dict[str, Mapping[str, Any]] = {}
    having: defaultdict[str, list[str]] = defaultdict(list)
    digests: defaultdict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    places: defaultdict[str, dict[str, ModelPlace]] = defaultdict(dict)
    loaded: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    for entries_by_key, (instance_id, in_memory), (volume, writes) in zip(lists, held, volumes, strict=True):
        for key, entry in (entries_by_key or {}).items():
            entries.setdefault(key, entry)
            having[key].append(instance_id)
            before = places[key].get(volume)
            places[key][volume] = (
                ModelPlace(volume, (instance_id,), entry, writes)
                if before is None
                else ModelPlace(
                    volume, (*before.instances, instance_id), before.entry, before.may_change or writes
                )
            )
            digest = entry.get("digest")
            if isinstance(digest, str) and digest:
                digests[key][digest] = (*digests[key].get(digest, ()), instance_id)
        for model in in_memory:
            share = round(model.vram_bytes / model.size_bytes, 3) if model.size_bytes else 0.0
            loaded[model_key(model.name)].append((instance_id, share))
    return {
        key: ModelState(
            entry,
            tuple(having[key]),
            tuple(id_ for id_, _ in loaded[key]),
            max((share for _, share in loaded[key]), default=None),
            MappingProxyType(digests[key]),
            tuple(places[key].values()),
        )
        for key, entry in entries.items()
    }
