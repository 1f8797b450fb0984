"""Cards of nodes, read from real HTTP servers that answer as exporters do, and in every other way."""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from manager.adapters import gpu_exporters
from manager.adapters.gpu_exporters import NodeCards, samples_in
from manager.domain.gpu import Gpu
from manager.domain.gpu_metrics import METRICS, AdvertisedCard, read_exporter
from manager.errors import EngineUnreachableError, GpuQueryError, UnavailableError
from tests.support.exporters import DCGM, FIRST, MIB, SECOND, SLICED, SMI, SMI_SLICED, dcgm
from tests.support.gpu_machine import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

ONE, OTHER = "127.0.0.1", "127.0.0.2"
DEADLINE_S = gpu_exporters._TIMEOUT_S
A, B = (AdvertisedCard(uuid, "n1", "one", ONE) for uuid in (FIRST, SECOND))
ELSEWHERE = AdvertisedCard("GPU-else", "n2", "other", OTHER)


class Node:
    """An exporter at one address. `answer` is a text, or what makes a response of a request."""

    def __init__(self) -> None:
        self.answer: str | Callable[[web.Request], Awaitable[web.StreamResponse]] = ""
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        self.was_asked.set()
        if isinstance(self.answer, str):
            return web.Response(text=self.answer)
        return await self.answer(request)


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


class Nodes:
    """Exporters at several addresses with one port, and the cards that their nodes advertise."""

    def __init__(self, port: int, nodes: dict[str, Node]) -> None:
        self.port = port
        self.nodes = nodes
        self.cards: Sequence[AdvertisedCard] = (A,)
        self.clock = Clock()
        self.error: Exception | None = None
        self.addresses: Sequence[str] = (ONE,)
        self.resolved = 0
        self.template = f"http://{{node}}:{port}/metrics"

    def __getitem__(self, address: str) -> Node:
        return self.nodes[address]

    async def advertised(self) -> Sequence[AdvertisedCard]:
        if self.error is not None:
            raise self.error
        return self.cards

    async def resolve(self, _host: str, _port: int) -> Sequence[str]:
        self.resolved += 1
        return self.addresses

    @asynccontextmanager
    async def reading(self, exporter: str | None = "") -> AsyncIterator[NodeCards]:
        url = self.template if exporter == "" else exporter
        reader = NodeCards(self.advertised, url, clock=self.clock, resolve=self.resolve)
        try:
            yield reader
        finally:
            await reader.close()

    @property
    def named(self) -> str:
        return f"http://tasks.exporter:{self.port}/metrics"


@asynccontextmanager
async def exporters(*addresses: str) -> AsyncIterator[Nodes]:
    runners, nodes, port = [], {}, 0
    try:
        for address in addresses:
            nodes[address] = Node()
            app = web.Application()
            app.router.add_get("/{path:.*}", nodes[address].handle)
            runner = web.AppRunner(app, shutdown_timeout=0.05)
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, address, port).start()
            port = runner.addresses[0][1]
        yield Nodes(port, nodes)
    finally:
        for runner in runners:
            await runner.cleanup()


def unknown(card: AdvertisedCard, index: int = 0, *, why: str | None) -> Gpu:
    return Gpu(
        card.uuid,
        index,
        "",
        "NVIDIA GPU",
        None,
        None,
        None,
        lists_processes=False,
        host=card.hostname,
        why_unknown=why,
    )


async def test_each_node_tells_of_its_own_cards() -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = DCGM
        nodes[OTHER].answer = SMI.replace(FIRST.removeprefix("GPU-"), "else")
        nodes.cards = (ELSEWHERE, B, A)

        first, second, other = await reader.read()

    assert (first.uuid, first.index, first.host, first.pci_bus_id) == (FIRST, 0, "one", "00000000:3b:00.0")
    assert (second.uuid, second.index, second.host) == (SECOND, 1, "one")
    assert (other.uuid, other.index, other.host) == ("GPU-else", 0, "other")
    assert first.vram_free_bytes == 110796 * MIB
    assert first.power_watts == 627.4
    assert other.vram_total_bytes == 17171480576
    assert not first.lists_processes
    assert {gpu.why_unknown for gpu in (first, second, other)} == {None}
    assert reader.troubles == {}
    assert nodes[ONE].asked == nodes[OTHER].asked == ["/metrics"]


