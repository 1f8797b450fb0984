"""Which models would fit on the cards of which instances now."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from manager.domain.instance import DeviceKind
from manager.wire.ollama import name_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.services.gpus import Gpus, Need, Room
    from manager.services.instances.fleet import Fleet
    from manager.services.overview import ModelState, Overviews


class Fit(NamedTuple):
    """A model and the cards of an instance that has it. `need` is None where nothing is known of it."""

    key: str
    instance: str
    need: Need | None
    fits: bool | None


class Fits(NamedTuple):
    """The room of each instance with cards, and each of its models."""

    rooms: Mapping[str, Room]
    models: tuple[Fit, ...]


class Fitting:
    """Owns the latest `Fits`: what models need is looked up again only after a change.

    Args:
        fleet: the instances.
        overviews: has the models of each.
    """

    def __init__(self, fleet: Fleet, overviews: Overviews) -> None:
        self._fleet = fleet
        self._overviews = overviews
        self._sources: object = None
        self._models: Mapping[str, ModelState] | None = None
        self._needs: tuple[tuple[str, str, Need | None], ...] = ()
        self._latest = Fits({}, ())

    def current(self) -> Fits:
        """Return what fits now: the same object while nothing has changed."""
        gpus = {
            one.id: one.gpus
            for one in self._fleet.instances()
            if one.spec.device_kind is DeviceKind.GPU and one.gpus.uuids_of(one.id)
        }
        by_reader: dict[Gpus, list[str]] = {}
        for id_, one in gpus.items():
            by_reader.setdefault(one, []).append(id_)
        told = {id_: room for one, ids in by_reader.items() for id_, room in one.rooms(ids).items()}
        rooms = {id_: told[id_] for id_ in gpus}
        models = self._overviews.models()
        sources = [
            (id_, one.learned_version, one.uuids_of(id_), one.measures(id_)) for id_, one in gpus.items()
        ]
        is_old = models is not self._models or sources != self._sources
        if is_old:
            self._models, self._sources = models, sources
            self._needs = tuple(
                [
                    (key, instance, gpus[instance].need(instance, name_of(place.entry), place.entry))
                    for key, model in models.items()
                    for place in model.places
                    for instance in place.instances
                    if instance in rooms
                ]
            )
        if is_old or rooms != self._latest.rooms:
            fits = [
                Fit(key, instance, need, None if need is None else rooms[instance].fits(need))
                for key, instance, need in self._needs
            ]
            self._latest = Fits(rooms, tuple(fits))
        return self._latest
