"""Loads and unloads models on one instance, because an operator or the configuration asks for it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING

from manager.domain.drained import why_out
from manager.domain.models import is_possible, model_key
from manager.domain.routing import Attempt, State
from manager.domain.target import Protocol
from manager.domain.wording import listed, model_not_found
from manager.errors import (
    ConflictError,
    DrainedError,
    InvalidRequestError,
    ManagerError,
    Reason,
    UnavailableError,
    UnknownModelError,
)
from manager.services.instances.supervisor import Supervisor
from manager.services.models.shared_loads import SharedLoads
from manager.services.ports import Question
from manager.services.routing.placement import ModelMissingError
from manager.wire.loading import load_answer, load_request, only_embeds
from manager.wire.ollama import name_of
from manager.wire.statuses import judge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.routing import Because, Candidate
    from manager.domain.target import Target
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.models.shared_loads import Place
    from manager.services.models.volumes import Volumes
    from manager.services.ports import ModelServer, ServerAnswer
    from manager.services.routing.model_status import ModelStatus
    from manager.services.routing.placement import Placement
    from manager.services.routing.router import Router, SettingsSource
    from manager.wire.loading import KeepAlive, LoadAnswer

_JSON = ((b"content-type", b"application/json"),)
_MOST_REFUSAL_BYTES = 64 * 1024
# A caller that does not wait for the end of a load waits so long for a refusal: most come at once.
_AT_ONCE_S = 0.5
_OK = 200
_NOT_FOUND = 404


class Loading:
    """Loads and unloads models. Callers that want the same load share it; it ends with the last of them.

    Args:
        fleet: the instances.
        capacity: starts them.
        router: the models of each.
        placement: gives leases, and sees to memory.
        status: is told of loads.
        volumes: unload models.
        settings: the roles.
        server: sends the requests.
    """

    def __init__(
        self,
        fleet: Fleet,
        capacity: Capacity,
        router: Router,
        placement: Placement,
        status: ModelStatus,
        *,
        volumes: Volumes,
        settings: SettingsSource,
        server: ModelServer,
    ) -> None:
        self._fleet = fleet
        self._capacity = capacity
        self._router = router
        self._placement = placement
        self._status = status
        self._volumes = volumes
        self._settings = settings
        self._server = server
        self._loads = SharedLoads(self._is_waited_for)
        # Loads that go on without callers, at most one for each model on each instance.
        self._kept: dict[Place, asyncio.Task[bool]] = {}

    def model_meant(self, name: str) -> str:
        """Return the model that a name means, which may be a role's.

        Raises:
            InvalidRequestError: it is a role without a model, or no possible name.
        """
        routing, snapshot = self._settings.routing, self._router.snapshot()
        role = routing.role_meant(name, is_model=lambda key: bool(snapshot.having(key)))
        if role is not None and role.model is None:
            raise InvalidRequestError(f"model: the role {role.name!r} has no model")
        model = name if role is None or role.model is None else role.model
        if not is_possible(model):
            raise InvalidRequestError(f"model: {name!r} is no possible name of a model or role")
        return model

    async def load(
        self, instance_id: str, name: str, keep_alive: KeepAlive | None = None, *, explicit: bool = True
    ) -> bool:
        """Have a model in the memory of an instance, which is started if need be; False when it was there.

        The load is cancelled, and with it the server's work for it, when the last caller that waits for it
        is, and when the instance is drained or stopped.

        Args:
            instance_id: the instance.
            name: of the model, or of a role that has one.
            keep_alive: how long it stays after its last use; None leaves that to the server.
            explicit: an operator asks: the back-off after earlier failures is ignored.

        Raises:
            UnknownInstanceError: there is no such instance.
            UnknownModelError: the instance does not have the model.
            ManagerError: the instance cannot be used, or the model not be loaded.
        """
        instance, model = self._fleet.get(instance_id), self.model_meant(name)
        place = instance.id, model_key(model)
        return await self._loads.join(
            place, keep_alive, lambda: self._load(instance, model, keep_alive, explicit=explicit)
        )

    async def begin(self, instance_id: str, name: str, keep_alive: KeepAlive | None = None) -> bool | None:
        """As `load`, but the load goes on when the caller leaves; the model's status has what becomes of it.

        Returns:
            As `load` where it ends at once, None where it goes on.
        """
        instance, model = self._fleet.get(instance_id), self.model_meant(name)
        place = instance.id, model_key(model)
        task = self._kept.get(place)
        if task is None:
            task = self._kept[place] = asyncio.create_task(
                self.load(instance_id, name, keep_alive), name=f"load of {model} on {instance_id}"
            )
            task.add_done_callback(partial(self._kept_ended, place))
        done, _ = await asyncio.wait({task}, timeout=_AT_ONCE_S)
        return task.result() if done else None

    async def unload(self, instance_id: str, name: str) -> bool:
        """Have a model out of the memory of an instance; False when it was not there.

        The server frees the memory once the requests that use the model have ended.

        Raises:
            UnknownInstanceError: there is no such instance.
            UnknownModelError: the instance does not have the model.
            ConflictError: a role keeps the model in memory there.
            ManagerError: the model may still be loaded.
        """
        instance, model = self._fleet.get(instance_id), self.model_meant(name)
        key = model_key(model)
        is_denied = bool(self._router.denial(instance.id, model))
        for role in self._settings.routing.kept_on(instance.id):
            if model_key(str(role.model)) == key and not is_denied:
                message = f"the role {role.name!r} keeps {model} warm on {instance.id}"
                raise ConflictError(f"{message}; change roles.{role.name}.keep_warm", instance=instance.id)
        if instance.usable_endpoint() is not None:
            await instance.probe()
        if all(model_key(loaded.name) != key for loaded in instance.models):
            models = self._router.models_of(instance)
            if models is not None and key not in models:
                raise _unknown(instance, model, models)
            return False
        trouble = await self._volumes.unload(instance.id, model)
        if trouble is not None:
            message = f"{model} may still be loaded on {trouble}"
            raise UnavailableError(message, reason=Reason.UPSTREAM_ERROR, instance=instance.id)
        return True

    # --- helpers, in call order ---

    def _kept_ended(self, place: Place, task: asyncio.Task[bool]) -> None:
        del self._kept[place]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ManagerError):
            reason = error.reason if isinstance(error, UnavailableError) else Reason.MODEL_LOAD_FAILED
            self._status.load_failed(place[1], reason, error.message)

    def _is_waited_for(self, place: tuple[str, str]) -> bool:
        """Return whether a request for the model waits at the server for the same load."""
        works = (worker.work for worker in self._status.workers())
        return any(one.loads and (one.instance, model_key(one.model)) == place for one in works)

    async def _load(
        self, instance: Instance, model: str, keep_alive: KeepAlive | None, *, explicit: bool
    ) -> bool:
        candidate = await self._candidate(instance, model)
        key = model_key(model)
        was_loaded = key in candidate.loaded
        if instance.spec.protocol is not Protocol.OLLAMA:
            if was_loaded:
                return False
            message = f"{instance.id} speaks the API of {instance.spec.protocol}, which loads no models"
            raise ConflictError(message, instance=instance.id)
        attempt = Attempt(instance.id, model, None, _because(candidate, key))
        self._placement.refuse_denied(attempt)
        if explicit and isinstance(instance, Supervisor) and candidate.state is State.STARTABLE:
            await self._capacity.start(instance.id)
        try:
            prepared = await self._placement.prepare(attempt, patient=not explicit)
        except ModelMissingError as error:
            raise UnknownModelError(error.message, instance=instance.id) from error
        with prepared.lease as lease:
            try:
                with nullcontext() if was_loaded else self._status.load(model, instance.id):
                    async with instance.until_out():
                        answer = await self._ask(lease.target, model, keep_alive)
                        await self._see(instance, model, answer)
            except UnavailableError as error:
                self._status.failed(model, error.reason, error.message)
                raise
            self._status.answered(model)
        return not was_loaded

    async def _candidate(self, instance: Instance, model: str) -> Candidate:
        """Return the instance as routing sees it. Lists its models anew if this one is not among them."""
        candidate, key = self._seen(instance), model_key(model)
        if instance.drained is not None:
            raise DrainedError(why_out(instance.id, instance.drained), instance=instance.id)
        if candidate.state is State.OUT:
            raise _out(candidate)
        if candidate.models is not None and key not in candidate.models and instance.usable_endpoint():
            with suppress(ManagerError):
                await self._volumes.changed(instance.id)
            candidate = self._seen(instance)
        if candidate.models is not None and key not in candidate.models:
            raise _unknown(instance, model, candidate.models)
        return candidate

    def _seen(self, instance: Instance) -> Candidate:
        candidate = self._router.snapshot().get(instance.id)
        assert candidate is not None  # noqa: S101  (every instance of the fleet is a candidate)
        return candidate

    async def _ask(self, target: Target, model: str, keep_alive: KeepAlive | None) -> LoadAnswer:
        instance_id = target.instance
        answer = await self._sent(target, model, keep_alive, embeds=False)
        if only_embeds(answer):
            answer = await self._sent(target, model, keep_alive, embeds=True)
        status, error = answer.status, answer.error
        if status == _OK:
            if error is not None:
                raise _not_loaded(instance_id, model, error)
            return answer
        if error is None:
            words = f"{instance_id} does not load models on request as Ollama does (status {status})"
            raise ConflictError(words, instance=instance_id)
        if status == _NOT_FOUND:
            self._placement.reread_models(instance_id)
            raise UnknownModelError(error, instance=instance_id)
        raise _not_loaded(instance_id, model, error, judge(status, error).reason)

    async def _sent(
        self, target: Target, model: str, keep_alive: KeepAlive | None, *, embeds: bool
    ) -> LoadAnswer:
        path, body = load_request(model, keep_alive, embeds=embeds)
        headers = (*_JSON, *target.headers)
        question = Question(target.instance, target.endpoint, "POST", path, headers, body)
        async with self._server.ask(question) as answer:
            return load_answer(answer.status, await _whole(answer))

    async def _see(self, instance: Instance, model: str, answer: LoadAnswer) -> None:
        """Look whether the model is in memory; a server that does not list its memory has to say so.

        Raises:
            UnavailableError: it is not, with reason `model_load_failed`.
        """
        reads = instance.memory_reads
        await instance.probe()
        if instance.memory_reads == reads:
            if not answer.is_confirmed:
                raise _not_loaded(instance.id, model, "its answer does not say that it is loaded")
        elif not _holds(instance, model_key(model), is_confirmed=answer.is_confirmed):
            raise _not_loaded(instance.id, model, "it was answered, but is not in memory (/api/ps)")


async def _whole(answer: ServerAnswer) -> bytes:
    parts = bytearray()
    while len(parts) < _MOST_REFUSAL_BYTES and (piece := await answer.piece()):
        parts += piece
    return bytes(parts)


def _holds(instance: Instance, key: str, *, is_confirmed: bool) -> bool:
    """Return whether a model is in memory, be it under the name of another one.

    Ollama finds a runner by the weights (`server/sched.go`) and lists it under the name that it was loaded
    by: a copy has the same digest, and a model that was made from another one has its details.
    """
    listed = next((one for one in instance.listed or () if model_key(name_of(one)) == key), {})
    digest, details = listed.get("digest"), listed.get("details")
    return any(
        model_key(one.name) == key
        or (digest and one.digest == digest)
        or (is_confirmed and details and one.entry.get("details") == details)
        for one in instance.models
    )


def _not_loaded(instance: str, model: str, why: str, reason: Reason | None = None) -> UnavailableError:
    message = f"{instance} did not load {model}: {why}"
    return UnavailableError(message, reason=reason or Reason.MODEL_LOAD_FAILED, instance=instance)


def _because(candidate: Candidate, key: str) -> Because:
    if candidate.models is None:
        return "unread"
    if key in candidate.loaded:
        return "loaded"
    return "running" if candidate.state is State.READY else "startable"


def _out(candidate: Candidate) -> ManagerError:
    message = f"{candidate.id} cannot be used now ({candidate.why_out})"
    return UnavailableError(
        message, reason=candidate.why_out or Reason.INSTANCE_UNAVAILABLE, instance=candidate.id
    )


def _unknown(instance: Instance, model: str, models: Mapping[str, str]) -> UnknownModelError:
    message = f"{model_not_found(model)}; models on {instance.id}: {listed(sorted(models.values()))}"
    return UnknownModelError(message, instance=instance.id)