async def test_a_node_tells_nothing_of_the_cards_of_another() -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = DCGM
        nodes[OTHER].answer = DCGM.replace(SECOND, "GPU-else")
        nodes.cards = (A, ELSEWHERE, AdvertisedCard(SECOND, "n2", "other", OTHER))

        gpus = {gpu.uuid: gpu for gpu in await reader.read()}

    assert gpus[SECOND].vram_free_bytes is None
    assert gpus[SECOND].why_unknown == "no exporter names this card"
    assert gpus["GPU-else"].vram_free_bytes == 143155 * MIB
    assert reader.troubles == {"other": f"{SECOND}: no exporter names this card"}


async def test_uuids_are_those_of_the_node_and_slices_are_found() -> None:
    spelt = AdvertisedCard(FIRST.upper(), "n1", "one", ONE)
    sliced = AdvertisedCard(SLICED, "n1", "one", ONE)
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = SMI_SLICED
        nodes.cards = (sliced, spelt)

        card, part = await reader.read()

    assert (card.uuid, card.temperature_c) == (FIRST.upper(), 36)
    assert part.uuid == SLICED
    assert part.vram_free_bytes == 32971181613


@pytest.mark.parametrize("is_by_name", [False, True])
async def test_a_card_that_is_advertised_by_the_beginning_of_its_uuid(is_by_name: bool) -> None:
    async with exporters(ONE) as nodes, nodes.reading(nodes.named if is_by_name else "") as reader:
        nodes[ONE].answer = DCGM
        nodes.cards = (AdvertisedCard(FIRST[:12], "n1", "one", ONE),)
        (gpu,) = await reader.read()
    assert gpu.uuid == FIRST[:12]
    assert gpu.vram_free_bytes == 110796 * MIB


async def test_a_card_whose_memory_is_not_told() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = dcgm(GPU_TEMP=50, FB_FREE="NaN", FB_USED=1)
        (gpu,) = await reader.read()

    assert (gpu.temperature_c, gpu.vram_free_bytes) == (50, None)
    assert gpu.why_unknown == "its exporter does not tell how much memory is free"


async def test_without_an_exporter_all_memory_is_unknown() -> None:
    async with exporters(ONE) as nodes, nodes.reading(None) as reader:
        nodes.cards = (B, A)
        gpus = await reader.read()

    assert gpus == (
        unknown(A, why="no exporter is set in swarm.gpu_exporter"),
        unknown(B, 1, why="no exporter is set in swarm.gpu_exporter"),
    )
    assert reader.troubles == {"one": "no exporter is set in swarm.gpu_exporter"}
    assert nodes[ONE].asked == []


async def test_nothing_is_asked_without_cards() -> None:
    async with exporters(ONE) as nodes, nodes.reading(nodes.named) as reader:
        nodes.cards = ()
        assert await reader.read() == ()
    assert nodes.resolved == 0


async def test_a_node_that_is_down_hides_no_other_and_takes_no_longer_than_the_deadline() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = DCGM
        nodes.cards = (A, ELSEWHERE)

        card, other = await reader.read()

        url = f"http://{OTHER}:{nodes.port}/metrics"
        why = f"no exporter answers at {url} (Connection refused)"
        assert card.vram_free_bytes is not None
        assert other == unknown(ELSEWHERE, why=why)
        assert reader.troubles == {"other": why}


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError


async def test_a_node_that_hangs_takes_no_longer_than_the_deadline() -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = DCGM
        nodes[OTHER].answer = hang
        nodes.cards = (A, ELSEWHERE)

        begun = time.monotonic()
        card, other = await reader.read()
        took = time.monotonic() - begun

        assert card.vram_free_bytes is not None
        assert other.vram_free_bytes is None
        assert "no answer within 2 s" in reader.troubles["other"]
        assert DEADLINE_S <= took < DEADLINE_S + 1


