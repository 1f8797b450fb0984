"""Lists of models in the shapes of Ollama and OpenAI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from manager.domain.models import DEFAULT_TAG, model_key
from manager.domain.offloading import offload_hint
from manager.wire.details import details_of
from manager.wire.ollama import name_of, read_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from manager.domain.classification import Tier
    from manager.domain.offloading import OffloadHint
    from manager.domain.roles import RequestKind
    from manager.wire.details import Details

# What Go's encoder writes where nothing is known, in the order of Ollama's `api.ListModelResponse`.
_NO_TIME = "0001-01-01T00:00:00Z"
_BLANK: Mapping[str, Any] = {"name": "", "model": "", "modified_at": _NO_TIME, "size": 0, "digest": ""}
BLANK_DETAILS: Mapping[str, Any] = {
    "parent_model": "",
    "format": "",
    "family": "",
    "families": None,
    "parameter_size": "",
    "quantization_level": "",
}
_DEFAULT_NAMESPACE = "library"
_OWNER_OF_ROLES = "ollama-manager"


# What becomes of a model. `error`: the last request for it failed, and it is not in memory.
Status: TypeAlias = Literal["not_loaded", "loading", "ready", "in_use", "error"]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model, the instances that have it, and those of them that hold it in memory.

    `entry` is what a server last said of it in `/api/tags`. `offload` is the share of it that is in a card's
    memory, where it is loaded; `latency_ms` its recent time to the first token on the fastest of its
    instances, None while it has streamed nothing. `digests` are the instances by its digest there. `tier` is
    what the operator has stated, and `is_available` whether one of the instances runs or can be started.
    """

    entry: Mapping[str, Any]
    instances: tuple[str, ...]
    loaded_on: tuple[str, ...]
    status: Status = "not_loaded"
    offload: float | None = None
    latency_ms: float | None = None
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tier: Tier | None = None
    is_available: bool = True


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that stands for a model; `of` is None where no instance has that model.

    A name without a tag is a role, or leaves the choice of the model open; one with a tag does so for a tier.
    """

    name: str
    model: str
    kind: RequestKind
    of: KnownModel | None


def tags_document(models: Iterable[KnownModel], aliases: Iterable[Alias] = ()) -> dict[str, Any]:
    """The answer of `/api/tags`: models newest first, as Ollama has it, then roles.

    A role is an entry of its model under the name `ROLE:latest`, with the model's name as its
    `details.parent_model`: every name in Ollama's own lists has a tag, and clients add that one to a name
    without. `auto` is listed in the same way, and `auto:fast` as it stands. A role whose model no instance
    has is left out, for clients offer what they find here; so is one whose name is that of a model.
    """
    found = sorted(models, key=_modified_s, reverse=True)
    names = {model_key(name_of(model.entry)) for model in found}
    roles = [
        _alias_entry(alias.name, alias.of)
        for alias in aliases
        if alias.of is not None and model_key(alias.name) not in names
    ]
    return {"models": [*(_whole(model.entry) for model in found), *roles]}


def show_document(entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """The answer of `/api/show` for a model whose server has no such call.

    Such a server does not say what a model can do: every client expects that it completes text.

    Args:
        entry: what is listed of the model; None where it is not listed any more.
    """
    whole = _whole(entry or {})
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": whole["details"],
        "model_info": {},
        "capabilities": whole.get("capabilities") or ["completion"],
        "modified_at": whole["modified_at"],
    }


def _alias_entry(role: str, model: KnownModel) -> dict[str, Any]:
    entry = _whole(model.entry)
    name = role if ":" in role else f"{role}:{DEFAULT_TAG}"
    return {
        **entry,
        "name": name,
        "model": name,
        "details": {**entry["details"], "parent_model": entry["name"]},
    }


def ps_document(loaded: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The answer of `/api/ps`, with the instance that holds each model.

    Args:
        loaded: instances, and what their servers say of one model each.
    """
    return {"models": [{**entry, "instance": instance} for instance, entry in loaded]}


def models_document(models: Iterable[KnownModel], aliases: Iterable[Alias]) -> dict[str, Any]:
    """The answer of `/v1/models`."""
    entries = [
        model_document(name_of(model.entry), model) for model in sorted(models, key=_modified_s, reverse=True)
    ]
    return {"object": "list", "data": [*entries, *map(alias_document, aliases)]}


def model_document(called: str, model: KnownModel) -> dict[str, Any]:
    """One entry of `/v1/models`, under the name by which it was asked for."""
    return {
        "id": called,
        "object": "model",
        "created": int(_modified_s(model)),
        "owned_by": _namespace(name_of(model.entry)),
        **_hints(model),
    }


def alias_document(alias: Alias) -> dict[str, Any]:
    model = alias.of
    return {
        "id": alias.name,
        "object": "model",
        "created": 0 if model is None else int(_modified_s(model)),
        "owned_by": _OWNER_OF_ROLES,
        **_hints(model),
        "model": alias.model,
        "kind": alias.kind.value,
    }


def _hints(model: KnownModel | None) -> dict[str, Any]:
    model = model or KnownModel({}, (), ())
    details = details_of(model.entry)
    return {
        "loaded": bool(model.loaded_on),
        "status": model.status,
        "offload": model.offload,
        "latency_ms": model.latency_ms,
        "instances": list(model.instances),
        "digests": {digest: list(ids) for digest, ids in model.digests.items()},
        "context_length": details.context_length,
        "capabilities": None if details.capabilities is None else list(details.capabilities),
        "offload_hint": _offload_hint(model, details)._asdict(),
    }


def _offload_hint(model: KnownModel, known: Details) -> OffloadHint:
    details, host = model.entry.get("details"), model.entry.get("remote_host")
    size = details.get("parameter_size") if isinstance(details, dict) else None
    return offload_hint(
        capabilities=known.capabilities,
        parameters=size if isinstance(size, str) else "",
        tier=model.tier,
        remote_host=host if isinstance(host, str) else "",
        is_available=model.is_available and bool(model.instances),
    )


def _whole(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry with every key that clients rely on, whatever the server left out."""
    details = entry.get("details")
    name = name_of(entry)
    return {
        **_BLANK,
        **entry,
        "name": name,
        "model": entry.get("model") or name,
        "details": {**BLANK_DETAILS, **(details if isinstance(details, dict) else {})},
    }


def _modified_s(model: KnownModel) -> float:
    """Seconds since 1970, 0 where nobody knows."""
    at = read_time(model.entry.get("modified_at"))
    return max(0.0, at.timestamp()) if at is not None else 0.0


def _namespace(name: str) -> str:
    """The owner of a model: `user` of `user/model` and of `host/user/model`."""
    parts = name.split("/")
    return parts[-2] if len(parts) > 1 else _DEFAULT_NAMESPACE
