"""The use of models by requests under way, and the last failures of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from manager.domain.models import model_key
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.services.instances.fleet import Fleet

# Failures of a server with one model. Every other reason is about the instance.
_OF_MODELS = (Reason.UPSTREAM_ERROR, Reason.MODEL_LOAD_FAILED, Reason.ATTEMPT_TIMEOUT)
_MAX_BROKEN = 4096


class Work(NamedTuple):
    """The model that a server works on. `loads` is whether it was not in memory when the request was sent.

    `only_loads`: the request ends when the model is loaded.
    """

    instance: str
    model: str
    loads: bool
    only_loads: bool = False


class Worker(Protocol):
    """A request that has been sent to a server."""

    @property
    def work(self) -> Work: ...


class ModelStatus:
    """Owns the set of requests that servers work on, and the set of models whose last request failed.

    Both are bounded: the first by the requests in flight, the second by `_MAX_BROKEN`, beyond which failures
    are not noted.

    Args:
        fleet: knows the models in memory.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._workers: set[Worker] = set()
        self._broken: set[str] = set()

    def sent(self, worker: Worker) -> None:
        """A request was sent to a server."""
        self._workers.add(worker)

    def ended(self, worker: Worker) -> None:
        """The server works on the request no longer."""
        self._workers.discard(worker)

    def failed(self, model: str, reason: Reason) -> None:
        """An attempt with a model has failed."""
        if reason in _OF_MODELS and len(self._broken) < _MAX_BROKEN:
            self._broken.add(model_key(model))

    def answered(self, model: str) -> None:
        """A request for a model has ended well."""
        if self._broken:
            self._broken.discard(model_key(model))

    def at_work(self) -> Mapping[str, Literal["in_use", "loading"]]:
        """Return what requests that are under way do with models, by their keys.

        A model is loading until its instance reports it in memory: an answer without streaming sends nothing
        before its end. A server reports a model that it still loads, too; the end of a request that does
        nothing else tells more.
        """
        doing: dict[str, Literal["in_use", "loading"]] = {}
        for worker in self._workers:
            instance, model, loads, only_loads = worker.work
            key = model_key(model)
            loading = loads and (only_loads or not self._is_loaded(instance, key))
            if not loading or key not in doing:
                doing[key] = "loading" if loading else "in_use"
        return doing

    def idle_status(self, key: str) -> Literal["not_loaded", "error"]:
        """Return the status of a model that no instance holds in memory."""
        return "error" if key in self._broken else "not_loaded"

    def _is_loaded(self, instance: str, key: str) -> bool:
        return any(model_key(model.name) == key for model in self._fleet.get(instance).models)
