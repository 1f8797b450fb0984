"""The effective configuration as YAML: every value with where it came from, and loadable again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from manager.domain.instance import MANAGED_DRIVERS
from manager.errors import ConfigurationError
from manager.settings.addresses import without_credentials
from manager.settings.model import NOT_CLOUD, NOT_EXTERNAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manager.settings import LoadedSettings
    from manager.settings.schema import KeyPath

_COMMENT_COLUMN = 56
_NOT_FOR = {"external": NOT_EXTERNAL, "cloud": NOT_CLOUD}


class _OneLine(yaml.SafeDumper):
    """Writes text with line breaks in quotes, where it would take several lines."""


def _represent_text(dumper: _OneLine, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_OneLine.add_representer(str, _represent_text)


@dataclass(frozen=True, slots=True)
class Live:
    """Overrides of a running daemon: values by key path; `note` says what may be missing."""

    values: Mapping[KeyPath, Any] = field(default_factory=dict)
    note: str = "no daemon runs: what was changed over the API is left out, and counts at the next start"


def effective_yaml(loaded: LoadedSettings, live: Live = Live()) -> str:
    """Never the content of the key file, nor credentials inside an address."""
    values = loaded.settings.model_dump(mode="json")
    for path, value in live.values.items():
        _put(values, path, value)
    files = f"{loaded.file or 'none'}" + (f", overlaid by {loaded.overlay}" if loaded.overlay else "")
    head = [f"# configuration file: {files}", f"# {live.note}"]
    return "\n".join([*head, *_lines(loaded, live, values, ())]) + "\n"


def check_as_serve(loaded: LoadedSettings) -> None:
    """Raise what `serve` would raise for this configuration, with its templates, keys and certificates.

    A file that this user may not read is passed over: it is meant for the user of the daemon.

    Raises:
        ConfigurationError: with every problem that was found.
    """
    from manager.adapters.tls import listener_tls_of, own_tls_of  # noqa: PLC0415
    from manager.settings import load_templates, read_keys, resolve_instances  # noqa: PLC0415

    resolve_instances(loaded, load_templates(loaded.settings))
    for check in (listener_tls_of, own_tls_of):
        try:
            check(loaded.settings)
        except ConfigurationError as error:
            if not isinstance(error.__cause__, PermissionError):
                raise
    for key_file in loaded.settings.server.key_files:
        try:
            read_keys((key_file,))
        except ConfigurationError as error:
            if not isinstance(error.__cause__, PermissionError):
                raise


def live_values(loaded: LoadedSettings) -> Live:
    """Ask the daemon that holds the state directory, if there is one."""
    from manager.cli.client import Daemon  # noqa: PLC0415  (it imports requests)
    from manager.cli.failures import CommandError  # noqa: PLC0415
    from manager.cli.locate import configured_daemon, current_holder, file_of_daemon  # noqa: PLC0415

    try:
        holder = current_holder(loaded.settings.state.dir)
        if holder is None or holder.url is None:
            return Live()
        daemon = Daemon(configured_daemon(loaded))
        models, instances = daemon.effective_models(), daemon.status_document()["instances"]
    except (CommandError, ConfigurationError) as error:
        why = " ".join(error.message.split())
        return Live(note=f"what was changed over the API is left out, the daemon was not asked: {why}")
    values = {**_of_instances(loaded, instances), **_of_roles(loaded, models["roles"])}
    values |= {
        (section, field): one["value"]
        for section in ("fallback", "rollout")
        for field, one in models.get(section, {}).items()
        if one["source"] == "override"
    }
    note = f"the values with the source `override` were changed over the API of {holder.url}"
    differs = file_of_daemon(loaded, holder)
    return Live(values, note if differs is None else f"{note}\n# warning: {differs}")


def _of_instances(loaded: LoadedSettings, instances: list[dict[str, Any]]) -> dict[KeyPath, Any]:
    settings = loaded.settings
    found: dict[KeyPath, Any] = {}
    for one in instances:
        written = settings.instances.get(one["id"])
        if written is None or one["driver"] not in MANAGED_DRIVERS:
            continue
        ttl_s = settings.lifecycle.ttl_s if written.ttl_s is None else written.ttl_s
        for key, value in (("ttl_s", ttl_s), ("pinned", written.pinned)):
            if one[key] != value:
                found["instances", one["id"], key] = one[key]
    return found


def _of_roles(loaded: LoadedSettings, roles: dict[str, Any]) -> dict[KeyPath, Any]:
    found: dict[KeyPath, Any] = {}
    for role, fields in roles.items():
        is_new = role not in loaded.settings.roles
        for key, one in fields.items():
            inner = {(key,): one} if "source" in one else {(key, name): value for name, value in one.items()}
            found |= {
                ("roles", role, *path): value["value"]
                for path, value in inner.items()
                if is_new or value["source"] == "override"
            }
    return found


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(str(key), {})
    values[str(path[-1])] = value


def _lines(loaded: LoadedSettings, live: Live, values: dict[str, Any], path: KeyPath) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in values.items():
        here = (*path, key)
        if _left_out(here, value, values):
            continue
        if isinstance(value, dict) and value and here not in live.values:
            yield f"{indent}{_scalar(key)}:"
            yield from _lines(loaded, live, value, here)
        else:
            source = "override" if here in live.values else loaded.source_of(here)
            yield (
                f"{indent}{_scalar(key)}: {_scalar(value)}".ljust(_COMMENT_COLUMN) + f" # {_one_line(source)}"
            )


def _left_out(path: KeyPath, value: Any, values: dict[str, Any]) -> bool:
    """A key that says nothing, or must not be written, in the description of an instance."""
    if len(path) != 3 or path[0] != "instances":  # noqa: PLR2004  (instances.ID.KEY)
        return False
    return value is None or path[-1] in _NOT_FOR.get(values["driver"], ())


def _scalar(value: Any) -> str:
    """A value, lists and lists of mappings included, on one line."""
    shown = without_credentials(value) if isinstance(value, str) else value
    if isinstance(value, float) and value.is_integer():
        shown = int(value)
    text = yaml.dump(
        shown,
        Dumper=_OneLine,
        default_flow_style=True,
        width=float("inf"),
        allow_unicode=True,
        sort_keys=False,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _one_line(text: str) -> str:
    return " ".join(text.split())
