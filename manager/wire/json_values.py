"""JSON values as Go reads them, which takes more than orjson does."""

from __future__ import annotations

import json
from math import isfinite
from typing import TYPE_CHECKING, Any

import orjson

from manager.wire.errors import BadBodyError

if TYPE_CHECKING:
    from manager.wire.body import Buffer

NO_JSON = "the request body is not JSON, or nests too deep"


def loaded(value: Buffer) -> Any:
    """Return a JSON value.

    Raises:
        BadBodyError: it cannot be decoded.
    """
    try:
        return orjson.loads(memoryview(value))
    except orjson.JSONDecodeError:
        pass
    # Half a surrogate pair, numbers beyond 64 bits, bytes that are no UTF-8.
    text = bytes(value).decode(errors="replace")
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise BadBodyError(NO_JSON) from None


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(text)
    return number
