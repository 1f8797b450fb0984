"""`collections put`, `get`, `delete-item`, `export`, `query`: the items of a collection."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn
from urllib.parse import quote

import click

from manager.cli.collections import NAME, collections_group, daemon_at, path_of, share
from manager.cli.commands import _JSON, _talks
from manager.cli.failures import MISUSED, CommandError, printable, warn
from manager.cli.printing import local_time, one_line, print_json, print_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from manager.cli.client import Daemon, RefusalError

_BATCH = 100
_BATCH_BYTES = 4 * 2**20
_TRIES = 10
_LONGEST_PAUSE_S = 60.0
_AGAIN = (429, 503)
# Of so many hits at most the texts are fetched, one by one.
_MOST_TEXTS = 20
_TEXT_CHARACTERS = 80
_PLACE = re.compile(r"body\.items\.([0-9]+)(\.?)")
_ID = click.argument("item_id", metavar="ID")


@dataclass
class _Batch:
    """Items of consecutive lines that are sent together."""

    items: list[Any] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    size_bytes: int = 0

    def has_room_for(self, item: Mapping[str, Any], size_bytes: int) -> bool:
        """Return whether an item can be added; one with an id that is there already replaces it later."""
        is_small = self.size_bytes + size_bytes <= _BATCH_BYTES
        return not self.items or (len(self.items) < _BATCH and is_small and _id(item) not in self.ids)

    def add(self, item: Mapping[str, Any], number: int, size_bytes: int) -> None:
        self.items.append(item)
        self.lines.append(number)
        self.ids.add(_id(item))
        self.size_bytes += size_bytes


class _Writer:
    """Writes batches, and knows how far it is."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon = daemon
        self._path = path_of(name, "items")
        self.written = 0
        self.last_line = 0
        self.answer: dict[str, Any] = {}

    @property
    def so_far(self) -> str:
        if not self.written:
            return "nothing was written"
        return f"{self.written} items were written, to line {self.last_line}"

    def write(self, batch: _Batch) -> None:
        """Send a batch; wait and send it again while the daemon asks for that.

        Raises:
            RefusalError: it was refused.
        """
        from manager.cli.client import RefusalError  # noqa: PLC0415

        for left in reversed(range(_TRIES)):
            try:
                self.answer = self._daemon.ask("PUT", self._path, {"items": batch.items}, is_long=True)
                break
            except RefusalError as error:
                if left == 0 or error.status not in _AGAIN or error.wait_s is None:
                    raise
                pause_s = min(error.wait_s, _LONGEST_PAUSE_S)
                _progress(f"{self.so_far}; waiting {pause_s:g} s: {error.message}", keep=True)
                time.sleep(pause_s)
        self.written += len(batch.items)
        self.last_line = batch.lines[-1]
        _progress(f"{self.written} items written")


