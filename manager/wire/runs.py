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
    view = memoryview(raw)
    scan = Scan(view)
    try:
        first = yield from scan.space()
        if first != _OBJECT:
            raise BadBodyError("expected a JSON object")
        fields = yield from scan.fields()
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
                rest[name] = _ANY.decode(view[start:end])
    except (NotJsonError, msgspec.DecodeError, RecursionError) as error:
        raise BadBodyError(f"it is not JSON: {error}") from None
    return Submission(body, rest)
