"""TLS towards servers with files of their own: authorities, mTLS, names, and files that change."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from manager.adapters.certificates import expiry
from manager.adapters.tls import SharedTls, client_tls, days_left, listener_tls, own_tls_of
from manager.adapters.upstream import HttpUpstream
from manager.errors import AskFailedError, ConfigurationError
from manager.relay.model_server import PooledModelServer
from manager.relay.upstream import UpstreamPools
from manager.services.ports import Question
from manager.settings import Settings
from manager.settings.tls import ClientTlsSettings
from tests.support.certificates import Authority, Pair
from tests.support.sockets import LOOPS, Collected, on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Contexts = dict[str, Callable[[], Awaitable[ssl.SSLContext]]]

both_loops = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])


@asynccontextmanager
async def server(served: Pair, clients: Authority | None = None) -> AsyncIterator[tuple[int, list[str]]]:
    """A server with TLS, which wants certificates of `clients`: its port, and the names that it has seen."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served.certificate, served.key)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients.certificate)
    names: list[str] = []

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shown: Any = writer.get_extra_info("peercert")
        names.append(shown["subject"][0][0][1] if shown else "")
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    listener = await asyncio.start_server(answers, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1], names
    finally:
        listener.close()


def contexts(url: str, **tls: Any) -> Contexts:
    instance = {"driver": "external", "url": url, "tls": tls}
    return own_tls_of(Settings.model_validate({"instances": {"far": instance}}))


async def asked(url: str, own: Contexts) -> list[str]:
    """Ask in each of the ways that the daemon has; returns those that worked."""
    worked = []
    shared = SharedTls().context
    pools = UpstreamPools(shared, own)
    async with HttpUpstream(shared, own) as upstream:
        if await upstream.answers(f"{url}/", 10):
            worked.append("probe")
    with suppress(OSError):
        connection = await pools.pool(url).connect()
        sink = Collected()
        connection.send(sink, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", ())
        await sink.ended.wait()
        if sink.body == b"{}":
            worked.append("relay")
    model_server = PooledModelServer(pools, connect_timeout_s=10, patience_s=10)
    with suppress(AskFailedError):
        async with model_server.ask(Question("far", url, "GET", "/api/tags")) as answer:
            assert await answer.piece() == b"{}"
            worked.append("model server")
    pools.close()
    return worked


ALL = ["probe", "relay", "model server"]


@both_loops
def test_a_server_that_wants_certificates_is_asked_with_one(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    servers, clients = Authority(tmp_path / "servers"), Authority(tmp_path / "clients")
    own, foreign = clients.sign("manager"), servers.sign("foreign")

    async def work() -> None:
        async with server(servers.sign("server"), clients) as (port, names):
            url = f"https://localhost:{port}"
            shown = {"certificate": str(own.certificate), "key": str(own.key)}
            ca = {"ca": str(servers.certificate)}
            assert await asked(url, contexts(url, **ca, **shown)) == ALL
            assert set(names) == {"manager"}
            names.clear()
            assert await asked(url, contexts(url, **ca)) == []
            other = {"certificate": str(foreign.certificate), "key": str(foreign.key)}
            assert await asked(url, contexts(url, **ca, **other)) == []
            assert await asked(url, contexts(url, **shown)) == []  # of an authority that the system trusts
            assert names == []

    on(loop, work())


@both_loops
def test_the_name_of_a_server_is_always_verified(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)

    async def work() -> None:
        async with server(authority.sign("server", names="DNS:elsewhere.example")) as (port, _):
            url = f"https://localhost:{port}"
            assert await asked(url, contexts(url, ca=str(authority.certificate))) == []
        async with server(authority.sign("right")) as (port, _):
            url = f"https://localhost:{port}"
            own = contexts(url, ca=str(authority.certificate))
            assert await asked(url, own) == ALL
            assert await asked(f"{url}/with/a/path", own) == ALL
            assert await asked(url, {}) == []  # the files are for that server alone
            by_address = f"https://127.0.0.1:{port}"
            assert await asked(by_address, own) == []

    on(loop, work())


async def test_new_files_are_used_and_broken_ones_are_not(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "all")
    first, second = authority.sign("first"), authority.sign("second")
    used = Pair(tmp_path / "used.pem", tmp_path / "used.key")
    shutil.copy(first.certificate, used.certificate)
    shutil.copy(first.key, used.key)
    wanted = ClientTlsSettings(ca=authority.certificate, certificate=used.certificate, key=used.key)
    now = 0.0
    tls = client_tls("instances.far.tls", wanted)
    tls._now, tls._checked_at = (lambda: now), 0.0
    async with server(authority.sign("server"), authority) as (port, names):
        url = f"https://localhost:{port}"
        own: Contexts = {url: tls.context}
        assert await asked(url, own) == ALL
        shutil.copy(second.certificate, used.certificate)  # its key has not come yet
        now = 3.0
        assert await asked(url, own) == ALL
        assert set(names) == {"first"}
        shutil.copy(second.key, used.key)
        now, before = 4.0, len(names)
        assert await asked(url, own) == ALL  # not looked at again so soon
        assert set(names[before:]) == {"first"}
        now, before = 6.0, len(names)
        assert await asked(url, own) == ALL
        assert set(names[before:]) == {"second"}
        used.key.unlink()
        now, before = 9.0, len(names)
        assert await asked(url, own) == ALL
        assert set(names[before:]) == {"second"}


async def test_a_certificate_that_ends_soon_is_warned_of_once_a_day(
    tmp_path: Path,
) -> None:
    pair = Authority(tmp_path).sign("short", days=5)
    now = 0.0
    tls = listener_tls(pair.certificate, pair.key)
    tls._now = lambda: now
    with capture_logs() as logs:
        for moment in (0.0, 10.0, 90_000.0):
            now = moment
            await tls.check()
    assert [entry["days_left"] for entry in logs if entry["event"] == "certificate_expires"] == [4, 4]
    assert days_left(pair.certificate) == 4
    assert days_left(tmp_path / "none") is None


@pytest.mark.parametrize("days", [1, 400, 20_000])
def test_the_end_of_a_certificate_is_read(tmp_path: Path, days: int) -> None:
    pair = Authority(tmp_path).sign("one", days=days)
    ends = expiry(pair.certificate.read_bytes())
    assert ends is not None
    assert abs(ends - datetime.now(UTC) - timedelta(days=days)) < timedelta(minutes=5)
    chain = pair.certificate.read_bytes() + (tmp_path / "authority.pem").read_bytes()
    assert expiry(b"# a comment\n" + chain) == ends


@pytest.mark.parametrize(
    "pem", [b"", b"text", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_has_no_end(pem: bytes) -> None:
    assert expiry(pem) is None


def test_an_authority_file_without_one_does_not_mean_those_of_the_system(tmp_path: Path) -> None:
    for content in ("", "text", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        file = tmp_path / "ca.pem"
        file.write_text(content)
        with pytest.raises(ConfigurationError, match=r"ca.pem: instances.far.tls.ca: expected certificates"):
            client_tls("instances.far.tls", ClientTlsSettings(ca=file))
    with pytest.raises(ConfigurationError, match=r"none.pem: instances.far.tls.ca: No such file"):
        client_tls("instances.far.tls", ClientTlsSettings(ca=tmp_path / "none.pem"))
