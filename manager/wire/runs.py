"""The body of a submitted run: a small JSON object that holds the body of the request as it came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from manager.wire.body import SMALL_BYTES
from manager.wire.errors import BadBodyError
from manager.wire.scan import NotJsonError, Scan

if TYPE_CHECKING:
    from manager.wire.steps import Steps

_BODY = "body"
_OBJECT = b"{"[0]
_ANY = msgspec.json.Decoder(Any)


@dataclass(frozen=True, slots=True)
class Submission:
    """A submitted run.

    `body` is a JSON value as it came, None where there is none; `rest` has the other fields.
    """

    body: bytes | None
    rest: dict[str, Any]


def submission(raw: bytes) -> Steps[Submission]:
    """Read the body of a submission, in steps. The request inside is not looked into.

    Raises:
        BadBodyError: it is no JSON object, names a field twice, or a field beside the body is too long.
    """
    scan = Scan(memoryview(raw))
    if (yield from scan.space()) != _OBJECT:
        raise BadBodyError("expected a JSON object")
    try:
        fields = yield from scan.fields()
    except NotJsonError as error:
        raise _not_json(error) from None
    if (yield from scan.space()) >= 0:
        raise BadBodyError("there is more behind the JSON object")
    body, rest = None, {}
    for name, start, end in fields:
        if name in rest or (name == _BODY and body is not None):
            raise BadBodyError(f"the field {name!r} is given twice")
        if name == _BODY:
            body = raw[start:end]
        elif end - start > SMALL_BYTES:
            raise BadBodyError(f"the field {name!r} is longer than {SMALL_BYTES} bytes")
        else:
            rest[name] = _read(raw[start:end])
    return Submission(body, rest)


def _read(value: bytes) -> Any:
    try:
        return _ANY.decode(value)
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from None


def _not_json(error: Exception) -> BadBodyError:
    return BadBodyError(f"it is not JSON: {error}")
