"""The effective configuration as YAML: every value with where it came from, and loadable again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from manager.settings.addresses import without_credentials
from manager.settings.model import NOT_EXTERNAL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.settings import LoadedSettings
    from manager.settings.schema import KeyPath

_COMMENT_COLUMN = 56


class _OneLine(yaml.SafeDumper):
    """Writes text with line breaks in quotes, where it would take several lines."""


def _represent_text(dumper: _OneLine, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_OneLine.add_representer(str, _represent_text)


def effective_yaml(loaded: LoadedSettings) -> str:
    """Never the content of the key file, nor credentials inside an address."""
    head = [
        f"# configuration file: {loaded.file or 'none'}",
        "# ttl_s and pinned may be overridden for an instance over the API: `ollama-manager status` knows.",
        "# What roles are may be, too: GET /api/settings/models/effective knows.",
    ]
    return "\n".join([*head, *_lines(loaded, loaded.settings.model_dump(mode="json"), ())]) + "\n"


def _lines(loaded: LoadedSettings, values: dict[str, Any], path: KeyPath) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in values.items():
        here = (*path, key)
        if _left_out(here, value, values):
            continue
        if isinstance(value, dict) and value:
            yield f"{indent}{_scalar(key)}:"
            yield from _lines(loaded, value, here)
        else:
            yield f"{indent}{_scalar(key)}: {_scalar(value)}".ljust(_COMMENT_COLUMN) + (
                f" # {_one_line(loaded.source_of(here))}"
            )


def _left_out(path: KeyPath, value: Any, values: dict[str, Any]) -> bool:
    """A key that says nothing, or must not be written, in the description of an instance."""
    if len(path) != 3 or path[0] != "instances":  # noqa: PLR2004  (instances.ID.KEY)
        return False
    return value is None or (values["driver"] == "external" and path[-1] in NOT_EXTERNAL)


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