@collections_group.command("put")
@NAME
@click.argument("file", type=click.File("rb"), default="-")
@_JSON
@_talks
def put_items(name: str, file: BinaryIO, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Write the items in FILE: JSON Lines with id, text or vector, and metadata. Without FILE, stdin.

    They are written by the hundred, each hundred completely or not at all. Where the daemon is overloaded the
    command waits as long as it says, some times.
    """
    from manager.cli.client import RefusalError  # noqa: PLC0415

    writer = _Writer(daemon_at(url, config), name)
    batch = _Batch()
    source = getattr(file, "name", "<stdin>")
    try:
        for number, item, size_bytes in _items(file):
            if not batch.has_room_for(item, size_bytes):
                writer.write(batch)
                batch = _Batch()
            batch.add(item, number, size_bytes)
        if batch.items:
            writer.write(batch)
    except _LineError as error:
        message = f"{source}, line {error.number}: {error.message}; {writer.so_far}"
        raise CommandError(message, exit_code=MISUSED) from None
    except RefusalError as error:
        _say_where(error, batch, source, writer)
    except (CommandError, KeyboardInterrupt):
        click.echo(f"{writer.so_far}; it is no harm to write them again", err=True)
        raise
    _progress("")
    if as_json:
        print_json({**writer.answer, "written": writer.written})
    else:
        version = f", version {writer.answer['version']}" if writer.answer else ""
        items = "1 item is" if writer.written == 1 else f"{writer.written} items are"
        click.echo(f"{items} written to {printable(name)}{version}")


@collections_group.command("get")
@NAME
@_ID
@click.option("--vector", is_flag=True, help="With the vector of the active version.")
@_JSON
@_talks
def get_item(
    name: str, item_id: str, url: str | None, config: Path | None, *, vector: bool, as_json: bool
) -> None:
    """Show an item, and which versions have a vector of it."""
    item = daemon_at(url, config).ask("GET", _item_path(name, item_id, vector=vector))
    if as_json:
        print_json(item)
        return
    shown = {
        "id": item["id"],
        "created": local_time(item["created_at"]),
        "metadata": json.dumps(item["metadata"], ensure_ascii=False),
        "version": item["embedding_version"],
        "model": item["embedding_model"],
        "dimensions": item["embedding_dim"],
        "versions": ", ".join(f"{one['embedding_version']} ({one['state']})" for one in item["versions"]),
        "vector": json.dumps(item["vector"]) if item.get("vector") else None,
        "text": item["text"],
    }
    width = max(map(len, shown))
    for key, value in shown.items():
        if value not in (None, ""):
            click.echo(f"{key.ljust(width)}  {printable(str(value))}")


@collections_group.command("delete-item")
@NAME
@_ID
@_JSON
@_talks
def delete_item(name: str, item_id: str, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Remove an item from all versions."""
    document = daemon_at(url, config).ask("DELETE", _item_path(name, item_id))
    if as_json:
        print_json(document)
    else:
        click.echo(f"{printable(item_id)} is removed from {printable(name)}")


@collections_group.command("export")
@NAME
@_talks
def export_items(name: str, url: str | None, config: Path | None) -> None:
    """Write all items to stdout as JSON Lines, in the order of their ids; `put` reads them.

    An item without a text has the vector of the active version instead.
    """
    daemon = daemon_at(url, config)
    lost = 0
    for item in _all_items(daemon, name):
        line = {key: item[key] for key in ("id", "text", "metadata")}
        if item["text"] is None:
            del line["text"]
            vector = daemon.ask("GET", _item_path(name, item["id"], vector=True)).get("vector")
            if vector is None:
                lost += 1
            else:
                line["vector"] = vector
        click.echo(json.dumps(line, ensure_ascii=False))
    if lost:
        warn(f"{lost} items have neither a text nor a vector in the active version: `put` refuses them")


@collections_group.command("query")
@NAME
@click.argument("text", required=False)
@click.option("-k", "count", type=click.IntRange(1, 1000), default=10, show_default=True, help="Hits.")
@click.option("--version", help="Another version than the active one.")
@click.option("--filter", "conditions", metavar="JSON", help='Conditions on the metadata: {"lang": "de"}.')
@click.option("--vector", metavar="JSON", help="A list of numbers instead of TEXT.")
@_JSON
@_talks
def query_collection(
    name: str,
    text: str | None,
    url: str | None,
    config: Path | None,
    *,
    count: int,
    version: str | None,
    conditions: str | None,
    vector: str | None,
    as_json: bool,
) -> None:
    """Find the items that are nearest to TEXT."""
    if (text is None) == (vector is None):
        raise click.UsageError("expected either TEXT or --vector")
    wanted: dict[str, Any] = {"k": count, "version": version, "text": text}
    if vector is not None:
        wanted["vector"] = _option("--vector", vector)
    if conditions is not None:
        wanted["filter"] = _option("--filter", conditions)
    daemon = daemon_at(url, config)
    answer = daemon.ask("POST", path_of(name, "query"), wanted, is_long=True)
    if as_json:
        print_json(answer)
        return
    if answer["version"] is None:
        click.echo(f"{printable(name)} has no items yet", err=True)
        return
    is_active = "the active one" if answer["active"] else "not the active one"
    which = is_active if answer["state"] == "active" else f"{answer['state']}, {is_active}"
    click.echo(f"version {answer['version']} ({which}), coverage {share(answer['coverage'])}", err=True)
    texts = _texts(daemon, name, answer["items"])
    rows = [
        (f"{hit['score']:.4f}", hit["id"], _metadata(hit["metadata"]), *([text] if texts else []))
        for hit, text in zip(answer["items"], texts or [None] * count, strict=False)
    ]
    print_rows(("SCORE", "ID", "METADATA", *(["TEXT"] if texts else [])), rows)


class _LineError(Exception):
    """A line is no item."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)
        self.number = number
        self.message = message


def _items(file: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield the number of each line that is not empty, its item, and its bytes.

    Raises:
        _LineError: it is no JSON object.
    """
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            item = _read(line)
        except (ValueError, RecursionError) as error:
            raise _LineError(number, f"it is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise _LineError(number, "expected an object with id, text or vector, and metadata")
        yield number, item, len(line)


def _read(text: bytes | str) -> Any:
    """Return a value that can be sent as JSON.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text[:32]} is no finite number")
    return number


def _id(item: Mapping[str, Any]) -> str:
    return json.dumps(item.get("id"))


def _say_where(error: RefusalError, batch: _Batch, file: str, writer: _Writer) -> NoReturn:
    """Raise the error with the lines of the file in the place of the numbers of the items."""

    def line(match: re.Match[str]) -> str:
        number = int(match[1])
        if number >= len(batch.lines):
            return match[0]
        return f"{file}, line {batch.lines[number]}" + (": " if match[2] else "")

    message = _PLACE.sub(line, error.message)
    fields = error.details.get("fields")
    lines = [
        _PLACE.sub(line, f"{one.get('field')}: {one.get('message')}")
        for one in (fields if isinstance(fields, list) else ())[1:]
        if isinstance(one, dict)
    ]
    raise CommandError(
        f"{message}; {writer.so_far}", exit_code=error.exit_code, next_step=error.next_step, lines=lines
    ) from error


def _progress(text: str, *, keep: bool = False) -> None:
    """Show how far it is on a terminal; a line to `keep` is shown elsewhere too."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{printable(text)}", err=True, nl=keep)
    elif keep:
        click.echo(printable(text), err=True)


def _item_path(name: str, item_id: str, *, vector: bool = False) -> str:
    return path_of(name, "items", item_id) + ("?vector=true" if vector else "")


def _all_items(daemon: Daemon, name: str) -> Iterator[dict[str, Any]]:
    path = path_of(name, "items")
    after = ""
    while True:
        page = daemon.ask("GET", path + after, is_long=True)
        yield from page["items"]
        if page["next"] is None:
            return
        after = f"?after={quote(page['next'], safe='')}"


def _texts(daemon: Daemon, name: str, hits: list[dict[str, Any]]) -> list[str | None]:
    """Return the texts of some hits; none where they are many, or none is kept."""
    from manager.cli.client import RefusalError  # noqa: PLC0415

    if len(hits) > _MOST_TEXTS:
        return []
    texts: list[str | None] = []
    for hit in hits:
        try:
            text = daemon.ask("GET", _item_path(name, hit["id"]))["text"]
        except RefusalError:  # it was removed just now
            text = None
        texts.append(None if text is None else _shortened(text))
    return texts if any(texts) else []


def _shortened(text: str) -> str:
    line = one_line(text[: 4 * _TEXT_CHARACTERS])
    return line if len(line) <= _TEXT_CHARACTERS else f"{line[:_TEXT_CHARACTERS]}…"


def _metadata(metadata: Mapping[str, Any]) -> str | None:
    return _shortened(json.dumps(metadata, ensure_ascii=False)) if metadata else None


def _option(name: str, text: str) -> Any:
    try:
        return _read(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"it is not JSON: {error}", param_hint=name) from None
