"""The gateway over TLS, with real sockets: clients, streams, deadlines, new certificates, and replacement."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import ollama
import pytest
import yaml

from manager.cli.client import Daemon as Commands
from manager.cli.locate import Endpoint
from manager.client import ModelSettingsClient
from tests.support.certificates import Authority, Pair
from tests.support.daemon import ROOT, free_port, wait_for
from tests.support.fixtures import new_manager_id
from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Caller, Conversation, Scripted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TINY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


class Secure:
    """A daemon with `server.tls` in a process of its own, in front of a scripted server."""

    def __init__(self, home: Path, server: Scripted) -> None:
        self.home = home
        self.server = server
        self.authority = Authority(home)
        self.pair = Pair(home / "served.pem", home / "served.key")
        self.install(self.authority.sign("first"))
        self.port = free_port()
        self.url = f"https://localhost:{self.port}"
        self.context = ssl.create_default_context(cafile=self.authority.certificate)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.callers: list[Caller] = []
        self.config: dict[str, Any] = {
            "server": {"port": self.port, "tls": {"certificate": "served.pem", "key": "served.key"}},
            "state": {"dir": "state"},
            "manager_id": new_manager_id(),
            "engine": {"url": f"unix://{home}/none.sock"},
            "gpus": "none",
            "instances": {"a": {"driver": "external", "url": server.url}},
            "lifecycle": {"probe_interval_s": 0.2},
            "gateway": {"drain_timeout_s": 20},
        }
        self.file = home / "config.yaml"

    def install(self, pair: Pair) -> None:
        """Put other files in place of those that the daemon reads."""
        for source, target in ((pair.key, self.pair.key), (pair.certificate, self.pair.certificate)):
            shutil.copy(source, f"{target}.new")
            os.replace(f"{target}.new", target)  # noqa: PTH105

    def spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        self.file.write_text(yaml.safe_dump(self.config))
        argv = [sys.executable, "-m", "manager", "serve", "--config", str(self.file), *arguments]
        with (self.home / "log").open("ab") as log:
            process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    async def until_served(self) -> None:
        """Wait until requests for the model are served."""

        def models() -> str:
            assert self.processes[-1].poll() is None, self.log()
            with suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/api/tags", verify=self.context, timeout=5).text
            return ""

        await asyncio.to_thread(wait_for, models, lambda text: "tiny" in text)

    def log(self) -> str:
        return (self.home / "log").read_text()

    def logged(self, event: str) -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [entry for entry in entries if entry.get("event") == event]

    async def connect(self) -> Caller:
        reader, writer = await asyncio.open_connection("localhost", self.port, ssl=self.context, limit=2**22)
        self.callers.append(Caller(reader, writer, self.port))
        return self.callers[-1]

    def plain(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@asynccontextmanager
async def secure(home: Path, **gateway: Any) -> AsyncIterator[Secure]:
    server = Scripted()
    async with server.serving():
        daemon = Secure(home, server)
        daemon.config["gateway"] |= gateway
        daemon.spawn()
        try:
            await daemon.until_served()
            yield daemon
        finally:
            for caller in daemon.callers:
                caller.leave()
            for process in daemon.processes:
                process.kill()
                process.wait()


def certificate_at(port: int, context: ssl.SSLContext) -> bytes:
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as peer,
    ):
        shown = peer.getpeercert(binary_form=True)
        assert shown is not None
        return shown


async def test_clients_talk_over_tls(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        client = ollama.Client(host=daemon.url, verify=daemon.context)

        def chats() -> list[str]:
            whole = client.chat("tiny", [{"role": "user", "content": "hi"}])
            pieces = client.chat("tiny", [{"role": "user", "content": "hi"}], stream=True)
            assert whole.done
            said = [piece.message.content or "" for piece in pieces]
            client._client.close()
            return said

        assert await asyncio.to_thread(chats) == ["word", ""]
        curl = ["curl", "-s", "--cacert", str(daemon.authority.certificate), "-w", " %{http_version}"]
        done = await asyncio.to_thread(
            subprocess.run, [*curl, f"{daemon.url}/healthz"], capture_output=True, text=True, check=True
        )
        assert done.stdout == '{"status":"ok"} 1.1'

        async with httpx.AsyncClient(verify=daemon.context, base_url=daemon.url) as kept:
            for _ in range(3):  # on one connection, with a body beyond every buffer
                body = {**TINY, "stream": False, "options": {"stop": ["x" * 3_000_000]}}
                assert (await kept.post("/api/chat", json=body)).json()["done"] is True
        assert len(daemon.server.seen[-1].body) > 3_000_000

        peer = (await daemon.connect()).writer.get_extra_info("ssl_object")
        assert (peer.version(), peer.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")
        for version, status in (("1.1", 35), ("1.2", 0)):
            asked = [*curl, "--tls-max", version, "--ciphers", "DEFAULT@SECLEVEL=0", f"{daemon.url}/healthz"]
            old = await asyncio.to_thread(subprocess.run, asked, capture_output=True, check=False)
            assert old.returncode == status


async def test_our_own_commands_talk_over_tls(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:

        def look() -> None:
            def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
                return subprocess.run(
                    [sys.executable, "-m", "manager", *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environ},
                    capture_output=True,
                    text=True,
                    check=False,
                )

            config = ("--config", str(daemon.file))
            done = run("status", "--json", *config)  # exactly the configured certificate is trusted
            assert [one["id"] for one in json.loads(done.stdout)["instances"]] == ["a"], done.stderr
            assert "# file " in run("config", "show", *config).stdout
            done = run("status", "--url", daemon.url)
            assert (done.returncode, "not trusted" in done.stderr) == (3, True)
            assert "OLLAMA_MANAGER_CA" in done.stderr
            ca = str(daemon.authority.certificate)
            for variable in ("OLLAMA_MANAGER_CA", "SSL_CERT_FILE"):
                done = run("status", "--url", daemon.url, **{variable: ca})
                assert done.returncode == 0, done.stderr
            assert run("status", "--url", f"http://localhost:{daemon.port}").returncode == 3
            done = run("status", "--url", daemon.url, OLLAMA_MANAGER_CA="/none")
            assert (done.returncode, "OLLAMA_MANAGER_CA: '/none' cannot be used" in done.stderr) == (2, True)
            assert "valid for 36" in run("doctor", *config).stdout
            with ModelSettingsClient(daemon.url, ca=ca) as client:
                assert client.model_for("thinking") is None
            # Another certificate of the same authority is not the configured one.
            other = daemon.authority.sign("other")
            with pytest.raises(Exception, match="not trusted"):
                Commands(Endpoint(daemon.url, certificate=other.certificate)).status_document()
            Commands(Endpoint(daemon.url, certificate=daemon.pair.certificate)).status_document()

        await asyncio.to_thread(look)


async def test_plain_http_is_told_to_use_https(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        answer = await asyncio.to_thread(httpx.get, f"http://localhost:{daemon.port}/api/tags")
        assert (answer.status_code, answer.json()) == (400, {"error": "this port speaks TLS; use https://"})
        for sent in (b"", b"\x16\x03\x01garbage that is no handshake at all"):
            with daemon.plain() as peer:
                peer.sendall(sent)
                peer.shutdown(socket.SHUT_WR)
                assert not await asyncio.to_thread(peer.recv, 1) or sent
        await daemon.until_served()


async def test_a_client_that_leaves_ends_its_request(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        left = asyncio.Event()

        async def waits(talk: Conversation) -> None:
            await talk.begin()
            await talk.chunk(LINE)
            await talk.left()
            left.set()

        daemon.server.answer = waits
        for leaves in ("abort", "close"):  # without and with TLS's own end
            left.clear()
            caller = await daemon.connect()
            await caller.send(TINY)
            await caller.head()
            await caller.chunk()
            if leaves == "abort":
                caller.leave()
            else:
                caller.writer.close()
            async with asyncio.timeout(10):
                await left.wait()


async def test_a_client_that_does_not_read_holds_the_server_up(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        sent = 0

        async def counts(talk: Conversation) -> None:
            nonlocal sent
            await talk.begin()
            while not talk.writer.is_closing():
                await talk.chunk(LINE * 1000)
                sent += len(LINE) * 1000

        daemon.server.answer = counts
        caller = await daemon.connect()
        await caller.send(TINY)
        await caller.head()
        transport: Any = caller.writer.transport
        transport.pause_reading()
        stood, before = 0, -1
        async with asyncio.timeout(30):
            while stood < 10:
                await asyncio.sleep(0.1)
                stood = stood + 1 if sent == before else 0
                before = sent
        assert sent < 40 * 2**20
        transport.resume_reading()
        await until(lambda: sent > before + 2**20)
        caller.leave()


async def test_slow_answers_arrive_whole_before_the_connection_ends(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        size = 3_000_000

        async def much(talk: Conversation) -> None:
            await talk.whole(200, b"x" * size)

        daemon.server.answer = much
        caller = await daemon.connect()
        await caller.send(TINY, headers={"Connection": "close"})
        await caller.head()
        transport: Any = caller.writer.transport
        transport.pause_reading()
        await asyncio.sleep(4)  # longer than the daemon's looks at its connections
        transport.resume_reading()
        assert len(await caller.ended()) == size


async def test_an_idle_client_that_never_ends_its_side_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        with daemon.plain() as plain, daemon.context.wrap_socket(plain, server_hostname="localhost") as peer:
            peer.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert await asyncio.to_thread(peer.recv, 100)
            began = time.monotonic()
            daemon.processes[-1].terminate()
            assert await asyncio.to_thread(daemon.processes[-1].wait, 20) == 0
            assert time.monotonic() - began < 8


async def test_a_new_certificate_is_served_while_streams_go_on(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        goes_on = asyncio.Event()

        async def slow(talk: Conversation) -> None:
            await talk.begin()
            await talk.chunk(LINE)
            await goes_on.wait()
            await talk.chunk(LAST)
            await talk.end()

        daemon.server.answer = slow
        caller = await daemon.connect()
        await caller.send(TINY)
        await caller.head()
        await caller.chunk()
        served = certificate_at(daemon.port, daemon.context)

        # A pair that does not belong together changes nothing, and says so once.
        second = daemon.authority.sign("second")
        shutil.copy(second.certificate, daemon.pair.certificate)
        await until(lambda: daemon.logged("tls_files_refused"), within_s=20)
        (problem,) = daemon.logged("tls_files_refused")
        assert "served.key: server.tls.key: does not belong to the certificate" in problem["problem"]
        assert await asyncio.to_thread(certificate_at, daemon.port, daemon.context) == served

        shutil.copy(second.key, daemon.pair.key)
        await until(lambda: daemon.logged("tls_files_reread"), within_s=20)
        assert await asyncio.to_thread(certificate_at, daemon.port, daemon.context) != served
        goes_on.set()
        assert await caller.chunk() == LAST
        assert len(daemon.logged("tls_files_refused")) == 1


def ends_when(goes_on: asyncio.Event) -> Any:
    """Answers at once; a body with `slow` once `goes_on` is set, as a stream or, with `whole`, whole."""

    async def answer(talk: Conversation) -> None:
        if b"whole" in talk.seen.body:
            await goes_on.wait()
        if b"slow" not in talk.seen.body or b"whole" in talk.seen.body:
            return await talk.whole(200, LAST.strip())
        await talk.begin()
        await talk.chunk(LINE)
        await goes_on.wait()
        await talk.chunk(LAST)
        return await talk.end()

    return answer


async def test_replacement_loses_no_request(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        goes_on = asyncio.Event()
        daemon.server.answer = ends_when(goes_on)
        streaming, waiting = await daemon.connect(), await daemon.connect()
        await streaming.send({**TINY, "options": {"stop": ["slow"]}})
        await streaming.head()
        await streaming.chunk()
        await waiting.send({**TINY, "stream": False, "options": {"stop": ["slow whole"]}})
        await until(lambda: len(daemon.server.seen) == 2)

        is_over, answered = False, 0

        async def keeps_asking() -> None:
            nonlocal answered
            limits = httpx.Limits(max_keepalive_connections=1)
            # A request on a connection that was closed meanwhile is sent again, as clients do.
            async with httpx.AsyncClient(verify=daemon.context, base_url=daemon.url, limits=limits) as client:
                while not is_over:
                    try:
                        answer = await client.post("/api/chat", json=TINY, timeout=60)
                    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                        closed_idle.append(1)
                        continue
                    assert answer.status_code == 200, answer.text
                    answered += 1

        async def connects_anew() -> None:
            nonlocal answered
            while not is_over:
                async with httpx.AsyncClient(verify=daemon.context, base_url=daemon.url) as client:
                    answer = await client.post("/api/chat", json=TINY, timeout=60)
                    assert answer.status_code == 200, answer.text
                    answered += 1

        closed_idle: list[int] = []
        asking = [
            asyncio.ensure_future(one()) for one in (keeps_asking, keeps_asking, connects_anew, connects_anew)
        ]
        await until(lambda: answered > 50)
        old, new = daemon.processes[-1], daemon.spawn("--replace")
        await until(lambda: len(daemon.logged("serving")) == 2 or new.poll() is not None, within_s=60)
        assert new.poll() is None, daemon.log()
        count = answered
        await until(lambda: answered > count + 50)
        is_over = True
        await asyncio.gather(*asking)
        assert len(closed_idle) <= 2

        assert old.poll() is None
        goes_on.set()
        assert await streaming.chunk() == LAST
        assert await streaming.chunk() == b""
        reply = await waiting.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await asyncio.to_thread(old.wait, 30) == 0
        assert "Traceback" not in daemon.log()
        await daemon.until_served()


async def test_handshakes_have_a_deadline(tmp_path: Path) -> None:
    async with secure(tmp_path) as daemon:
        with daemon.plain() as silent, daemon.plain() as half:
            half.sendall(b"\x16\x03\x01\x02\x00")
            began = time.monotonic()
            assert await asyncio.to_thread(silent.recv, 1) == b""
            with suppress(ConnectionResetError):
                assert await asyncio.to_thread(half.recv, 1) == b""
            assert 8 < time.monotonic() - began < 14


def test_files_that_cannot_be_used_are_refused_at_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, other = authority.sign("one"), authority.sign("two")
    empty, opened = tmp_path / "empty.pem", tmp_path / "open.key"
    empty.touch()
    shutil.copy(pair.key, opened)
    opened.chmod(0o644)
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        ["openssl", "ec", "-in", pair.key, "-aes256", "-passout", "pass:x", "-out", encrypted],
        check=True,
        capture_output=True,
    )
    encrypted.chmod(0o600)
    cases: list[tuple[dict[str, str | None], str]] = [
        ({"certificate": str(pair.certificate), "key": None}, "server.tls.key: missing beside certificate"),
        ({"certificate": None, "key": str(pair.key)}, "server.tls.certificate: missing beside key"),
        ({"certificate": "none.pem", "key": str(pair.key)}, "none.pem: server.tls.certificate: No such file"),
        (
            {"certificate": str(empty), "key": str(pair.key)},
            "empty.pem: server.tls.certificate: expected a cert",
        ),
        ({"certificate": str(pair.certificate), "key": str(tmp_path)}, "server.tls.key: not a regular file"),
        (
            {"certificate": str(pair.certificate), "key": str(opened)},
            "open.key: server.tls.key: open to every",
        ),
        (
            {"certificate": str(pair.certificate), "key": str(other.key)},
            "two.key: server.tls.key: does not belong",
        ),
        (
            {"certificate": str(pair.certificate), "key": str(encrypted)},
            "encrypted.key: server.tls.key: is encr",
        ),
        (
            {"certificate": str(pair.certificate), "key": str(pair.certificate)},
            "server.tls.key: open to every",
        ),
    ]
    for tls, expected in cases:
        server = {"port": free_port(), "tls": tls}
        (tmp_path / "c.yaml").write_text(
            yaml.safe_dump({"server": server, "state": {"dir": "state"}, "instances": {}, "gpus": "none"})
        )
        done = subprocess.run(
            [sys.executable, "-m", "manager", "serve", "--config", str(tmp_path / "c.yaml")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, expected in done.stderr) == (2, True), (expected, done.stderr)
