"""Cards of other machines, read from the Prometheus exporters that run beside them.

A card is believed only where an exporter names its UUID; everything else of it stays unknown. An exporter is
another machine's program: its answer is bounded in time and size, its redirects are not followed, and only
the lines of the metrics in `domain.gpu_metrics` are parsed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families

from manager.adapters.http_client import AnswerTooLongError, HttpClient, plainly
from manager.domain.gpu import Gpu
from manager.domain.gpu_metrics import (
    METRICS,
    NAME,
    NODE,
    Exported,
    Sample,
    card_key,
    named,
    read_exporter,
    why_no_exporter_url,
)
from manager.errors import GpuQueryError, ManagerError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from manager.domain.gpu_metrics import AdvertisedCard

    Advertised = Callable[[], Awaitable[Sequence[AdvertisedCard]]]
    Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_TIMEOUT_S: Final = 2.0
_MOST_BYTES: Final = 4 * 2**20
_MOST_AT_ONCE: Final = 64
_MOST_EXPORTERS: Final = 1024
# nvidia_gpu_exporter runs nvidia-smi for each answer, and whoever waits for memory looks four times a second.
_REUSED_S: Final = 1.0
# The addresses of a name change when a node comes or goes.
_RESOLVED_S: Final = 5.0
# After a failure the wait doubles up to the limit.
_FIRST_WAIT_S: Final = 3.0
_LONGEST_WAIT_S: Final = 60.0

# The parser of prometheus_client looks at each character, in Python, and copies the rest of a line for each
# label: lines, their length and the time are bounded. A node with 16 cards has about 150 lines of interest.
_MOST_LINES: Final = 2048
_MOST_LINE_BYTES: Final = 2048
_LONGEST_PARSE_S: Final = 0.5
_INLINE_BYTES: Final = 16 * 1024
_LINE = re.compile(
    rb"^(?:%b)[ \t{].*$" % b"|".join(re.escape(name.encode()) for name in METRICS), re.MULTILINE
)

_NO_EXPORTER = "no exporter is set in swarm.gpu_exporter"


class _ScrapeError(Exception):
    """A scrape has failed; the message says why."""


class NodeCards:
    """The cards that the nodes of a cluster advertise, as a `GpuReader`.

    Attributes:
        troubles: by the name of a host, why its cards, or some of them, are unknown since the last read.

    Args:
        advertised: returns the cards of all nodes; its deadline is its own.
        exporter: the URL of the exporters; None where there are none, and all memory is unknown. With
            `{node}` as its host it is asked at the address of each node, and tells of the cards of that
            node only. Otherwise its host is asked at each of its addresses, and each exporter tells of all
            cards that it names.
        tls: returns the TLS context for `https://`.
        clock: monotonic seconds.
        resolve: returns the addresses of a host name.

    Raises:
        ValueError: the URL cannot be used.
    """

    def __init__(
        self,
        advertised: Advertised,
        exporter: str | None,
        *,
        tls: Callable[[], Awaitable[ssl.SSLContext]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        resolve: Resolve | None = None,
    ) -> None:
        if exporter is not None and (why := why_no_exporter_url(exporter)) is not None:
            raise ValueError(why)
        if exporter is not None and exporter.startswith("https:") and tls is None:
            raise ValueError("https:// needs a TLS context")
        self._advertised = advertised
        self._template = exporter
        self._tls = tls or _no_tls
        self._clock = clock
        self._names = _Names(resolve or _addresses_of, clock)
        self._slots = asyncio.Semaphore(_MOST_AT_ONCE)
        self._exporters: dict[str, _Exporter] = {}
        self._known: dict[str, Gpu] = {}  # by UUID: the name and the place of each card that was ever read
        self._reading = asyncio.Lock()
        self.troubles: Mapping[str, str] = MappingProxyType({})

    async def read(self) -> tuple[Gpu, ...]:
        """One reading of each advertised card, by host; `index` is its number there in order of the UUIDs.

        A card of which no exporter tells anything has everything None, and `why_unknown` says why. The name
        and the place on the bus are kept from earlier readings. Processes are never known. An answer that is
        younger than `_REUSED_S` is used again; an exporter that has failed is not asked again before
        `_FIRST_WAIT_S`, and later up to `_LONGEST_WAIT_S`.

        Raises:
            GpuQueryError: the nodes could not say which cards they have.
        """
        async with self._reading:
            try:
                advertised = await self._advertised()
            except GpuQueryError:
                raise
            except ManagerError as error:
                raise GpuQueryError(
                    f"the cards of the nodes cannot be listed: {error.message}", details={"nodes": error.code}
                ) from error
            cards = _in_order(advertised)
            told, troubles = await self._told([card for _, card in cards])
            gpus = []
            for index, card in cards:
                gpu = self._gpu(index, card, told.get(card.uuid), troubles.get(card.hostname))
                gpus.append(gpu)
                if gpu.why_unknown is not None:
                    troubles.setdefault(card.hostname, f"{card.uuid}: {gpu.why_unknown}")
            self._known = {gpu.uuid: gpu for gpu in gpus}
            self.troubles = MappingProxyType(troubles)
            return tuple(gpus)

    async def close(self) -> None:
        """Close the kept connections."""
        for exporter in self._exporters.values():
            exporter.client.close()
        self._exporters.clear()
        self._names.close()

    # --- helpers ---

    def _gpu(self, index: int, card: AdvertisedCard, told: Gpu | None, trouble: str | None) -> Gpu:
        known = self._known.get(card.uuid)
        if told is None:
            return Gpu(
                uuid=card.uuid,
                index=index,
                pci_bus_id=known.pci_bus_id if known else "",
                name=known.name if known else NAME,
                vram_total_bytes=None,
                vram_used_bytes=None,
                vram_free_bytes=None,
                lists_processes=False,
                host=card.hostname,
                lost=card.lost,
                why_unknown=trouble or "no exporter names this card",
            )
        is_known = told.vram_free_bytes is not None
        return replace(
            told,
            uuid=card.uuid,
            index=index,
            pci_bus_id=told.pci_bus_id or (known.pci_bus_id if known else ""),
            name=told.name if told.name != NAME or known is None else known.name,
            host=card.hostname,
            lost=card.lost,
            why_unknown=None if is_known else "its exporter does not tell how much memory is free",
        )

    async def _told(self, cards: Sequence[AdvertisedCard]) -> tuple[dict[str, Gpu], dict[str, str]]:
        """Return what exporters tell of the cards, by UUID as advertised, and the troubles by host."""
        if self._template is None:
            return {}, {card.hostname: _NO_EXPORTER for card in cards}
        if not cards:
            return {}, {}
        if NODE in self._template:
            return await self._told_by_nodes(self._template, cards)
        return await self._told_by_all(self._template, cards)

    async def _told_by_nodes(
        self, template: str, cards: Sequence[AdvertisedCard]
    ) -> tuple[dict[str, Gpu], dict[str, str]]:
        urls = {card.address: _at_node(template, card.address) for card in cards}
        answers = await self._answers([url for url in urls.values() if url is not None])
        told: dict[str, Gpu] = {}
        troubles: dict[str, str] = {}
        for card in cards:
            url = urls[card.address]
            answer = answers.get(url or "")
            if url is None:
                troubles[card.hostname] = f"its address {card.address!r} is no IP address"
            elif answer is None:
                troubles[card.hostname] = "too many nodes have cards"
            elif isinstance(answer, str):
                troubles[card.hostname] = f"no exporter answers at {url} ({answer})"
            elif (gpu := named(answer.cards, card.uuid)) is not None:
                told[card.uuid] = gpu
        return told, troubles

    async def _told_by_all(
        self, url: str, cards: Sequence[AdvertisedCard]
    ) -> tuple[dict[str, Gpu], dict[str, str]]:
        parts = urlsplit(url)
        try:
            addresses = await self._names.addresses(
                parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            )
        except _ScrapeError as error:
            return {}, {card.hostname: f"{parts.hostname} has no address ({error})" for card in cards}
        answers = await self._answers([_with_host(url, address) for address in addresses])
        found: dict[str, list[Gpu]] = {}
        for answer in answers.values():
            for key, gpu in answer.cards.items() if isinstance(answer, Exported) else ():
                found.setdefault(key, []).append(gpu)
        # A card that two exporters name is of neither: which of them is beside it cannot be told.
        named_by = {card.uuid: named(found, card.uuid) or [] for card in cards}
        told = {uuid: gpus[0] for uuid, gpus in named_by.items() if len(gpus) == 1}
        failed = [f"{url} ({answer})" for url, answer in answers.items() if isinstance(answer, str)]
        troubles: dict[str, str] = {}
        for card in cards:
            if len(named_by[card.uuid]) > 1:
                troubles[card.hostname] = f"several exporters name {card.uuid}"
            elif card.uuid not in told and failed:
                more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
                troubles[card.hostname] = f"no exporter answers for it: {failed[0]}{more}"
        return told, troubles

    async def _answers(self, urls: Sequence[str]) -> dict[str, Exported | str]:
        """Ask all exporters at once. Return what each tells, or why it tells nothing, by URL."""
        wanted = list(dict.fromkeys(urls))[:_MOST_EXPORTERS]
        for url in self._exporters.keys() - wanted:
            self._exporters.pop(url).client.close()
        for url in wanted:
            if url not in self._exporters:
                client = HttpClient(_origin(url), most_bytes=_MOST_BYTES, tls=self._tls, most_kept=1)
                self._exporters[url] = _Exporter(urlsplit(url).path or "/", client)
        now = self._clock()
        due = [one for one in map(self._exporters.__getitem__, wanted) if now >= one.next_at]
        await asyncio.gather(*[self._ask(one) for one in due])
        return {url: self._exporters[url].told for url in wanted}

    async def _ask(self, exporter: _Exporter) -> None:
        async with self._slots:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    exporter.told = await _scraped(exporter)
            except Exception as error:  # noqa: BLE001 - whatever an exporter sends must not end the daemon
                exporter.told = _words(error)
                exporter.next_at = self._clock() + exporter.wait_s
                exporter.wait_s = min(exporter.wait_s * 2, _LONGEST_WAIT_S)
            else:
                exporter.next_at = self._clock() + _REUSED_S
                exporter.wait_s = _FIRST_WAIT_S


@dataclass(slots=True)
class _Exporter:
    """One exporter. `told` is its last answer, or why there is none; `wait_s` follows the next failure."""

    path: str
    client: HttpClient
    told: Exported | str = field(default_factory=lambda: "not asked yet")
    next_at: float = float("-inf")
    wait_s: float = _FIRST_WAIT_S


class _Names:
    """The addresses of one host name. At most one look-up goes on: the system's cannot be interrupted."""

    def __init__(self, resolve: Resolve, clock: Callable[[], float]) -> None:
        self._resolve = resolve
        self._clock = clock
        self._looking: asyncio.Future[Sequence[str]] | None = None
        self._found: tuple[str, ...] | str = "not looked up yet"
        self._next_at = float("-inf")

    async def addresses(self, host: str, port: int) -> tuple[str, ...]:
        """Return the addresses, which may be `_RESOLVED_S` old.

        Raises:
            _ScrapeError: there is none, or no answer within `_TIMEOUT_S`.
        """
        if self._clock() >= self._next_at:
            self._found = await self._look_up(host, port)
            self._next_at = self._clock() + (_RESOLVED_S if isinstance(self._found, tuple) else _FIRST_WAIT_S)
        if isinstance(self._found, str):
            raise _ScrapeError(self._found)
        return self._found

    async def _look_up(self, host: str, port: int) -> tuple[str, ...] | str:
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._resolve(host, port))
        done, _ = await asyncio.wait({self._looking}, timeout=_TIMEOUT_S)
        if not done:
            return f"no answer within {_TIMEOUT_S:g} s"
        looking, self._looking = self._looking, None
        try:
            found = sorted(set(looking.result()))
        except (OSError, UnicodeError) as error:
            return plainly(error)
        return tuple(found[:_MOST_EXPORTERS]) or "none was found"

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None


