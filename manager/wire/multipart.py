"""Forms in parts (RFC 7578): the name of the model is found in them, and can be replaced."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from manager.domain.models import MOST_NAME_LENGTH

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_FIELD = b"model"
_DISPOSITION = b"content-disposition"
_TRANSFER_ENCODING = b"content-transfer-encoding"
# Between the value of a part's last header and its content.
_END_OF_HEAD = b"\r\n\r\n"
_MOST_NAME_BYTES = 4 * MOST_NAME_LENGTH
_MOST_BOUNDARY_BYTES = 70
_MOST_PARTS = 1000  # as Go takes at most


class BadFormError(ValueError):
    """It is no such form; the message is for the client."""


class Found(Enum):
    """The knowledge of the model after the bytes that came so far."""

    NOT_YET = auto()
    NAMED = auto()
    NEVER = auto()


def boundary_of(content_type: str) -> bytes:
    """Return what separates the parts.

    Raises:
        BadFormError: the type is another one, or names no boundary.
    """
    kind, parameters = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise BadFormError("the request must be multipart/form-data")
    boundary = parameters.get(b"boundary", b"")
    if not 0 < len(boundary) <= _MOST_BOUNDARY_BYTES or "boundary*" in content_type.lower():
        raise BadFormError("the content type names no boundary")
    return boundary


def is_named_in(query: bytes) -> bool:
    """Whether the query of the request names a model, which a server reads before that of the form."""
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    return any(name == _FIELD.decode() for name, _ in pairs)


class FormHead:
    """The beginning of a form, which is held until the field `model` has come.

    Feed it until `found` is something else than NOT_YET. Its reader has to find the model that the server
    finds, so it refuses what the two could understand differently.

    Source: Go mime/multipart, as Ollama's `middleware/openai.go` TranscriptionMiddleware calls it: the first
    part of that name counts which is no file.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"--" + boundary
        self._data = bytearray()
        self._parts = parts = _Parts()
        # The parser refers to `_Parts`, which refers to nothing: a cycle would keep the data until a full
        # garbage collection.
        callbacks: MultipartCallbacks = {
            "on_part_begin": parts.part_began,
            "on_header_field": parts.header_name,
            "on_header_value": parts.header_value,
            "on_header_end": parts.header_ended,
            "on_headers_finished": parts.head_ended,
            "on_part_data": parts.part_data,
            "on_part_end": parts.part_ended,
            "on_end": parts.form_ended,
        }
        self._parser = MultipartParser(boundary, callbacks)

    @property
    def found(self) -> Found:
        return self._parts.found

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def model(self) -> str:
        """The name as it came; empty unless it is named."""
        return self._parts.model

    def feed(self, piece: bytes) -> None:
        """Take more of the form.

        Raises:
            BadFormError: it is none, or its model is no name.
        """
        self._parts.before = len(self._data)
        try:
            self._parser.write(piece)
        except FormParserError as error:
            why = f"cannot be read: {error}" if self._parts.count else "does not begin with its boundary"
            raise BadFormError(f"the form {why}") from None
        finally:
            self._data += piece

    def with_model(self, model: str) -> bytes:
        """Return all that came, naming that model instead."""
        data, parts = self._data, self._parts
        if parts.found is Found.NAMED:
            end = parts.value_at + len(parts.value)
            return bytes(data[: parts.value_at]) + model.encode() + bytes(data[end:])
        first = data.find(self._delimiter)
        part = b'%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
        return bytes(data[:first]) + part % (self._delimiter, _FIELD, model.encode()) + bytes(data[first:])


class _Parts:
    """Takes what the parser finds. `before` is how many bytes came before the piece that is being parsed."""

    def __init__(self) -> None:
        self.before = 0
        self.count = 0
        self.found = Found.NOT_YET
        self.value = bytearray()
        self.value_at = 0
        self._name = self._header = b""
        self._headers: dict[bytes, bytes] = {}
        self._content_at = 0
        self._in_model = False

    @property
    def model(self) -> str:
        return self.value.decode("utf-8", "replace").strip()

    def part_began(self) -> None:
        self._headers = {}
        self.count += 1
        if self.count > _MOST_PARTS:
            raise BadFormError(f"the form has more than {_MOST_PARTS} parts")

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        # The data of headers is always that of the piece which is being parsed.
        self._content_at = self.before + end + len(_END_OF_HEAD)

    def header_ended(self) -> None:
        name = self._name.lower()
        if not self._header or name in self._headers:
            raise BadFormError("a part of the form has an empty header, or one twice")
        self._headers[name] = self._header
        self._name = self._header = b""

    def head_ended(self) -> None:
        disposition = self._headers.get(_DISPOSITION, b"").decode("latin-1")
        kind, parameters = parse_options_header(disposition)
        names = [name.partition("=")[0].strip().lower() for name in disposition.split(";")]
        if '\\\\"' in disposition or any(name.startswith("name*") for name in names):
            raise BadFormError("the name of a part can be understood in two ways")
        is_model = kind == b"form-data" and parameters.get(b"name") == _FIELD and self.found is Found.NOT_YET
        self._in_model = is_model and not parameters.get(b"filename")
        if is_model and any(name.startswith("filename*") for name in names):
            raise BadFormError("the form's model can be understood as a file")
        if self._in_model:
            self.value_at = self._content_at
            if _TRANSFER_ENCODING in self._headers:
                raise BadFormError("the form's model is encoded")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_model:
            self.value += data[start:end]
            if len(self.value) > _MOST_NAME_BYTES:
                raise BadFormError(f"model must be a name of at most {MOST_NAME_LENGTH} characters")

    def part_ended(self) -> None:
        if self._in_model:
            self._in_model = False
            if len(self.model) > MOST_NAME_LENGTH:
                raise BadFormError(f"model must be a name of at most {MOST_NAME_LENGTH} characters")
            self.found = Found.NAMED

    def form_ended(self) -> None:
        if self.found is Found.NOT_YET:
            self.found = Found.NEVER
