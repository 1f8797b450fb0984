"""The sources of settings: each as nested values, with a place for every one of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_settings import PydanticBaseSettingsSource

from manager.settings.model import DEFAULT_ENGINE_URL, Settings, default_state_dir
from manager.settings.problems import Problem, nearest
from manager.settings.schema import KeyPath, at, fields_of, is_container, is_optional, plain, step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo

    from manager.settings.yaml_file import Document

PREFIX = "OLLAMA_MANAGER_"
# These say where to look, they are no settings; the last three are for the client commands.
NOT_SETTINGS = frozenset({f"{PREFIX}{name}" for name in ("CONFIG", "ENV", "URL", "KEY", "CA")})
_ENGINE_URL: KeyPath = ("engine", "url")
_STATE_DIR: KeyPath = ("state", "dir")
# Mappings whose names a variable can spell, and what `_` in one means where the file has no such name.
_SPELLABLE: dict[KeyPath, str] = {("instances",): "-", ("roles",): "_"}
# `*` is the id of any instance.
_PATHS: tuple[KeyPath, ...] = (
    ("server", "key_file"),
    ("server", "tls", "certificate"),
    ("server", "tls", "key"),
    _STATE_DIR,
    ("templates", "dir"),
    ("instances", "*", "key_file"),
    ("instances", "*", "tls", "ca"),
    ("instances", "*", "tls", "certificate"),
    ("instances", "*", "tls", "key"),
    ("routing", "words"),
    ("routing", "learned"),
    ("discovery", "manifest"),
)

Kind = Literal["command line", "environment", "file", "default"]


@dataclass(frozen=True, slots=True)
class Place:
    """The place where a value was written; `name` is an option, a variable or FILE:LINE."""

    kind: Kind
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.kind

    @property
    def description(self) -> str:
        return self.kind if self.kind in {"command line", "default"} else f"{self.kind} {self.name}"


DEFAULT = Place("default")
_NO_NAMES: Mapping[str, Any] = MappingProxyType({})


class Source(PydanticBaseSettingsSource):
    """Nested values with the place of each.

    Text is stripped, but for what goes into requests as it is; relative paths are made absolute against
    `base`, and an explicit null where a setting cannot be null becomes its default, so that it overrides what
    lower sources say.
    """

    def __init__(
        self,
        values: dict[str, Any],
        places: dict[KeyPath, Place],
        *,
        base: Path,
        environ: Mapping[str, str],
    ) -> None:
        super().__init__(Settings)
        self.values: dict[str, Any] = _stripped(values, Settings)
        self.places = places
        if _is_null(self.values, _STATE_DIR):
            _put(self.values, _STATE_DIR, _state_dir(environ))
        if _is_null(self.values, _ENGINE_URL):
            _put(self.values, _ENGINE_URL, DEFAULT_ENGINE_URL)
        for path in _spelt_out(_PATHS, self.values):
            found = _get(self.values, path)
            if isinstance(found, list):
                _put(self.values, path, [_absolute(text, base) for text in found])
            elif found is not None:
                _put(self.values, path, _absolute(found, base))

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return self.values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self.values


def place_of(path: KeyPath, sources: tuple[Source, ...]) -> Place:
    """The place of the value of `path`, or of the nearest thing around it that was written."""
    best, depth = DEFAULT, 0
    for source in sources:
        for end in range(len(path), depth, -1):
            if (place := source.places.get(path[:end])) is not None:
                best, depth = place, end
                break
        if _hides_lower(source.values, path):
            break
    return best


def wrote(path: KeyPath, sources: tuple[Source, ...]) -> Place:
    """The place of exactly this key; the default when it was not written."""
    for source in sources:
        if path in source.places:
            return source.places[path]
        if _hides_lower(source.values, path):
            break
    return DEFAULT


def command_line(overrides: Mapping[str, object], environ: Mapping[str, str]) -> Source:
    """The values of the options; None means that an option was not given."""
    values = _given(overrides)
    places = {
        path: Place("command line", f"--{str(path[-1]).replace('_', '-')}") for path in _paths(values, ())
    }
    return Source(values, places, base=Path.cwd(), environ=environ)


def environment(
    environ: Mapping[str, str], problems: list[Problem], names: Mapping[str, Any] = _NO_NAMES
) -> Source:
    """The values of our variables; one that is no setting goes to `problems`, an empty one counts as unset.

    Args:
        environ: the environment.
        problems: where to complain.
        names: what the file says, for the names in it.
    """
    values: dict[str, Any] = {}
    places: dict[KeyPath, Place] = {}
    found: list[tuple[KeyPath, str]] = []
    if environ.get("DOCKER_HOST", "").strip():
        found.append((_ENGINE_URL, "DOCKER_HOST"))
    # A whole section as JSON comes before a single key of it, which is the more exact.
    for name in sorted(environ, key=lambda name: (name.count("__"), name)):
        if not name.startswith(PREFIX) or name in NOT_SETTINGS:
            continue
        path = _path(name, names)
        if path is None:
            problems.append(Problem(name, "", f"unknown variable; {_suggestion(name)}"))
        elif environ[name].strip():
            found.append((path, name))
    for path, name in found:
        value = _decoded(path, environ[name].strip())
        if not _put(values, path, value):
            continue  # the section around it is no mapping, which validation will say
        for written in _paths(value, path):
            places[written] = Place("environment", name)
        for end in range(1, len(path)):
            places.setdefault(path[:end], Place("environment", name))
    return Source(values, places, base=Path.cwd(), environ=environ)


def configuration_file(document: Document, environ: Mapping[str, str]) -> Source:
    places = {path: Place("file", f"{document.file}:{line}") for path, line in document.lines.items()}
    base = Path(document.file).absolute().parent
    return Source(document.data or {}, places, base=base, environ=environ)


def defaults(environ: Mapping[str, str]) -> Source:
    """The one default that depends on the environment."""
    return Source({"state": {"dir": None}}, {}, base=Path.cwd(), environ=environ)


def _state_dir(environ: Mapping[str, str]) -> str | None:
    try:
        return str(default_state_dir(environ))
    except ValueError:
        return None  # said by validation, if nobody sets it


def _absolute(text: Any, base: Path) -> Any:
    return str(base / _expanded(text)) if isinstance(text, str) and text else text


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _path(name: str, names: Mapping[str, Any]) -> KeyPath | None:
    """The setting a variable stands for. A name is written in capitals, with `_` for what is no letter."""
    path: KeyPath = ()
    if name != name.upper():
        return None
    for word in name.removeprefix(PREFIX).split("__"):
        fields = fields_of(at(Settings, path))
        if path in _SPELLABLE and word:
            path = (*path, _named(word.lower(), _get(names, path), _SPELLABLE[path]))
        elif fields is not None and word.lower() in fields:
            path = (*path, word.lower())
        else:
            return None
    return path


def _named(word: str, names: Any, stands_for: str) -> str:
    spelled = str.maketrans("-.", "__")
    there = [name for name in names or () if isinstance(names, dict) and name.translate(spelled) == word]
    return there[0] if len(there) == 1 else word.replace("_", stands_for)


def _suggestion(name: str) -> str:
    words = name.upper().removeprefix(PREFIX).split("__")
    instance = words[1] if len(words) > 1 and words[1] else "ID"
    allowed = list(_names((), PREFIX.removesuffix("_"), "_", instance))
    hint = nearest(name.upper(), allowed)
    return f"{hint}allowed: {PREFIX}<SECTION>__<KEY>, with the sections {', '.join(Settings.model_fields)}"


def _names(path: KeyPath, prefix: str, separator: str, name: str) -> Iterator[str]:
    """Every variable name that leads to a setting below `path`, for one instance or role."""
    inner = (name,) if path in _SPELLABLE else tuple(fields_of(at(Settings, path)) or ())
    for key in inner:
        yield (whole := f"{prefix}{separator}{key.upper()}")
        yield from _names((*path, key), whole, "__", name)


def _decoded(path: KeyPath, text: str) -> Any:
    """The value that a variable's text means; text that fits nothing stays text, for validation to refuse."""
    kind = at(Settings, path)
    if is_container(kind):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    if text == "null" and (is_optional(kind) or path in {_ENGINE_URL, _STATE_DIR}):
        return None
    if path in _spelt_out(_PATHS, {"instances": {path[1]: None}} if len(path) > 1 else {}):
        return text
    try:
        return TypeAdapter(plain(kind)).validate_strings(text)
    except ValidationError:
        return text