async def trickle(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(600):
        await response.write(b"# a comment\n")
        await asyncio.sleep(0.1)
    return response


async def flood(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    piece = DCGM.encode() * 20
    while True:
        await response.write(piece)


async def redirect(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound(f"http://{OTHER}:{request.url.port}/metrics")


async def broken(request: web.Request) -> web.StreamResponse:
    return web.Response(status=503, text=DCGM)


async def slow_to_parse(request: web.Request) -> web.StreamResponse:
    return web.Response(text=('DCGM_FI_DEV_FB_USED{UUID="' + '\\"' * 1000 + '"} 1\n') * 2000)


async def many(request: web.Request) -> web.StreamResponse:
    return web.Response(text="nvidia_smi_gpu_info 1\n" * 2049)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (trickle, "no answer within 2 s"),
        (flood, "its answer has more than 4 MiB"),
        (redirect, "a redirect, status 302, which is not followed"),
        (broken, "status 503"),
        (slow_to_parse, "its answer takes more than 0.5 s to parse"),
        (many, "more than 2048 lines of metrics of cards"),
        ("", "its answer names no card"),
        ("<html>hello</html>", "its answer names no card"),
        ("\x00\xff{}{}" * 50_000, "its answer names no card"),
        ("nvidia_smi_last_collect_success 0\n", "nvidia_smi_last_collect_success is 0"),
    ],
)
async def test_answers_that_are_not_those_of_an_exporter(
    answer: str | Callable[[web.Request], Awaitable[web.StreamResponse]], why: str
) -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading() as reader:
        nodes[OTHER].answer = DCGM
        nodes[ONE].answer = answer
        begun = time.monotonic()
        (gpu,) = await reader.read()
        took = time.monotonic() - begun

    assert gpu == unknown(A, why=gpu.why_unknown)
    assert gpu.why_unknown is not None
    assert why in gpu.why_unknown
    assert reader.troubles == {"one": gpu.why_unknown}
    assert took < DEADLINE_S + 1
    assert nodes[OTHER].asked == []


async def test_what_is_no_http() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, ONE, 0)
    port = server.sockets[0].getsockname()[1]

    async def advertised() -> Sequence[AdvertisedCard]:
        return (A,)

    async with server:
        reader = NodeCards(advertised, f"http://{{node}}:{port}/metrics")
        (gpu,) = await reader.read()
        await reader.close()
    assert gpu == unknown(A, why=gpu.why_unknown)


async def test_an_exporter_that_fails_is_asked_again_later_and_each_time_later() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = broken
        waits: list[float] = []
        asked_at = nodes.clock.at
        await reader.read()
        while len(waits) < 6:
            nodes.clock.at += 1
            await reader.read()
            if len(nodes[ONE].asked) > len(waits) + 1:
                waits.append(nodes.clock.at - asked_at)
                asked_at = nodes.clock.at
        assert waits == [3, 6, 12, 24, 48, 60]

        nodes[ONE].answer = DCGM
        nodes.clock.at += 60
        (gpu,) = await reader.read()
        assert gpu.vram_free_bytes is not None
        assert reader.troubles == {}

        nodes[ONE].answer = broken
        for _ in range(3):
            nodes.clock.at += 3
            await reader.read()
        assert len(nodes[ONE].asked) == 10  # two failures, with 3 s between them


async def test_a_card_keeps_its_name_and_place_while_its_exporter_is_silent() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = DCGM
        await reader.read()
        nodes.clock.at += 5
        nodes[ONE].answer = dcgm(FB_FREE=1).replace("NVIDIA H200", "").replace("00000000:3B:00.0", "")
        (nameless,) = await reader.read()
        nodes.clock.at += 5
        nodes[ONE].answer = broken
        (silent,) = await reader.read()

    assert (nameless.name, nameless.pci_bus_id) == ("NVIDIA H200", "00000000:3b:00.0")
    assert (silent.name, silent.pci_bus_id) == ("NVIDIA H200", "00000000:3b:00.0")
    assert (silent.vram_total_bytes, silent.vram_used_bytes, silent.vram_free_bytes) == (None, None, None)
    assert silent.sensors == (None, None, None, None)


