"""Vectors of servers that speak OpenAI's API, read into the neutral form. Garbage becomes `Failed`."""

from __future__ import annotations

import struct
from base64 import b64decode
from typing import Any

from manager.wire.translate.hub import Failed
from manager.wire.translate.openai_answer import UNREADABLE, BadAnswerError, document_in, usage_in
from manager.wire.translate.vectors import VectorsCame

# The vectors of 2048 texts, OpenAI's limit, with 1536 numbers each.
MOST_VECTOR_BYTES = 64 * 1024 * 1024
# A float of 32 bits holds no more.
_MOST_NUMBER = 3.5e38


class OpenAIVectors:
    """Reads the vectors of `count` texts."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._whole = bytearray()

    def feed(self, data: bytes) -> list[VectorsCame | Failed]:
        """Take the next piece; the answer comes with `end`."""
        self._whole += data
        if len(self._whole) <= MOST_VECTOR_BYTES:
            return []
        self._whole = bytearray()
        return [Failed(f"the server sent an answer of more than {MOST_VECTOR_BYTES} bytes")]

    def end(self) -> list[VectorsCame | Failed]:
        """Return the vectors in the order of their texts."""
        whole, self._whole = bytes(self._whole), bytearray()
        try:
            document = document_in(whole)
            vectors = _vectors(document.get("data"))
        except BadAnswerError as error:
            return [Failed(str(error))]
        if sorted(vectors) != list(range(self._count)):
            return [Failed(f"the server sent {len(vectors)} vectors for {self._count} texts")]
        return [VectorsCame(tuple(vectors[at] for at in range(self._count)), usage_in(document.get("usage")))]


def _vectors(data: Any) -> dict[int, tuple[float, ...]]:
    """Return the vectors by the places of their texts."""
    if not isinstance(data, list):
        raise BadAnswerError(UNREADABLE)
    found: dict[int, tuple[float, ...]] = {}
    for place, one in enumerate(data):
        if not isinstance(one, dict):
            raise BadAnswerError(UNREADABLE)
        at = one.get("index", place)
        found[at if isinstance(at, int) else place] = _vector(one.get("embedding"))
    return found


def _vector(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):  # base64 of floats of 32 bits, the lowest byte first
        try:
            raw = b64decode(value, validate=True)
            value = list(struct.unpack(f"<{len(raw) // 4}f", raw))
        except (ValueError, struct.error):
            value = None
    if not isinstance(value, list) or not value or not all(_is_number(one) for one in value):
        raise BadAnswerError(UNREADABLE)
    return tuple(float(one) for one in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST_NUMBER
