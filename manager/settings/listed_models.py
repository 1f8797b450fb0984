"""The list form of the section `models`: each entry names a model and the tasks that it is for.

`models: [{name, task_types, quantization, size_gb}]` is read as roles, one a task, each with that model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from manager.settings.routing import LONGEST_ROLE_NAME, ROLE_NAME

if TYPE_CHECKING:
    from manager.settings.yaml_file import Document

_SECTION, _ROLES = "models", "roles"
_KEYS = ("name", "task_types", "quantization", "size_gb")
_ALLOWED = f"expected a mapping with {', '.join(_KEYS)}"


def translate_listed_models(document: Document) -> None:
    """Put roles in the place of a list of models; what is wrong with the list is in the document's problems.

    A role that the file has a model for keeps it. `quantization` and `size_gb` are for the reader: a model's
    name has its quantization, and its size is measured.
    """
    data = document.data
    listed = None if data is None else data.get(_SECTION)
    if data is None or not isinstance(listed, list):
        return
    roles = data.setdefault(_ROLES, {})
    data[_SECTION] = {}
    if not isinstance(roles, dict):
        return  # which is refused later
    taken: dict[str, str] = {}
    for at, entry in enumerate(listed):
        name = _name(document, at, entry)
        if name is None:
            continue
        for place, task in enumerate(entry.get("task_types", [])):
            path = (_SECTION, at, "task_types", place)
            line = document.lines.get(path, 1)
            if (
                not isinstance(task, str)
                or not re.fullmatch(ROLE_NAME, task)
                or len(task) > LONGEST_ROLE_NAME
            ):
                document.refuse(line, path, f"{task!r}; expected the name of a role, in small letters")
            elif task in taken:
                document.refuse(
                    line, path, f"{task!r} is a task of {taken[task]} already; expected one model"
                )
            else:
                taken[task] = name
                _give(document, roles, task, name, line)


# --- helpers, in call order ---


def _name(document: Document, at: int, entry: Any) -> str | None:
    """Return the name of the model in an entry; None where the entry is wrong."""
    path = (_SECTION, at)
    line = document.lines.get(path, 1)
    if not isinstance(entry, dict):
        document.refuse(line, path, f"{entry!r}; {_ALLOWED}")
        return None
    for key in entry:
        if key not in _KEYS:
            document.refuse(line, (*path, key), f"unknown key; {_ALLOWED}")
    name, tasks, size = entry.get("name"), entry.get("task_types", []), entry.get("size_gb", 0)
    if not isinstance(name, str) or not name.strip():
        document.refuse(line, (*path, "name"), f"{name!r}; expected the name of a model")
        return None
    if not isinstance(tasks, list):
        document.refuse(line, (*path, "task_types"), f"{tasks!r}; expected a list of tasks")
        return None
    if isinstance(size, bool) or not isinstance(size, int | float) or size < 0:
        document.refuse(line, (*path, "size_gb"), f"{size!r}; expected a number of gigabytes")
    if not isinstance(entry.get("quantization", ""), str):
        document.refuse(line, (*path, "quantization"), "expected text such as q4_K_M")
    return name


def _give(document: Document, roles: dict[str, Any], task: str, name: str, line: int) -> None:
    """Give a role its model, unless it has one."""
    role = roles.setdefault(task, {})
    if isinstance(role, dict) and "model" not in role:
        role["model"] = name
        document.lines.setdefault((_ROLES, task), line)
        document.lines[_ROLES, task, "model"] = line
