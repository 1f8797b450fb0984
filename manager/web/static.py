"""The static files of the page, in memory, under addresses that change with their content."""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from importlib.resources.abc import Traversable

PREFIX = "/ui/static/"
_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class StaticFile(NamedTuple):
    """A file, the same in gzip, and its media type."""

    content: bytes
    gzipped: bytes
    media_type: str


@cache
def static_files() -> Mapping[str, StaticFile]:
    """Return the files by their address below `PREFIX`: the digest of all of them, and their name."""
    found = dict(_walk(files(__package__) / "static", ""))
    every = hashlib.sha256()
    for name in sorted(found):
        every.update(found[name].content)
    return {f"{every.hexdigest()[:12]}/{name}": one for name, one in found.items()}


@cache
def static_url(name: str) -> str:
    """Return the address of a file, such as `page.css`.

    Raises:
        LookupError: there is no such file.
    """
    for address in static_files():
        if address.partition("/")[2] == name:
            return PREFIX + address
    raise LookupError(f"no static file {name!r}")


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, StaticFile]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif (media_type := _TYPES.get(entry.name.rpartition(".")[2])) is not None:
            content = entry.read_bytes()
            yield prefix + entry.name, StaticFile(content, gzip.compress(content, mtime=0), media_type)