def _spelt_out(paths: tuple[KeyPath, ...], values: Mapping[str, Any]) -> tuple[KeyPath, ...]:
    """The paths, with each id of an instance for `*`."""
    ids = values.get("instances")
    names = tuple(ids) if isinstance(ids, dict) else ()
    return tuple(
        (path[0], name, *path[2:]) if name else path
        for path in paths
        for name in (names if "*" in path else ("",))
    )


def _given(overrides: Mapping[str, object]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, dict):
            if inner := _given(value):
                values[key] = inner
        elif value is not None:
            values[key] = str(value) if isinstance(value, Path) else value
    return values


def _stripped(value: Any, kind: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(inner, step(kind, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_stripped(inner, step(kind, index)) for index, inner in enumerate(value)]
    return value.strip() if isinstance(value, str) and kind is not Any else value


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Every key path in `value`, itself included."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _paths(inner, (*path, index))


def _get(values: Any, path: KeyPath) -> Any:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
    return values


def _is_null(values: dict[str, Any], path: KeyPath) -> bool:
    section = _get(values, path[:-1])
    return isinstance(section, dict) and section.get(path[-1], DEFAULT) is None


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> bool:
    """Set one value; False when something on the way is no mapping."""
    node: Any = values
    for key in path[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            return False
    node[path[-1]] = value
    return True


def _hides_lower(values: Any, path: KeyPath) -> bool:
    """Whether a source holds something on the way to `path` that is not merged: a list, or a single value."""
    for key in path:
        if not isinstance(values, dict):
            return True
        if key not in values:
            return False
        values = values[key]
    return not isinstance(values, dict)