async def test_an_answer_is_used_again_for_a_second_and_the_connection_too() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        peers = []

        async def free(request: web.Request) -> web.StreamResponse:
            peers.append(request.transport)
            return web.Response(text=dcgm(FB_FREE=len(peers)))

        nodes[ONE].answer = free
        found = []
        for _ in range(3):
            (gpu,) = await reader.read()
            found.append(gpu.vram_free_bytes)
            nodes.clock.at += 0.6
        assert found == [MIB, MIB, 2 * MIB]
        assert peers[0] is peers[1]


async def test_exporters_of_nodes_that_have_gone_are_forgotten() -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading() as reader:
        nodes.cards = (A, ELSEWHERE)
        await reader.read()
        assert set(reader.troubles) == {"one", "other"}
        nodes.cards = (ELSEWHERE,)
        await reader.read()
        assert set(reader.troubles) == {"other"}
        assert [OTHER in url for url in reader._exporters] == [True]


async def test_a_node_whose_address_is_no_address_is_not_asked() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes.cards = (AdvertisedCard(FIRST, "n1", "one", "evil.example/@"),)
        (gpu,) = await reader.read()
    assert gpu.why_unknown == "its address 'evil.example/@' is no IP address"


async def test_ipv6_addresses_of_nodes() -> None:
    async with exporters("::1") as nodes, nodes.reading() as reader:
        nodes["::1"].answer = DCGM
        nodes.cards = (AdvertisedCard(FIRST, "n1", "one", "::1"),)
        (gpu,) = await reader.read()
    assert gpu.vram_free_bytes is not None


async def test_two_nodes_at_one_address_share_one_scrape() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = DCGM
        nodes.cards = (A, AdvertisedCard(SECOND, "n2", "two", ONE))
        gpus = await reader.read()
    assert len(nodes[ONE].asked) == 1
    assert None not in [gpu.vram_free_bytes for gpu in gpus]


async def test_a_card_that_two_nodes_advertise_is_listed_once() -> None:
    async with exporters(ONE) as nodes, nodes.reading(None) as reader:
        nodes.cards = (AdvertisedCard(FIRST.lower(), "n2", "two", OTHER), A)
        (gpu,) = await reader.read()
    assert gpu.host == "one"


async def test_a_card_of_a_node_that_is_down_is_that_of_the_other_node_that_advertises_it() -> None:
    async with exporters(ONE) as nodes, nodes.reading(None) as reader:
        nodes.cards = (
            AdvertisedCard(FIRST, "n1", "one", ONE, lost="down"),
            AdvertisedCard(FIRST, "n2", "one", OTHER),
        )
        (gpu,) = await reader.read()
    assert (gpu.host, gpu.lost) == ("one", None)


async def test_no_more_than_a_few_are_asked_at_once() -> None:
    addresses = [f"127.0.1.{n}" for n in range(1, 101)]
    open_now = most = 0
    async with exporters(*addresses) as nodes, nodes.reading() as reader:

        async def count(request: web.Request) -> web.StreamResponse:
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            await asyncio.sleep(0.2)
            open_now -= 1
            return web.Response(text=DCGM)

        for address in addresses:
            nodes[address].answer = count
        nodes.cards = [AdvertisedCard(f"GPU-{a}", a, a, a) for a in addresses]
        gpus = await reader.read()

    assert len(gpus) == 100
    assert 32 < most <= 64


# --- a name with several addresses ---


async def test_every_address_of_a_name_is_asked() -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading(nodes.named) as reader:
        nodes.addresses = (OTHER, ONE, ONE)
        nodes[ONE].answer = dcgm(FB_FREE=1)
        nodes[OTHER].answer = dcgm(FB_FREE=2).replace(FIRST, "GPU-else")
        nodes.cards = (A, ELSEWHERE, B)

        gpus = {gpu.uuid: gpu for gpu in await reader.read()}

    assert gpus[FIRST].vram_free_bytes == MIB
    assert gpus["GPU-else"].vram_free_bytes == 2 * MIB
    assert gpus[SECOND].why_unknown == "no exporter names this card"
    assert len(nodes[ONE].asked) == len(nodes[OTHER].asked) == 1


