"""The use of models by requests under way, and the last failures of models."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from manager.domain.models import model_key
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from manager.services.instances.fleet import Fleet

# Failures of a server with one model. Every other reason is about the instance.
_OF_MODELS = (Reason.UPSTREAM_ERROR, Reason.MODEL_LOAD_FAILED, Reason.ATTEMPT_TIMEOUT)
_MAX_BROKEN = 4096
_MOST_CHARACTERS = 1000


class Work(NamedTuple):
    """The model that a server works on. `loads` is whether it was not in memory when the request was sent."""

    instance: str
    model: str
    loads: bool


class ModelFailure(NamedTuple):
    """The failure of the last request for a model; `message` is empty where only the reason is known."""

    reason: Reason
    message: str


class Worker(Protocol):
    """A request that has been sent to a server."""

    @property
    def work(self) -> Work: ...
    @property
    def lane(self) -> str | None: ...
    @property
    def holds(self) -> str: ...

    def hold_slot(self) -> None:
        """Take a slot of the server's instance, whether or not one is free."""


class ModelStatus:
    """Owns the requests that servers work on, the mere loads, and the models whose last request failed.

    All are bounded: by the requests in flight, by the instances, and by `_MAX_BROKEN`, beyond which failures
    are not noted.

    Args:
        fleet: knows the models in memory.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._workers: set[Worker] = set()
        self._broken: dict[str, ModelFailure] = {}
        self._loads: Counter[tuple[str, str]] = Counter()  # by instance, and key of the model
        self.version = 0  # grows with each change of a failure

    def sent(self, worker: Worker) -> None:
        """A request was sent to a server."""
        self._workers.add(worker)

    def ended(self, worker: Worker) -> None:
        """The server works on the request no longer."""
        self._workers.discard(worker)

    @contextmanager
    def load(self, model: str, instance: str) -> Iterator[None]:
        """A model is being loaded on an instance, and nothing else is done with it."""
        place = instance, model_key(model)
        self._loads[place] += 1
        try:
            yield
        finally:
            self._loads[place] -= 1
            if not self._loads[place]:
                del self._loads[place]

    def workers(self) -> tuple[Worker, ...]:
        """Return the requests that servers work on."""
        return tuple(self._workers)

    def failed(self, model: str, reason: Reason, message: str = "") -> None:
        """An attempt with a model has failed."""
        if reason in _OF_MODELS:
            self._note(model, ModelFailure(reason, message[:_MOST_CHARACTERS]))

    def load_failed(self, model: str, reason: Reason, message: str) -> None:
        """A load that nobody waits for has failed, whatever the reason."""
        self._note(model, ModelFailure(reason, message[:_MOST_CHARACTERS]))

    def answered(self, model: str) -> None:
        """A request for a model has ended well."""
        if self._broken and self._broken.pop(model_key(model), None) is not None:
            self.version += 1

    def at_work(self) -> Mapping[str, Literal["in_use", "loading"]]:
        """Return what requests that are under way do with models, by their keys.

        A model is loading until its instance reports it in memory: an answer without streaming sends nothing
        before its end. A server reports a model that it still loads, too; the end of a mere load tells more.
        """
        doing: dict[str, Literal["in_use", "loading"]] = {}
        for worker in self._workers:
            instance, model, loads = worker.work
            key = model_key(model)
            loading = loads and not self._is_loaded(instance, key)
            if not loading or key not in doing:
                doing[key] = "loading" if loading else "in_use"
        for _, key in self._loads:
            doing.setdefault(key, "loading")
        return doing

    def loading(self) -> Mapping[str, tuple[str, ...]]:
        """Return the keys of the models that are being loaded, in order, by the id of the instance."""
        return _grouped(sorted(self._under_way()))

    def loading_on(self) -> Mapping[str, tuple[str, ...]]:
        """Return the ids of the instances that load a model, in order, by the key of the model."""
        return _grouped((key, instance) for instance, key in sorted(self._under_way()))

    def _under_way(self) -> set[tuple[str, str]]:
        """Return instance and key of the model of each load."""
        works = (
            (one, model_key(model)) for one, model, loads in [one.work for one in self._workers] if loads
        )
        return {*self._loads, *(one for one in works if not self._is_loaded(*one))}

    def idle_status(self, key: str) -> Literal["not_loaded", "error"]:
        """Return the status of a model that no instance holds in memory."""
        return "error" if key in self._broken else "not_loaded"

    def failure(self, key: str) -> ModelFailure | None:
        """Return why the last request for a model has failed; None where it has not."""
        return self._broken.get(key)

    def _note(self, model: str, failure: ModelFailure) -> None:
        key = model_key(model)
        if key in self._broken or len(self._broken) < _MAX_BROKEN:
            self._broken[key] = failure
            self.version += 1

    def _is_loaded(self, instance: str, key: str) -> bool:
        return any(model_key(model.name) == key for model in self._fleet.get(instance).models)


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, value in pairs:
        found[name] = (*found.get(name, ()), value)
    return found
