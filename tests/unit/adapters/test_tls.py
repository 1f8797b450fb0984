"""One TLS context for the process, built off the event loop, for the relay's pools and for the probes."""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from manager.adapters.tls import SharedTls
from manager.adapters.upstream import HttpUpstream
from manager.errors import OutOfDescriptorsError
from manager.relay.upstream import UpstreamPools
from tests.support.sockets import LOOPS, Collected, certificate, no_descriptors, on

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

both_loops = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads in which contexts for clients have been built."""
    threads: list[int] = []
    build = ssl.create_default_context

    def noted(*args: object, **options: object) -> ssl.SSLContext:
        threads.append(threading.get_ident())
        return build(*args, **options)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(ssl, "create_default_context", noted)
    return threads


async def test_concurrent_first_uses_build_one_context_and_not_on_the_event_loop(builders: list[int]) -> None:
    tls = SharedTls()
    assert not builders, "a daemon without https never builds one"
    contexts = await asyncio.gather(*(tls.context() for _ in range(20)))
    assert len({id(context) for context in contexts}) == len(builders) == 1
    assert builders[0] != threading.get_ident()
    assert contexts[0].verify_mode is ssl.CERT_REQUIRED
    assert contexts[0].check_hostname


async def test_a_first_use_that_is_cancelled_harms_no_later_one() -> None:
    tls = SharedTls()
    first = asyncio.ensure_future(tls.context())
    second = asyncio.ensure_future(tls.context())
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).check_hostname
    await asyncio.wait([first])


async def test_a_context_that_could_not_read_the_authorities_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, _ = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    tls = SharedTls()
    with no_descriptors(), pytest.raises(OutOfDescriptorsError):
        await tls.context()
    assert (await tls.context()).cert_store_stats()["x509_ca"] == 1


@both_loops
def test_the_relay_and_the_probes_trust_what_the_system_trusts_through_one_context(
    loop: Callable[[], asyncio.AbstractEventLoop],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    builders: list[int],
) -> None:
    served, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served, key)

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def work() -> None:
        listener = await asyncio.start_server(answers, "127.0.0.1", 0, ssl=context)
        url = f"https://localhost:{listener.sockets[0].getsockname()[1]}"
        strict = UpstreamPools(SharedTls().context)
        with pytest.raises(ssl.SSLCertVerificationError):
            await strict.pool(url).connect()
        monkeypatch.setenv("SSL_CERT_FILE", str(served))
        builders.clear()
        tls = SharedTls()
        pools = UpstreamPools(tls.context)
        async with HttpUpstream(tls.context) as upstream:
            assert await upstream.answers(f"{url}/", 10)
            for path in ("", "/other"):
                connection = await pools.pool(url + path).connect()
                sink = Collected()
                connection.send(sink, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", ())
                await sink.ended.wait()
                assert (sink.body, sink.why) == (b"{}", "")
                assert pools.pool(url + path).idle() is connection
                connection.abandon()
        assert len(builders) == 1
        assert builders[0] != threading.get_ident()
        listener.close()

    on(loop, work())


@both_loops
def test_a_tls_server_that_read_the_request_and_closed_may_have_begun(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, key = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(served))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served, key)

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def work() -> None:
        listener = await asyncio.start_server(answers, "127.0.0.1", 0, ssl=context)
        pool = UpstreamPools(SharedTls().context).pool(
            f"https://localhost:{listener.sockets[0].getsockname()[1]}"
        )
        connection = await pool.connect()
        for broken in (False, True):
            sink = Collected()
            connection.send(sink, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", ())
            await sink.ended.wait()
            assert sink.may_have_begun is (True if broken else None)
        listener.close()

    on(loop, work())
