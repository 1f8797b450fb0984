"""The plan of a benchmark: its workloads, and the models that it measures on which instances."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.benchmarks import MOST_GROUPS, MOST_REQUESTS, Target
from manager.domain.models import model_key
from manager.errors import InvalidRequestError, NothingLoadedError, UnknownModelError, UnknownWorkloadError
from manager.wire.details import details_of
from manager.wire.listing import Alias

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from manager.domain.benchmarks import Workload
    from manager.services.instances.fleet import Fleet
    from manager.services.models.catalogue import Catalogue

# The capability of models that write text, as Ollama names it.
_WRITES = "completion"


def workloads_of(wanted: Iterable[str], known: Mapping[str, Workload]) -> tuple[str, ...]:
    """Return the names of workloads, each once; all of them where none is wanted.

    Raises:
        UnknownWorkloadError: there is no such workload.
    """
    names = tuple(dict.fromkeys(wanted)) or tuple(known)
    for name in names:
        if name not in known:
            raise UnknownWorkloadError(f"there is no workload {name!r}; there is: {', '.join(known)}")
    return names


async def targets_of(
    instance: str | None, model: str | None, catalogue: Catalogue, fleet: Fleet
) -> tuple[Target, ...]:
    """Return the models to measure, each with its instance. Nothing is started for it.

    Args:
        instance: the only one; None is each that has the model.
        model: a model or a role; None is each that is in memory and writes text.
        catalogue: has the models.
        fleet: has the instances.

    Raises:
        InvalidRequestError: the instance is a paid server.
        NothingLoadedError: no model is in memory, and none is named.
        UnknownInstanceError: there is no such instance.
        UnknownModelError: no instance has the model, or that one does not have it.
    """
    if instance is not None and fleet.get(instance).spec.is_paid:
        message = f"body.instance: {instance} is a paid server; benchmarks measure local ones only"
        raise InvalidRequestError(message)
    await catalogue.refresh(lists=True)
    local = {one.id for one in fleet.instances() if not one.spec.is_paid}
    may = local if instance is None else {instance}
    if model is None:
        return _in_memory(catalogue, may, instance)
    meant = catalogue.find(model)
    if isinstance(meant, Alias):
        meant = catalogue.find(model_key(meant.model))
    if meant is None or isinstance(meant, Alias):
        raise UnknownModelError(f"no instance has the model {model!r}")
    key = model_key(meant.entry["name"])
    targets = tuple(Target(one, key) for one in meant.instances if one in may)
    if not targets:
        there = ", ".join(one for one in meant.instances if one in local) or "no local instance"
        raise UnknownModelError(f"{key} is not on {instance or 'a local instance'}, but on: {there}")
    return targets


def refuse_large(groups: int, requests: int) -> None:
    """Refuse a benchmark that has too many of either.

    Raises:
        InvalidRequestError: it has.
    """
    if groups > MOST_GROUPS:
        message = f"body: {groups} pairs of a workload and a model on an instance; at most {MOST_GROUPS}"
        raise InvalidRequestError(message)
    if requests > MOST_REQUESTS:
        raise InvalidRequestError(f"body: {requests} requests; at most {MOST_REQUESTS} are measured")


def _in_memory(catalogue: Catalogue, may: Collection[str], instance: str | None) -> tuple[Target, ...]:
    found = tuple(
        Target(one, model_key(known.entry["name"]))
        for known in catalogue.models()
        if _WRITES in (details_of(known.entry).capabilities or (_WRITES,))
        for one in known.loaded_on
        if one in may
    )
    if not found:
        where = "" if instance is None else f" of {instance}"
        raise NothingLoadedError(f"no model is in the memory{where}; name the one to measure")
    return found
