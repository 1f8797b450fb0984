"""Keys for servers that somebody else runs, from the environment or a file. Nothing here shows one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from manager.errors import Reason, UnavailableError
from manager.settings.ownership import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.instance import KeySource

_LONGEST_KEY = 4096


def read_server_key(source: KeySource, environ: Mapping[str, str] = os.environ) -> str:
    """Return the key. A file is read anew each time; call it in a thread.

    Raises:
        UnavailableError: there is no usable key. The message names the variable or the file, nothing else.
    """
    if source.env is not None:
        place = f"the environment variable {source.env}"
        raw = environ.get(source.env, "").encode(errors="surrogateescape")
        if not raw.strip():
            raise _unusable(place, "is not set")
    else:
        file = source.file or Path()
        place = str(file)
        try:
            with open(open_regular(file), "rb") as stream:  # noqa: PTH123
                raw = stream.read(_LONGEST_KEY + 1)
        except (OSError, ValueError) as error:
            why = (
                error.strerror
                if isinstance(error, OSError) and error.strerror
                else "it is not a regular file"
            )
            raise _unusable(place, f"cannot be read ({why})") from None
    key = raw.strip()
    if not key:
        raise _unusable(place, "is empty")
    if len(key) > _LONGEST_KEY:
        raise _unusable(place, f"has more than {_LONGEST_KEY} characters")
    # A header carries these without quoting.
    if any(not 0x21 <= byte <= 0x7E for byte in key):  # noqa: PLR2004
        raise _unusable(place, "has spaces, several lines or characters that are not ASCII")
    return key.decode("ascii")


def _unusable(place: str, why: str) -> UnavailableError:
    return UnavailableError(f"no key: {place} {why}", reason=Reason.INSTANCE_UNAVAILABLE)
