"""A manifest: a file that another program writes, with servers that become external instances.

    servers:
      - {name: whisper, url: "http://127.0.0.1:9000", models: [whisper-1]}

A server of a manifest transcribes and speaks OpenAI's API unless it says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manager.settings.model import CPU_TEMPLATE, DEFAULT_INSTANCE
from manager.settings.problems import Problem
from manager.settings.yaml_file import Document, read_document

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.settings.schema import KeyPath

MOST_SERVERS = 256
_KEY = ("discovery", "manifest")
_SERVERS, _INSTANCES = "servers", "instances"
# The keys that an entry may have for its instance; `name` is the id.
_KEYS = ("url", "serves", "protocol", "models", "device", "priority", "slots")
_ALLOWED = f"expected a mapping with name, {', '.join(_KEYS)}"
_USUAL: Mapping[str, Any] = {"driver": "external", "protocol": "openai", "serves": ["transcribe"]}


def read_manifest(values: Mapping[str, Any], place: str, problems: list[Problem]) -> Document | None:
    """Return the instances of the manifest that settings name, as a file of settings below all others.

    Args:
        values: the settings of all sources together, unchecked.
        place: where the manifest is named.
        problems: takes what is wrong.
    """
    discovery = values.get("discovery")
    named = discovery.get("manifest") if isinstance(discovery, dict) else None
    if not isinstance(named, str) or not named:
        return None  # what is no text is refused later
    try:
        document = read_document(Path(named), regular=True)
    except OSError as error:
        text = f"{named!r} cannot be read ({error.strerror}); expected a file with `servers`"
        problems.append(Problem(place, ".".join(_KEY), text))
        return None
    if document.data is not None:
        document.data = _translated(document, document.data)
        if not isinstance(values.get(_INSTANCES), dict) and isinstance(document.data.get(_INSTANCES), dict):
            # This is the default instance where nothing names one; servers stand beside it.
            document.data[_INSTANCES].setdefault(DEFAULT_INSTANCE, {"template": CPU_TEMPLATE})
    return document


# --- helpers, in call order ---


def _translated(document: Document, data: Mapping[str, Any]) -> dict[str, Any]:
    for key in data:
        if key != _SERVERS:
            document.refuse(document.lines.get((key,), 1), (key,), "unknown key; allowed: servers")
    servers = data.get(_SERVERS)
    if not isinstance(servers, list):
        document.refuse(1, (_SERVERS,), f"{servers!r}; expected a list of servers")
        return {}
    if len(servers) > MOST_SERVERS:
        document.refuse(1, (_SERVERS,), f"{len(servers)} servers; expected at most {MOST_SERVERS}")
        return {}
    instances: dict[str, Any] = {}
    lines = dict(document.lines)
    document.lines.clear()
    for at, server in enumerate(servers):
        here = (_SERVERS, at)
        line = lines.get(here, 1)
        name = server.get("name") if isinstance(server, dict) else None
        if not isinstance(name, str):
            document.refuse(line, here, f"{server!r}; {_ALLOWED}")
        elif name in instances:
            document.refuse(line, (*here, "name"), f"{name!r} is there twice; expected each server once")
        else:
            instances[name] = {**_USUAL, **{key: value for key, value in server.items() if key != "name"}}
            document.lines[_INSTANCES, name] = line
            _note_lines(document, server, here, lines)
    return {_INSTANCES: instances}


def _note_lines(
    document: Document, server: Mapping[str, Any], here: KeyPath, lines: Mapping[KeyPath, int]
) -> None:
    """Note where each key of a server stands, and refuse the unknown ones."""
    for key in server:
        line = lines.get((*here, key), 1)
        if key in _KEYS:
            document.lines[_INSTANCES, server["name"], key] = line
        elif key != "name":
            document.refuse(line, (*here, key), f"unknown key; {_ALLOWED}")
