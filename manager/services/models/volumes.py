"""Volumes of models: who writes to each, who does something there right now, and what there is afterwards."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import orjson
import structlog

from manager.domain.models import model_key
from manager.domain.routing import Attempt, State, not_asked
from manager.domain.target import Protocol
from manager.domain.volumes import Member, readers, writers
from manager.domain.wording import listed, model_not_found
from manager.errors import (
    InvalidRequestError,
    ManagerError,
    Reason,
    UnavailableError,
    UnknownInstanceError,
)
from manager.services.models.model_lists import may_write, volume_of
from manager.services.ports import Question

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from manager.domain.routing import Candidate
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.models.catalogue import Catalogue
    from manager.services.models.model_lists import ModelLists
    from manager.services.ports import ModelServer
    from manager.services.routing.placement import Placement, Prepared
    from manager.services.routing.router import Router

_log = structlog.get_logger("volumes")

# An unload is answered at once; the server frees the memory when the requests that use the model have ended.
_UNLOAD_S = 5.0
_JSON = ((b"content-type", b"application/json"),)
_OK = 200


class NoSuchModelError(UnavailableError):
    """Every volume that can be looked at was, and none has the model.

    Args:
        message: in the words of Ollama.
        not_asked: names the instances that could not be looked at; see `domain.routing.not_asked`.
    """

    def __init__(self, message: str, not_asked: str) -> None:
        super().__init__(message + not_asked, reason=Reason.MODEL_MISSING)
        self.not_asked = not_asked


class Volumes:
    """Owns what is being done on each volume: of what would get in each other's way, one thing at a time.

    Args:
        fleet: its instances are on the volumes.
        router: has the snapshot of them.
        placement: starts them and gives leases on them.
        catalogue: has them asked what they have.
        lists: what there is on each volume.
        server: sends the requests to unload.
        chosen: volume -> the instance that alone writes to it, where the operator has chosen one.
    """

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        placement: Placement,
        catalogue: Catalogue,
        lists: ModelLists,
        *,
        server: ModelServer,
        chosen: Mapping[str, str],
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._placement = placement
        self._catalogue = catalogue
        self._lists = lists
        self._server = server
        self._chosen = chosen
        self._turns: dict[str, asyncio.Lock] = {}
        self._doing: dict[str, str] = {}

    # --- which volume ---

    def names(self) -> tuple[str, ...]:
        """All volumes, in the order of the configuration; paid servers have none."""
        specs = [one.spec for one in self._fleet.instances()]
        return tuple(dict.fromkeys(volume_of(spec) for spec in specs if not spec.is_paid))

    def of(self, instance_id: str) -> str:
        """The volume of an instance.

        Raises:
            UnknownInstanceError: there is none of that id.
        """
        return volume_of(self._fleet.get(instance_id).spec)

    def default(self, pin: str | None) -> str:
        """Return the volume that a new model goes to.

        Raises:
            UnknownInstanceError: there is no instance of that id.
            InvalidRequestError: its server does not manage models.
            UnavailableError: there is no instance at all.
        """
        if pin is not None:
            return self._pinned(pin)
        names = self._managed()
        if not names:
            raise UnavailableError("there is no instance", reason=Reason.INSTANCE_UNAVAILABLE)
        return names[0]

    def having(self, model: str) -> tuple[str, ...]:
        """The volumes that have a model, as far as is known, in the order of the configuration."""
        key = model_key(model)
        return tuple(name for name in self.names() if key in self._lists.entries(name))

    async def find(self, model: str, pin: str | None) -> str:
        """The volume that has a model, or one that may have it because nobody has ever looked.

        Raises:
            UnknownInstanceError: there is no instance of that id.
            InvalidRequestError: its server does not manage models.
            NoSuchModelError: no volume has it.
        """
        if pin is not None:
            return self._pinned(pin)
        self._router.snapshot()  # takes in what instances have listed since
        if having := self.having(model):
            return having[0]
        await self._catalogue.refresh(lists=True)
        if having := self.having(model):
            return having[0]
        snapshot = self._router.snapshot()
        unread = [name for name in self._managed() if self._lists.of(name) is None]
        if not unread or snapshot.lacks(model_key(model)):
            raise NoSuchModelError(model_not_found(model), not_asked(snapshot.out_of_reach()))
        reachable = {self.of(one.id) for one in snapshot.unread() if one not in snapshot.out_of_reach()}
        return next((name for name in unread if name in reachable), unread[0])

    # --- who ---

    def writers(self, volume: str, model: str = "") -> tuple[Attempt, ...]:
        """Return the attempts for a request that changes a volume, in order."""
        return self._attempts(writers(self._members(volume), self._chosen.get(volume)), model)

    def readers(self, volume: str, model: str = "") -> tuple[Attempt, ...]:
        """Return the attempts for a request that reads a volume; an instance is started only if none runs."""
        return self._attempts(readers(self._members(volume)), model)

    def none_left(self, volume: str) -> UnavailableError:
        """Return the error of a volume that no instance can be used on."""
        outs = [f"{one.id} ({one.why_out})" for one in self._candidates(volume) if one.why_out]
        why = listed(outs) if outs else "none writes to it"
        message = f"no instance on {volume} can be used now: {why}"
        return UnavailableError(message, reason=Reason.INSTANCE_UNAVAILABLE, retry_after_s=5)

    async def writer(self, volume: str) -> Prepared:
        """Return a lease on the instance that writes to a volume, started if need be.

        Raises:
            ManagerError: there is none.
        """
        trouble: ManagerError | None = None
        for attempt in self.writers(volume):
            try:
                return await self._placement.prepare(attempt)
            except ManagerError as error:
                trouble = trouble or error
        raise trouble or self.none_left(volume)

    def running(self, volume: str) -> tuple[Attempt, ...]:
        """Return the attempts on instances that see a volume and run. None of them starts anything."""
        running = (id_ for id_ in readers(self._members(volume)) if self._fleet.get(id_).usable_endpoint())
        return self._attempts(running, "")

    # --- what is done there ---

    def doing(self, volume: str) -> str | None:
        """The work on a volume that others have to wait for; None when there is none."""
        return self._doing.get(volume)

    @asynccontextmanager
    async def alone(self, volume: str, what: str) -> AsyncIterator[None]:
        """Wait until nothing else that changes a volume goes on, and keep it so; first come, first served."""
        async with self._turns.setdefault(volume, asyncio.Lock()):
            self._doing[volume] = what
            try:
                yield
            finally:
                del self._doing[volume]

    async def unload_elsewhere(self, volume: str, model: str, *, except_on: str) -> None:
        """Unload a model from all running instances of a volume but one, before it is deleted or replaced.

        A server that did not make the change goes on with the old model. It has to be told before: Ollama
        finds what to unload through the name's manifest (0.24 `server/sched.go` expireRunner), and answers
        404 afterwards. Requests that use the model come to their end first. Takes at most 2 x `_UNLOAD_S`; a
        failure is logged only.

        Args:
            volume: where the model is.
            model: its name.
            except_on: the instance that makes the change.
        """
        others = [
            instance
            for instance in self._fleet.instances()
            if instance.id != except_on
            and volume_of(instance.spec) == volume
            and instance.usable_endpoint() is not None
        ]
        await asyncio.gather(*(self._unload(instance, model) for instance in others))

    async def unload(self, instance_id: str, model: str) -> str | None:
        """Unload a model from one instance, if it runs and holds it; bounds as above.

        Returns:
            Why it may still be loaded, or None.
        """
        try:
            instance = self._fleet.get(instance_id)
        except UnknownInstanceError:
            return None
        return await self._unload(instance, model)

    async def changed(self, instance_id: str) -> None:
        """Something was changed through an instance: see what there is on its volume now."""
        instance = self._fleet.get(instance_id)
        await instance.probe(tags=True)
        self._lists.take(instance)

    # --- helpers ---

    async def _unload(self, instance: Instance, model: str) -> str | None:
        key = model_key(model)
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNLOAD_S):
                await instance.probe()
        endpoint = instance.usable_endpoint()
        if endpoint is None or all(model_key(loaded.name) != key for loaded in instance.models):
            return None
        body = orjson.dumps({"model": model, "keep_alive": 0})
        headers = (*_JSON, *instance.headers)
        question = Question(instance.id, endpoint, "POST", "/api/generate", headers, body)
        trouble = ""
        try:
            async with (
                asyncio.timeout(_UNLOAD_S),
                self._server.ask(question) as answer,
            ):
                if answer.status != _OK:
                    trouble = f"status {answer.status}"
        except TimeoutError:
            trouble = f"no answer within {_UNLOAD_S:g} s"
        except ManagerError as error:
            trouble = error.message.removeprefix(f"{instance.id} ")
        if trouble:
            _log.warning("model_not_unloaded", instance=instance.id, model=model, detail=trouble)
            return f"{instance.id}: {trouble}"
        with suppress(TimeoutError):  # `/api/ps` must not list the model any more
            async with asyncio.timeout(_UNLOAD_S):
                await instance.probe()
        return None

    def _managed(self) -> tuple[str, ...]:
        """Return the volumes of servers that manage models; the first one is where new models go."""
        specs = [one.spec for one in self._fleet.instances()]
        return tuple(dict.fromkeys(volume_of(spec) for spec in specs if spec.protocol is Protocol.OLLAMA))

    def _pinned(self, instance_id: str) -> str:
        """Return the volume of an instance whose server manages models.

        Raises:
            UnknownInstanceError: there is no instance of that id.
            InvalidRequestError: its server does not manage models.
        """
        spec = self._fleet.get(instance_id).spec
        if spec.protocol is not Protocol.OLLAMA:
            message = f"{instance_id} speaks the API of {spec.protocol.value}, which manages no models"
            raise InvalidRequestError(message, instance=instance_id)
        return volume_of(spec)

    def _members(self, volume: str) -> list[Member]:
        return [
            Member(one.id, _state(one), one.priority, writable=may_write(self._fleet.get(one.id).spec))
            for one in self._candidates(volume)
        ]

    def _candidates(self, volume: str) -> list[Candidate]:
        return [one for one in self._router.snapshot().candidates if self.of(one.id) == volume]

    def _attempts(self, ids: Iterable[str], model: str) -> tuple[Attempt, ...]:
        return tuple(
            Attempt(id_, model, role=None, because="running" if self._runs(id_) else "startable")
            for id_ in ids
        )

    def _runs(self, instance_id: str) -> bool:
        return self._fleet.get(instance_id).usable_endpoint() is not None


def _state(one: Candidate) -> State:
    """Return the state for the management of models: a breaker is about inference, and bars nothing else."""
    return State.READY if one.why_out is Reason.BREAKER_OPEN else one.state