async def test_a_card_that_two_exporters_name_is_unknown() -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading(nodes.named) as reader:
        nodes.addresses = (ONE, OTHER)
        nodes[ONE].answer = nodes[OTHER].answer = dcgm(FB_FREE=1)
        (gpu,) = await reader.read()
    assert gpu == unknown(A, why=f"several exporters name {FIRST}")


async def test_an_address_that_fails_is_the_reason_for_the_cards_that_nobody_names() -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading(nodes.named) as reader:
        nodes.addresses = (ONE, OTHER, "127.0.0.3")
        nodes[ONE].answer = dcgm(FB_FREE=1)
        nodes[OTHER].answer = broken
        nodes.cards = (A, ELSEWHERE)
        card, other = await reader.read()
    assert card.vram_free_bytes == MIB
    assert other.why_unknown == (
        f"no exporter answers for it: http://{OTHER}:{nodes.port}/metrics (status 503) and 1 more"
    )
    assert reader.troubles == {"other": other.why_unknown}


async def test_addresses_are_looked_up_again_after_a_while() -> None:
    async with exporters(ONE, OTHER) as nodes, nodes.reading(nodes.named) as reader:
        nodes[ONE].answer = dcgm(FB_FREE=1)
        nodes[OTHER].answer = dcgm(FB_FREE=2)
        await reader.read()
        nodes.addresses = (OTHER,)
        nodes.clock.at += 4
        (before,) = await reader.read()
        nodes.clock.at += 1
        (after,) = await reader.read()
    assert (before.vram_free_bytes, after.vram_free_bytes) == (MIB, 2 * MIB)
    assert nodes.resolved == 2


async def test_a_name_without_addresses() -> None:
    async with exporters(ONE) as nodes, nodes.reading(nodes.named) as reader:
        nodes.addresses = ()
        (gpu,) = await reader.read()
        assert gpu.why_unknown == "tasks.exporter has no address (none was found)"
        nodes.addresses = (ONE,)
        nodes[ONE].answer = DCGM
        nodes.clock.at += 2
        await reader.read()
        assert nodes.resolved == 1
        nodes.clock.at += 1
        (gpu,) = await reader.read()
    assert gpu.vram_free_bytes is not None


async def test_the_look_up_of_the_system() -> None:
    async with exporters(ONE) as nodes:
        nodes[ONE].answer = DCGM
        reader = NodeCards(nodes.advertised, f"http://localhost:{nodes.port}/metrics")
        (gpu,) = await reader.read()
        await reader.close()
        assert gpu.vram_free_bytes is not None

        reader = NodeCards(nodes.advertised, "http://no-such-name.invalid/metrics")
        (gpu,) = await reader.read()
        await reader.close()
    assert gpu.why_unknown is not None
    assert gpu.why_unknown.startswith("no-such-name.invalid has no address (")


async def test_a_look_up_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_exporters, "_TIMEOUT_S", 0.2)
    async with exporters(ONE) as nodes:
        started = 0

        async def resolve(_host: str, _port: int) -> Sequence[str]:
            nonlocal started
            started += 1
            await asyncio.sleep(60)
            return ()

        reader = NodeCards(nodes.advertised, nodes.named, clock=nodes.clock, resolve=resolve)
        begun = time.monotonic()
        (gpu,) = await reader.read()
        assert 0.2 <= time.monotonic() - begun < 1
        assert gpu.why_unknown == "tasks.exporter has no address (no answer within 0.2 s)"
        nodes.clock.at += 10
        await reader.read()
        assert started == 1
        await reader.close()


# --- errors ---


async def test_nodes_that_cannot_say_which_cards_they_have() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes.error = EngineUnreachableError("the engine is down")
        with pytest.raises(
            GpuQueryError, match="the cards of the nodes cannot be listed: the engine is down"
        ):
            await reader.read()
        nodes.error = GpuQueryError("as it is")
        with pytest.raises(GpuQueryError, match=r"^as it is$"):
            await reader.read()


async def test_urls_that_cannot_be_used() -> None:
    async def advertised() -> Sequence[AdvertisedCard]:
        return ()

    with pytest.raises(ValueError, match="expected http"):
        NodeCards(advertised, "ftp://{node}/metrics")
    with pytest.raises(ValueError, match="needs a TLS context"):
        NodeCards(advertised, "https://{node}/metrics")


