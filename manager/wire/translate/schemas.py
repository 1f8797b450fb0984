"""JSON Schemas of structured answers, as servers that enforce only some of them demand them."""

from __future__ import annotations

from typing import Any

# Keywords that have values in them, not schemas.
_VALUES = frozenset({"const", "default", "enum", "examples", "required"})


def closed(schema: Any) -> Any:
    """Return the schema without properties that it does not name.

    OpenAI and Anthropic demand that every object says so. What is valid then, is valid as it was asked for.
    """
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: one if name in _VALUES else closed(one) for name, one in schema.items()}
    if found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found
