"""Keeps models in memory: those that roles keep warm, and those of instances that start with the daemon."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import structlog

from manager.domain.instance import Phase
from manager.domain.keeping import Keeping, is_kept
from manager.domain.models import model_key
from manager.errors import ManagerError, Reason
from manager.services.routing.placement import reason_of
from manager.wire.loading import FOREVER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.domain.instance import Model
    from manager.domain.roles import Role
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.first_look import FirstLook
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.models.loading import Loading
    from manager.services.routing.router import Router, SettingsSource
    from manager.services.world import World
    from manager.wire.loading import KeepAlive

_log = structlog.get_logger("models")

_LOOK_S = 1.0
_STARTUP_S = 60.0
# What Ollama does where neither a request nor its environment says.
_USUAL_KEEP_ALIVE = "5m"


class _Wanted(NamedTuple):
    """A model that is to be loaded on an instance. `role` is None where its time there is over."""

    instance: str
    model: str
    role: str | None
    keep_alive: KeepAlive | None


class WarmView(NamedTuple):
    """A place where a role's model is to stay in memory, as it is shown.

    `reason` is why it could not be loaded: None before it was tried, and while the instance is left alone.
    """

    instance: str
    is_kept: bool
    reason: Reason | None
    detail: str


class Keeper:
    """Owns what is kept in memory. `run` loads it, one model at a time on each instance.

    An instance with such a model is started, and not stopped for being idle. It is left alone while it is out
    of service, cannot run, or was stopped by an operator: until it is started again, or the daemon is.

    Args:
        world: the journal and the clocks.
        fleet: the instances.
        capacity: knows what operators have stopped.
        first_look: tells whether the instances were looked at.
        router: the models of each instance, and which are denied there.
        settings: the roles.
        loading: loads the models.
    """

    def __init__(
        self,
        world: World,
        fleet: Fleet,
        capacity: Capacity,
        first_look: FirstLook,
        router: Router,
        *,
        settings: SettingsSource,
        loading: Loading,
    ) -> None:
        self._world = world
        self._fleet = fleet
        self._capacity = capacity
        self._first_look = first_look
        self._router = router
        self._settings = settings
        self._loading = loading
        self._keeping: dict[tuple[str, str], Keeping] = {}
        self._to_release: dict[tuple[str, str], str] = {}
        self._to_prewarm: dict[str, list[str]] = {}
        self._met: set[str] = set()
        # The load under way on each instance.
        self._busy: dict[str, tuple[_Wanted, asyncio.Task[None]]] = {}
        self._kept: set[tuple[str, str]] = set()
        self._mark()

    async def run(self) -> None:
        """Keep the models, until cancelled."""
        await self._first_look.known(within_s=_STARTUP_S)
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._mark()
                if self._kept or self._to_prewarm:
                    self._router.snapshot()  # takes in what instances have listed since
                for instance in self._fleet.instances():
                    self._meet(instance)
                    wanted = self._next(instance) if self._is_usable(instance) else None
                    if wanted is not None:
                        work = self._load(instance, wanted)
                        task = tasks.create_task(work, name=f"keep {wanted.model} warm")
                        self._busy[instance.id] = wanted, task
                await asyncio.sleep(_LOOK_S)

    def warm(self, role: Role) -> tuple[WarmView, ...]:
        """Return the instances where a role's model is to stay in memory, and whether it is there."""
        if role.model is None:
            return ()
        key = model_key(role.model)
        states = ((id_, self._keeping.get((id_, key), Keeping())) for id_ in role.keep_warm)
        return tuple(WarmView(id_, one.is_kept, one.trouble, one.detail) for id_, one in states)

    # --- what is wanted ---

    def _kept_on(self, instance_id: str) -> Iterator[_Wanted]:
        for role in self._settings.routing.kept_on(instance_id):
            yield _Wanted(instance_id, str(role.model), role.name, FOREVER)

    def _mark(self) -> None:
        """Say of each instance whether a model is kept there; drop what is kept no longer, loads too."""
        kept = self._kept = {
            (one.instance, model_key(one.model))
            for instance in self._fleet.instances()
            for one in self._kept_on(instance.id)
        }
        ids = {instance_id for instance_id, _ in kept}
        for instance in self._fleet.instances():
            instance.keeps_warm = instance.id in ids and instance.drained is None
        for place in self._keeping.keys() - kept:
            if self._keeping.pop(place).is_kept:
                self._to_release[place] = place[1]
        for place in self._to_release.keys() & kept:
            if not self._router.denial(*place):
                del self._to_release[place]
        for wanted, task in self._busy.values():
            place = wanted.instance, model_key(wanted.model)
            if wanted.role is not None and place not in kept:
                self._to_release[place] = wanted.model  # the load may have ended just now
                task.cancel()

    def _meet(self, instance: Instance) -> None:
        """Note the models of an instance that starts with the daemon, the first time that it is seen."""
        if instance.id in self._met:
            return
        self._met.add(instance.id)
        if instance.spec.prewarm:
            models = {
                model_key(role.model): role.model
                for role in self._settings.routing.roles.values()
                if role.model is not None and _lives_on(role, instance.id)
            }
            if models:
                self._to_prewarm[instance.id] = list(models.values())

    def _is_usable(self, instance: Instance) -> bool:
        """Return whether something may have to be loaded there, and can be now, after a start at most."""
        if instance.id in self._busy or instance.drained is not None:
            return False
        if not instance.keeps_warm and instance.id not in self._to_prewarm and not self._to_release:
            return False
        if instance.usable_endpoint() is not None:
            self._capacity.stopped_by_operator.discard(instance.id)
            return instance.is_probed and not instance.is_silent
        if instance.id in self._capacity.stopped_by_operator:
            return False
        return instance.view().phase in (Phase.STOPPED, Phase.FAILED)

    def _next(self, instance: Instance) -> _Wanted | None:
        runs = instance.usable_endpoint() is not None
        for wanted in self._kept_on(instance.id):
            if self._is_due(instance, wanted):
                return wanted
        if not runs:
            return None
        in_memory = {model_key(one.name) for one in instance.models}
        for place in [one for one in self._to_release if one[0] == instance.id]:
            model = self._to_release.pop(place)
            if place[1] in in_memory:
                return _Wanted(instance.id, model, None, _usual_keep_alive(instance))
        known = self._router.models_of(instance)
        if known is not None:
            waiting = self._to_prewarm.get(instance.id, [])
            while waiting:
                model = waiting.pop(0)
                key = model_key(model)
                if key in known and key not in in_memory:
                    return _Wanted(instance.id, model, None, None)
            self._to_prewarm.pop(instance.id, None)
        return None

    def _is_due(self, instance: Instance, wanted: _Wanted) -> bool:
        """Return whether a model has to be loaded now; notes what keeps it from that."""
        key = model_key(wanted.model)
        keeping = self._keeping.setdefault((instance.id, key), Keeping())
        rule = self._router.denial(instance.id, wanted.model)
        if rule:
            if keeping.is_kept:  # it was loaded while the rule was lifted
                self._to_release[instance.id, key] = wanted.model
            self._note(wanted, keeping.barred(Reason.HOST_DENIED, f"it is denied there ({rule})"))
            return False
        known = self._router.models_of(instance)
        if known is not None and key not in known:
            self._note(wanted, keeping.barred(Reason.MODEL_MISSING, "it is not there"))
            return False
        found = _found(instance, key)
        if found is not None and is_kept(found.expires_at, self._world.utcnow()):
            self._note(wanted, keeping.kept())
            return False
        return self._world.now() >= keeping.retry_at

    # --- what is done ---

    async def _load(self, instance: Instance, wanted: _Wanted) -> None:
        try:
            is_release = wanted.role is None and wanted.keep_alive is not None
            if is_release and self._router.denial(instance.id, wanted.model):
                await self._loading.unload(instance.id, wanted.model)
            else:
                await self._loading.load(instance.id, wanted.model, wanted.keep_alive, explicit=False)
        except ManagerError as error:
            self._failed(wanted, error)
        else:
            place = instance.id, model_key(wanted.model)
            keeping = self._keeping.get(place)
            if wanted.role is not None and keeping is not None:
                self._note(wanted, keeping.loaded(self._world.now()).kept())
        finally:
            self._busy.pop(instance.id, None)

    def _failed(self, wanted: _Wanted, error: ManagerError) -> None:
        if wanted.role is None:
            _log.warning(
                "model_not_loaded", instance=wanted.instance, model=wanted.model, detail=error.message
            )
            return
        keeping = self._keeping.get((wanted.instance, model_key(wanted.model)))
        if keeping is not None:
            reason = reason_of(error)
            after = keeping.failed(self._world.now(), reason, error.retry_after_s, detail=error.message)
            if reason is Reason.CANCELLED:  # by an operator, who needs no event of it
                after = replace(after, trouble=keeping.trouble, detail=keeping.detail)
            self._note(wanted, after)

    def _note(self, wanted: _Wanted, after: Keeping) -> None:
        """Take over a new state, and record it where it is told by no event yet."""
        place = wanted.instance, model_key(wanted.model)
        before, self._keeping[place] = self._keeping[place], after
        if after.is_kept and not before.is_kept:
            detail = f"{wanted.model} for {wanted.role}"
            self._world.journal.record("kept_warm", instance=wanted.instance, detail=detail)
        elif after.trouble is not None and after.trouble is not before.trouble:
            detail = f"{wanted.model} for {wanted.role}: {after.detail}"
            self._world.journal.record(
                "keep_warm_failed", instance=wanted.instance, reason=after.trouble, detail=detail
            )


def _lives_on(role: Role, instance_id: str) -> bool:
    return role.target == instance_id or instance_id in (*(role.instances or ()), *role.keep_warm)


def _found(instance: Instance, key: str) -> Model | None:
    return next((one for one in instance.models if model_key(one.name) == key), None)


def _usual_keep_alive(instance: Instance) -> KeepAlive:
    """Return how long other models stay, as the template says; a number without a unit is seconds."""
    template = instance.spec.template
    value = "" if template is None else template.env.get("OLLAMA_KEEP_ALIVE", "").strip()
    try:
        return float(value)
    except ValueError:
        return value or _USUAL_KEEP_ALIVE