async def test_https_asks_for_the_context() -> None:
    asked = 0

    async def tls() -> ssl.SSLContext:
        nonlocal asked
        asked += 1
        return ssl.create_default_context()

    async with exporters(ONE) as nodes:
        reader = NodeCards(nodes.advertised, f"https://{{node}}:{nodes.port}/metrics", tls=tls)
        (gpu,) = await reader.read()
        await reader.close()
    assert asked == 1
    assert gpu.vram_free_bytes is None


async def test_a_read_that_is_cancelled_leaves_the_next_one_alone() -> None:
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = hang
        reading = asyncio.ensure_future(reader.read())
        await nodes[ONE].was_asked.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        nodes[ONE].answer = DCGM
        (gpu,) = await reader.read()
    assert gpu.vram_free_bytes is not None


# --- with the services on top ---


async def test_a_start_is_refused_by_what_an_exporter_tells_and_let_in_while_it_is_silent() -> None:
    machine = Machine()
    async with exporters(ONE) as nodes, nodes.reading() as reader:
        nodes[ONE].answer = dcgm(FB_FREE=4096, FB_USED=20480, FB_RESERVED=0)
        machine.read = reader.read  # type: ignore[method-assign]
        gpus = await machine.gpus(one=FIRST)
        with pytest.raises(
            UnavailableError, match=r"needs 5\.0 GiB of GPU memory, 1\.0 GiB more than are free"
        ):
            await gpus.admit("one", needed_bytes=5 * 2**30, wait_s=0)
        await gpus.admit("one", needed_bytes=4 * 2**30, wait_s=0)
        assert gpus.trouble is None

        nodes[ONE].answer = broken
        nodes.clock.at += 2
        await gpus.admit("one", needed_bytes=5 * 2**30, wait_s=0)
        assert gpus.trouble is not None
        assert gpus.trouble.message == (
            f"the memory of {FIRST} on one is unknown: "
            f"no exporter answers at http://{ONE}:{nodes.port}/metrics (status 503)"
        )

        nodes.error = EngineUnreachableError("the engine is down")
        await gpus.refresh()
        assert gpus.why_missing("one") is None
        assert gpus.trouble.code == "gpu_query_failed"


# --- texts ---

LINES = st.one_of(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(sorted(METRICS)),
        st.sampled_from(["{", " {", "\t{", "{{", ""]) | st.text(alphabet='{}="\\, ua#é\r\x00', max_size=30),
        st.sampled_from(
            ['uuid="1"} 1', 'UUID="GPU-1",} NaN', '"} 1 ' + "9" * 4000, '" "="x"} 1', "} 1e999 # x"]
        )
        | st.text(alphabet='{}="\\, ua#1é\r\x00', max_size=60),
    ),
    st.text(max_size=60),
)


@given(st.lists(LINES, max_size=20).map("\n".join))
def test_no_text_breaks_the_reader(text: str) -> None:
    for sample in samples_in(text.encode("utf-8", "surrogatepass")):
        assert isinstance(sample.value, int | float)
    read_exporter(samples_in(text.encode("utf-8", "surrogatepass")))


@given(st.binary(max_size=400))
def test_no_bytes_break_the_reader(text: bytes) -> None:
    read_exporter(samples_in(b"DCGM_FI_DEV_FB_USED{" + text))


def test_a_line_that_cannot_be_read_hides_no_other() -> None:
    bad = [
        '{UUID="x} 1',
        '{UUID="x"} one',
        '{a="1", ="x"} 1',
        "{",
        '{UUID="x"} 1 ' + "9" * 400,
        f'{{UUID="{"x" * 2048}"}} 1',
    ]
    text = "".join(f"DCGM_FI_DEV_FB_USED{line}\n" for line in bad) + dcgm(FB_USED=5)
    (sample,) = samples_in(text.encode())
    assert (sample.name, sample.value) == ("DCGM_FI_DEV_FB_USED", 5)


def test_lines_end_as_other_systems_end_them() -> None:
    cards = read_exporter(samples_in(SMI.replace("\n", "\r\n").encode())).cards
    assert cards[FIRST].vram_used_bytes == 1545601024
