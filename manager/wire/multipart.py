"""Forms in parts (RFC 7578), as far as the name of a model has to be found and put into them."""

from __future__ import annotations

import re
from enum import Enum, auto

_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name=(?:"([^"]*)"|([^\s;"]+))', re.IGNORECASE)
_DISPOSITION = b"content-disposition:"
_FIELD = b"model"
_END_OF_HEAD = b"\r\n\r\n"
_MOST_HEAD_BYTES = 16 * 1024
_MOST_NAME_BYTES = 1024


class BadFormError(ValueError):
    """It is no such form; the message is for the caller."""


class Found(Enum):
    """What is known of the model after what came so far."""

    NOT_YET = auto()
    NAMED = auto()
    NEVER = auto()


def boundary_of(content_type: str) -> bytes:
    """What separates the parts.

    Raises:
        BadFormError: the type is another one, or does not say.
    """
    if not content_type.lower().startswith("multipart/form-data"):
        raise BadFormError("the request must be multipart/form-data")
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise BadFormError("the content type names no boundary")
    return (match[1] or match[2]).encode("latin-1")


class FormHead:
    """The beginning of a form, which is held until the field `model` has come.

    Feed it until `found` is something else than NOT_YET. Nothing is looked at twice.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        # The first delimiter needs no line before it.
        self._data = bytearray(b"\r\n")
        self._at = 0
        self._in_head = False
        self._head_at = 0
        self._value_at: int | None = None
        self._value: tuple[int, int] | None = None
        self.found = Found.NOT_YET

    @property
    def size(self) -> int:
        return len(self._data) - 2

    @property
    def model(self) -> str:
        """The name as it came; empty unless it is named."""
        if self._value is None:
            return ""
        start, end = self._value
        return bytes(self._data[start:end]).decode("utf-8", "replace").strip()

    def feed(self, piece: bytes) -> None:
        """Take more of the form.

        Raises:
            BadFormError: it is none.
        """
        self._data += piece
        while self.found is Found.NOT_YET and self._step():
            pass

    def with_model(self, model: str) -> bytes:
        """All that came, naming that model instead."""
        value = model.encode()
        if self._value is not None:
            start, end = self._value
            return bytes(self._data[2:start]) + value + bytes(self._data[end:])
        part = b'%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b'
        first = self._data.find(self._delimiter)
        new = part % (self._delimiter, _FIELD, value)
        return bytes(self._data[:first] + new + self._data[first:])[2:]

    def _step(self) -> bool:
        """Take in one delimiter or one head of a part; whether there was one."""
        if self._in_head:
            return self._read_head()
        position = self._data.find(self._delimiter, self._at)
        if position < 0:
            self._at = max(self._at, len(self._data) - len(self._delimiter))
            if self._value_at is not None and len(self._data) - self._value_at > _MOST_NAME_BYTES:
                raise BadFormError("the form's model is no name")
            if self._value_at is None and self._head_at == 0 and len(self._data) > _MOST_HEAD_BYTES:
                raise BadFormError("the form does not begin with its boundary")
            return False
        if self._value_at is not None:
            self._value = (self._value_at, position)
            self.found = Found.NAMED
            return False
        after = position + len(self._delimiter)
        if len(self._data) < after + 2:
            self._at = position
            return False
        if self._data[after : after + 2] == b"--":
            self.found = Found.NEVER
            return False
        self._in_head = True
        self._head_at = self._at = after
        return True

    def _read_head(self) -> bool:
        end = self._data.find(_END_OF_HEAD, self._at)
        if end < 0:
            self._at = max(self._at, len(self._data) - len(_END_OF_HEAD))
            if len(self._data) - self._head_at > _MOST_HEAD_BYTES:
                raise BadFormError("the head of a part of the form has no end")
            return False
        head = bytes(self._data[self._head_at : end])
        self._in_head = False
        self._at = end + len(_END_OF_HEAD)
        if _name_of(head) == _FIELD:
            self._value_at = self._at
        return True


def _name_of(head: bytes) -> bytes | None:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(_DISPOSITION):
            match = _NAME.search(line)
            return None if match is None else match[1] if match[1] is not None else match[2]
    return None