async def _addresses_of(host: str, port: int) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    return [str(found[4][0]) for found in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


async def _no_tls() -> ssl.SSLContext:
    raise AssertionError("https:// is refused without a TLS context")


def _in_order(advertised: Sequence[AdvertisedCard]) -> list[tuple[int, AdvertisedCard]]:
    """Return the cards by host, each once, with its number on its node.

    A card that two nodes advertise is that of the first where it is not lost: a host that has left its swarm
    and joined again is listed as the node that it was, too.
    """
    cards: dict[str, AdvertisedCard] = {}
    by_host = sorted(advertised, key=lambda one: (one.hostname, one.node_id, one.uuid))
    for card in sorted(by_host, key=lambda one: one.lost is not None):
        cards.setdefault(card_key(card.uuid), card)
    numbers: dict[str, int] = {}
    ordered = []
    for card in (one for one in by_host if cards[card_key(one.uuid)] is one):
        number = numbers.setdefault(card.node_id, 0)
        numbers[card.node_id] += 1
        ordered.append((number, card))
    return ordered


def _at_node(template: str, address: str) -> str | None:
    """Return the URL of the exporter of a node; None where its address is no IP address."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return None
    return template.replace(NODE, _in_url(address), 1)


def _with_host(url: str, address: str) -> str:
    parts = urlsplit(url)
    port = "" if parts.port is None else f":{parts.port}"
    return urlunsplit(parts._replace(netloc=f"{_in_url(address)}{port}"))


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


async def _scraped(exporter: _Exporter) -> Exported:
    """Return what an exporter tells.

    Raises:
        _ScrapeError: it answers otherwise than an exporter, or names no card.
        OSError, ValueError: there is no answer, or it is no proper HTTP.
    """
    answer = await exporter.client.ask("GET", exporter.path, headers=[(b"Accept", b"text/plain")])
    if 300 <= answer.status < 400:  # noqa: PLR2004
        raise _ScrapeError(f"a redirect, status {answer.status}, which is not followed")
    if answer.status != 200:  # noqa: PLR2004
        raise _ScrapeError(f"status {answer.status}")
    if len(answer.body) <= _INLINE_BYTES:
        told = read_exporter(samples_in(answer.body))
    else:
        told = await asyncio.to_thread(lambda: read_exporter(samples_in(answer.body)))
    if not told.collects:
        raise _ScrapeError("it could not read its cards: nvidia_smi_last_collect_success is 0")
    if not told.cards:
        raise _ScrapeError("its answer names no card")
    return told


def samples_in(body: bytes) -> Iterator[Sample]:
    """Yield the samples of `domain.gpu_metrics` in an answer of an exporter. Lines of no sense are skipped.

    Raises:
        _ScrapeError: there are too many of them, or they take too long to parse.
    """
    until = time.monotonic() + _LONGEST_PARSE_S
    for number, match in enumerate(_LINE.finditer(body)):
        if number >= _MOST_LINES:
            raise _ScrapeError(f"more than {_MOST_LINES} lines of metrics of cards")
        if time.monotonic() > until:
            raise _ScrapeError(f"its answer takes more than {_LONGEST_PARSE_S:g} s to parse")
        line = match[0]
        if len(line) > _MOST_LINE_BYTES:
            continue
        try:
            for family in text_string_to_metric_families(line.decode("utf-8", "replace")):
                for sample in family.samples:
                    yield Sample(sample.name, sample.labels, sample.value)
        except (ValueError, IndexError, ArithmeticError):
            continue


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT_S:g} s"
    if isinstance(error, AnswerTooLongError):
        return f"its answer has more than {_MOST_BYTES // 2**20} MiB"
    return plainly(error)
