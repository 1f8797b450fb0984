"""The models of all instances, as one list. Nothing is ever started for it."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from manager.domain.auto import is_auto, offered, offered_name
from manager.domain.instance import Health, Phase
from manager.domain.models import model_key
from manager.domain.roles import RequestKind
from manager.wire.listing import Alias, KnownModel, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from datetime import datetime

    from manager.domain.instance import InstanceSpec
    from manager.domain.keys import Permit
    from manager.domain.roles import Role
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.models.details import ModelDetails
    from manager.services.models.model_lists import ModelLists
    from manager.services.models.volume_reader import VolumeReader
    from manager.services.overview import ModelState, Overviews
    from manager.services.routing.model_status import ModelStatus
    from manager.services.routing.overload import Overload
    from manager.services.routing.router import SettingsSource

_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+(?:-rc[0-9]+)?")
# What the packaged templates run. Some clients refuse servers that are older than something.
_LIKELY_VERSION = "0.32.15"
# Ollama reads every other value as true (`envconfig/config.go` BoolWithDefault).
_FALSE = ("", "0", "f", "false")
# Of an instance that nobody uses this is news enough. Asking it more often would look like use: it costs
# processor time, by which direct use is told.
_NEWS_S = 1.0
# How long a list waits for the first reading of a volume. Names come within a second of the engine's answer.
_READING_S = 5.0
# How long a list waits for what it does not know of its models yet; later lists have it.
_DETAILS_S = 1.0


@dataclass(frozen=True, slots=True)
class _Asked:
    """When an instance was asked, and when it had last been used then."""

    at: float
    last_used_at: datetime | None


class _Moment(NamedTuple):
    """The present work of models, and whether an instance runs or can be started."""

    doing: Mapping[str, Status]
    is_able: Callable[[str], bool]


class Catalogue:
    """Reads what instances know of themselves; `refresh` has those that are ready look again."""

    def __init__(
        self,
        fleet: Fleet,
        overviews: Overviews,
        status: ModelStatus,
        overload: Overload,
        lists: ModelLists,
        *,
        settings: SettingsSource,
        reader: VolumeReader,
        details: ModelDetails,
        now: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._details = details
        self._reader = reader
        self._overviews = overviews
        self._status = status
        self._overload = overload
        self._lists = lists
        self._settings = settings
        self._now = now
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._asked: dict[tuple[str, bool], _Asked] = {}

    async def refresh(self, *, lists: bool) -> None:
        """Ask every ready instance once more, side by side. Nothing is started.

        Concurrent refreshes share their questions. An instance that was asked a moment ago and has not been
        used through the gateway since is not asked again; what one does not answer stays as it was.

        Args:
            lists: ask for the models on its volume too, not only for those in its memory, and for details of
                models that are not known; have volumes read that were never listed.
        """
        if lists:
            await self._reader.look(within_s=_READING_S)
        since = self._now()
        ready = [instance for instance in self._fleet.instances() if _is_well(instance)]
        await asyncio.gather(*(self._ask(instance, since, lists=lists) for instance in ready))
        for instance in ready:
            self._lists.take(instance)
        if lists:
            await self._details.look(within_s=_DETAILS_S)

    # Models that `permit`, that of the client's key, does not permit are left out. None permits all.

    def models(self, permit: Permit | None = None) -> tuple[KnownModel, ...]:
        """Every model that some instance has, each once."""
        if permit is not None and permit.limit_of_bare_model(""):
            return ()
        now = self._moment()
        return tuple(self._known(key, model, now) for key, model in self._seen(permit).items())

    def statuses(self, models: Mapping[str, ModelState]) -> Mapping[str, Status]:
        """Return the status of each of these models, by its key."""
        doing = self._status.at_work()
        return {key: self._status_of(key, model, doing) for key, model in models.items()}

    def find(self, name: str, permit: Permit | None = None) -> KnownModel | Alias | None:
        """Return the meaning of a name: a role that has a model, or a model; None where it is neither.

        See `RoutingSettings.role_meant`. A name that leaves the choice of the model open means the model of
        its tier, or of the usual one.
        """
        found = self._seen(permit)
        now = self._moment()
        if is_auto(name, RequestKind.GENERATE, self._settings.routing):
            meant = offered_name(name)
            roles = offered(self._settings.routing).get(meant, ())
            return self._open_alias(meant, roles, found, now, permit)
        role = self._settings.routing.role_meant(name, is_model=self._overviews.models().__contains__)
        if role is not None and role.model is not None:
            return self._alias(role, found, now, permit)
        key = model_key(name)
        if key not in found or (permit is not None and permit.limit_of_bare_model(key)):
            return None
        return self._known(key, found[key], now)

    def is_role(self, name: str) -> bool:
        """Whether a name, as it stands, is that of a role; with a tag it is that of a model."""
        return self._settings.routing.role(name) is not None

    def aliases(self, permit: Permit | None = None) -> tuple[Alias, ...]:
        """The roles that have a model, and the names that leave the choice of one open."""
        found, now, settings = self._seen(permit), self._moment(), self._settings.routing
        roles = [one for one in settings.roles.values() if not is_auto(one.name, one.kind, settings)]
        aliases = (
            *(self._alias(role, found, now, permit) for role in roles),
            *(self._open_alias(name, some, found, now, permit) for name, some in offered(settings).items()),
        )
        return tuple(alias for alias in aliases if alias is not None)

    def listed_aliases(self, permit: Permit | None = None) -> tuple[Alias, ...]:
        """The roles for Ollama's own list of models."""
        return self.aliases(permit) if self._settings.routing.list_roles else ()

    def loaded(self, permit: Permit | None = None) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """The models in memory, each with the id of its instance, by instance in the configured order."""
        return tuple(
            (instance.id, model.entry)
            for instance in self._fleet.instances()
            if instance.usable_endpoint() is not None
            for model in instance.models
            if permit is None or self._may_use(permit, instance.id, model_key(model.name))
        )

    def version(self) -> str:
        """An Ollama's version: of one that is ready, else the one last seen, else the one that would run."""
        known = [instance for instance in self._fleet.instances() if instance.version is not None]
        for instance in known:
            if instance.usable_endpoint() is not None:
                return str(instance.version)
        if known:
            return str(max(known, key=_last_seen_s).version)
        for image in self._fleet.images():
            match = _VERSION.search(image.rpartition(":")[2])
            if match is not None:
                return match[0]
        return _LIKELY_VERSION

    def is_cloud_disabled(self) -> bool:
        """Whether every instance was made with OLLAMA_NO_CLOUD; what others say is unknown."""
        return all(_has_no_cloud(instance.spec) for instance in self._fleet.instances())

    # --- helpers ---

    async def _ask(self, instance: Instance, since: float, *, lists: bool) -> None:
        async with self._turns[instance.id]:
            now, view = self._now(), instance.view()
            last = self._asked.get((instance.id, lists))
            if last is not None:
                shared = last.at >= since  # somebody else's question, which began after ours was put
                unused = view.in_flight == 0 and view.last_used_at == last.last_used_at
                if shared or (unused and now - last.at < _NEWS_S):
                    return
            await instance.probe(tags=lists)
            asked = _Asked(now, view.last_used_at)
            self._asked[instance.id, False] = asked
            if lists:
                self._asked[instance.id, True] = asked

    def _seen(self, permit: Permit | None) -> Mapping[str, ModelState]:
        """Return the models that a key may use, each with the instances that it may use."""
        found = self._overviews.models()
        if permit is None:
            return found
        permitted = permit.instances
        seen = {key: model for key, model in found.items() if not permit.limit_of_model(key)}
        if permitted is None:
            return seen
        within = {key: _within(model, permitted) for key, model in seen.items()}
        return {key: model for key, model in within.items() if model.instances}

    def _may_use(self, permit: Permit, instance: str, key: str) -> bool:
        """Return whether some request of a key may be answered by a model on an instance."""
        if permit.limit_of_instance(instance) or permit.limit_of_model(key):
            return False
        roles = (one for one in self._settings.routing.roles.values() if not permit.limit_of_role(one.name))
        return not permit.limit_of_bare_model(key) or any(
            one.model is not None and model_key(one.model) == key for one in roles
        )

    def _known(self, key: str, model: ModelState, now: _Moment) -> KnownModel:
        """Add what changes with each request: it is in no overview."""
        latencies = (self._overload.recent_ms(id_, key) for id_ in model.instances)
        return KnownModel(
            model.entry,
            model.instances,
            model.loaded_on,
            self._status_of(key, model, now.doing),
            model.offload,
            min(filter(None, latencies), default=None),
            model.digests,
            None if (facts := self._settings.routing.facts.get(key)) is None else facts.tier,
            any(map(now.is_able, model.instances)),
        )

    def _moment(self) -> _Moment:
        # Mostly the first instance of a model is able, and the others are not looked at.
        return _Moment(self._status.at_work(), cache(lambda id_: _is_able(self._fleet.get(id_))))

    def _status_of(self, key: str, model: ModelState, doing: Mapping[str, Status]) -> Status:
        return doing.get(key) or ("ready" if model.loaded_on else self._status.idle_status(key))

    def _alias(
        self, role: Role, models: Mapping[str, ModelState], now: _Moment, permit: Permit | None
    ) -> Alias | None:
        if role.model is None:
            return None
        key = model_key(role.model)
        if permit is not None and (permit.limit_of_role(role.name) or permit.limit_of_model(key)):
            return None
        known = self._known(key, models[key], now) if key in models else None
        return Alias(role.name, role.model, role.kind, known)

    def _open_alias(
        self,
        name: str,
        roles: Iterable[Role],
        models: Mapping[str, ModelState],
        now: _Moment,
        permit: Permit | None,
    ) -> Alias | None:
        """Return a name that leaves the choice open, as its first model that an instance has.

        None where the key permits no model of these roles and their fallbacks.
        """
        settings = self._settings.routing
        permitted = [
            model
            for role in roles
            if permit is None or not permit.limit_of_role(role.name)
            for one in settings.chain(role)
            if permit is None or not permit.limit_of_role(one.name)
            for model in settings.models_of(one)
            if permit is None or not permit.limit_of_model(model_key(model))
        ]
        if not permitted:
            return None
        model = next((one for one in permitted if model_key(one) in models), permitted[0])
        key = model_key(model)
        known = self._known(key, models[key], now) if key in models else None
        return Alias(name, model, RequestKind.GENERATE, known)


def _within(model: ModelState, permitted: Collection[str]) -> ModelState:
    """Return a model as it is on some instances only."""
    digests = {
        digest: tuple(one for one in having if one in permitted) for digest, having in model.digests.items()
    }
    return replace(
        model,
        instances=tuple(one for one in model.instances if one in permitted),
        loaded_on=tuple(one for one in model.loaded_on if one in permitted),
        digests={digest: having for digest, having in digests.items() if having},
    )


def _is_able(instance: Instance) -> bool:
    """Return whether an instance runs or can be started."""
    view = instance.view()
    return view.drained is None and view.phase is not Phase.UNAVAILABLE


def _is_well(instance: Instance) -> bool:
    return instance.usable_endpoint() is not None and instance.health is not Health.UNHEALTHY


def _last_seen_s(instance: Instance) -> float:
    seen = instance.view().last_seen_at
    return seen.timestamp() if seen is not None else 0.0


def _has_no_cloud(spec: InstanceSpec) -> bool:
    value = "" if spec.template is None else spec.template.env.get("OLLAMA_NO_CLOUD", "")
    return value.strip().lower() not in _FALSE
