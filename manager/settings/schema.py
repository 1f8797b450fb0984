"""Questions about the shape of a pydantic model: what a key path leads to, and which keys are known there."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Sequence

KeyPath: TypeAlias = tuple[str | int, ...]


def plain(annotation: Any) -> Any:
    """The type itself, without `Annotated` and without the None of an optional one."""
    if get_origin(annotation) is Annotated:
        return plain(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        (kind,) = (kind for kind in get_args(annotation) if kind is not types.NoneType)
        return plain(kind)
    return annotation


def is_optional(annotation: Any) -> bool:
    return types.NoneType in get_args(annotation)


def is_container(annotation: Any) -> bool:
    """Whether a value is a mapping or a list."""
    kind = plain(annotation)
    return fields_of(kind) is not None or get_origin(kind) in {dict, tuple}


def fields_of(annotation: Any) -> dict[str, Any] | None:
    """Names, as they are written, and types of a model's keys; None when `annotation` is no model."""
    kind = plain(annotation)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    return None


def step(annotation: Any, key: str | int) -> Any:
    """The type behind one key, None when there is no such key. Anything may be inside `Any`."""
    kind = plain(annotation)
    if kind is Any:
        return Any
    fields = fields_of(kind)
    if fields is not None:
        return fields.get(str(key))
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return arguments[1]
    return arguments[0] if get_origin(kind) is tuple else None


def at(annotation: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        annotation = step(annotation, key)
    return annotation
