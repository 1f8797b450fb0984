"""`ollama serve`: the routes, the start, the log and the end of the simulated server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import compatible, native
from .http1 import Connection
from .inference import Inference, RequestError
from .knobs import BadKnobError, Knobs
from .library import BadNameError, Library, Name
from .memory import Memory
from .native import JSON, dumps, send_json
from .scheduler import Scheduler, keep_alive_from_environment
from .show import shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .http1 import Exchange

    Route = Callable[[Inference, Exchange], Awaitable[None]]

BLOB_PREFIX = "/api/blobs/"
MODEL_PREFIX = "/v1/models/"
USER_KEY_PREFIX = "/api/user/keys/"
PREFIXES = (BLOB_PREFIX, MODEL_PREFIX, USER_KEY_PREFIX)
SIGNIN_URL = "https://ollama.com/connect?name=simulated&key=c2ltdWxhdGVk"
NO_GPU = ("", "void", "none")


async def root(inference: Inference, exchange: Exchange) -> None:
    await exchange.answer(200, "text/plain; charset=utf-8", b"Ollama is running")


async def show(inference: Inference, exchange: Exchange) -> None:
    request = await native.read(exchange, "ShowRequest")
    name = request.get("model") or request.get("name", "")
    if not name:
        raise RequestError(400, "model is required")
    try:
        Name.parse(name)
    except BadNameError:
        raise RequestError(400, "invalid model name") from None
    await send_json(exchange, shown(native.find_model(inference, name)))


async def status(inference: Inference, exchange: Exchange) -> None:
    await send_json(exchange, {"cloud": {"disabled": False, "source": "none"}})


async def recommendations(inference: Inference, exchange: Exchange) -> None:
    await send_json(exchange, {"recommendations": []})


async def me(inference: Inference, exchange: Exchange) -> None:
    """Nobody is signed in. The answer says where to: 0.33 `server/routes.go` WhoamiHandler."""
    await exchange.body()
    await send_json(exchange, {"error": "unauthorized", "signin_url": SIGNIN_URL}, 401)


async def signout(inference: Inference, exchange: Exchange) -> None:
    await exchange.body()
    raise RequestError(401, "you are not currently signed in")


async def blob_head(inference: Inference, exchange: Exchange) -> None:
    digest = exchange.path.removeprefix(BLOB_PREFIX)
    if not inference.library.has_blob(digest):
        raise RequestError(404, f'blob "{digest}" not found')
    await exchange.answer(200)


async def blob_post(inference: Inference, exchange: Exchange) -> None:
    from hashlib import sha256  # noqa: PLC0415 - slow to import and seldom needed

    wanted = exchange.path.removeprefix(BLOB_PREFIX)
    pieces = [piece async for piece in exchange.body_pieces()]
    hashed = sha256()
    for piece in pieces:
        hashed.update(piece)
    got = f"sha256:{hashed.hexdigest()}"
    if got != wanted:
        raise RequestError(400, f'digest mismatch, expected "{wanted}", got "{got}"')
    inference.library.put_blob(got, pieces)
    await exchange.answer(201)


ROUTES: dict[str, dict[str, Route]] = {
    "/": {"GET": root, "HEAD": root},
    "/api/version": {"GET": native.version, "HEAD": native.version},
    "/api/tags": {"GET": native.tags, "HEAD": native.tags},
    "/api/ps": {"GET": native.ps},
    "/api/generate": {"POST": native.generate},
    "/api/chat": {"POST": native.chat},
    "/api/embed": {"POST": native.embed},
    "/api/embeddings": {"POST": native.embeddings},
    "/api/show": {"POST": show},
    "/api/pull": {"POST": native.pull},
    "/api/push": {"POST": native.push},
    "/api/create": {"POST": native.create},
    "/api/copy": {"POST": native.copy},
    "/api/delete": {"DELETE": native.delete},
    BLOB_PREFIX: {"POST": blob_post, "HEAD": blob_head},
    "/api/status": {"GET": status},
    "/api/experimental/model-recommendations": {"GET": recommendations},
    "/api/me": {"POST": me},
    "/api/signout": {"POST": signout},
    USER_KEY_PREFIX: {"DELETE": signout},
    "/v1/chat/completions": {"POST": compatible.chat_completions},
    "/v1/completions": {"POST": compatible.completions},
    "/v1/embeddings": {"POST": compatible.embeddings},
    "/v1/models": {"GET": compatible.models},
    MODEL_PREFIX: {"GET": compatible.model},
    "/v1/responses": {"POST": compatible.responses},
    "/v1/messages": {"POST": compatible.messages},
    "/v1/audio/transcriptions": {"POST": compatible.transcriptions},
}


class Server:
    """The running server: one set of knobs, one set of models."""

    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs
        self._memory = Memory()
        self._ready = asyncio.Event()
        devices = visible_devices() if not knobs.cpu_fallback else []
        home = Path(os.environ.get("HOME") or "/root")
        library = Library(Path(os.environ.get("OLLAMA_MODELS") or home / ".ollama" / "models"))
        library.set_built_in(knobs.models)
        keep_alive_ns = keep_alive_from_environment(os.environ.get("OLLAMA_KEEP_ALIVE") or "5m")
        self._devices = devices
        self._inference = Inference(knobs, library, Scheduler(knobs, keep_alive_ns, on_gpu=bool(devices)))

    async def run(self) -> None:
        """Serve until a signal or a knob ends the process; never returns."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._shut_down)
        loop.add_signal_handler(signal.SIGCHLD, self._memory.reap)
        self._memory.hold(self._knobs.allocate_bytes, self._knobs.allocate_in)
        if self._knobs.crash == "start":
            log("ERROR", "main.go:1", "Error: simulated crash at start")
            os._exit(self._knobs.crash_exit)
        if self._knobs.start_port == "never":
            await asyncio.Event().wait()
        if self._knobs.start_port == "closed":
            await asyncio.sleep(self._knobs.start_delay_s)
        host, port = listen_address(os.environ.get("OLLAMA_HOST", ""))
        try:
            server = await loop.create_server(lambda: Connection(self._handle), host, port)
        except OSError as error:
            sys.stderr.write(
                f"Error: listen tcp {host}:{port}: bind: {os.strerror(error.errno or 0).lower()}\n"
            )
            os._exit(1)
        shown_host = "[::]" if host in ("0.0.0.0", "::") else host
        bound_port = server.sockets[0].getsockname()[1]
        log(
            "INFO",
            "routes.go:1810",
            f"Listening on {shown_host}:{bound_port} (version {self._knobs.version})",
        )
        log("INFO", "runner.go:67", "discovering available GPUs...")
        if self._knobs.start_port == "open":
            await asyncio.sleep(self._knobs.start_delay_s)
        log_devices(self._devices)
        self._ready.set()
        await server.serve_forever()

    async def _handle(self, exchange: Exchange) -> None:
        began = time.monotonic()
        await self._ready.wait()
        if exchange.path == "/_sim/knobs":
            await self._handle_knobs(exchange)
            return
        exchange.knobs = self._knobs
        if self._knobs.hang:
            if self._knobs.hang == "body":
                await exchange.send_head_only(native.NDJSON)
            await asyncio.Event().wait()
        await self._route(exchange)
        micros = int((time.monotonic() - began) * 1e6)
        stamp = time.strftime("%Y/%m/%d - %H:%M:%S")
        request = f'{exchange.method:<8} "{exchange.path}"'
        line = f"[GIN] {stamp} | {exchange.status} | {micros:>10}µs | {exchange.peer:>15} | {request}\n"
        os.write(1, line.encode())

    async def _route(self, exchange: Exchange) -> None:
        methods = routes_of(exchange.path)
        if methods is None:
            await exchange.answer(404, "text/plain", b"404 page not found")
            return
        route = methods.get(exchange.method)
        if route is None:
            allowed = {"Allow": ", ".join(methods)}
            await exchange.answer(405, "text/plain", b"405 method not allowed", allowed)
            return
        try:
            await route(self._inference, exchange)
        except RequestError as error:
            if exchange.path == "/v1/messages":
                await compatible.send_anthropic_error(exchange, error)
            elif exchange.path.startswith("/v1/"):
                await compatible.send_openai_error(exchange, error)
            else:
                await native.send_error(exchange, error)

    async def _handle_knobs(self, exchange: Exchange) -> None:
        if exchange.method == "POST":
            try:
                changes = json.loads(await exchange.body())
                self._knobs.update(changes)
                self._inference.library.set_built_in(self._knobs.models)
            except (ValueError, BadKnobError, BadNameError) as error:
                await exchange.answer(400, JSON, dumps({"error": str(error)}))
                return
            if {"allocate_bytes", "allocate_in"} & changes.keys():
                self._memory.hold(self._knobs.allocate_bytes, self._knobs.allocate_in)
        await exchange.answer(200, JSON, dumps(self._knobs.as_dict()))
        if self._knobs.crash == "now":
            os._exit(self._knobs.crash_exit)

    def _shut_down(self) -> None:
        if self._knobs.shutdown_s >= 0:
            asyncio.get_running_loop().call_later(self._knobs.shutdown_s, self._exit)

    def _exit(self) -> None:
        """Leave at once: the kernel drops what is open, as Ollama drops it."""
        self._memory.hold(0, "server")
        os._exit(0)


def routes_of(path: str) -> dict[str, Route] | None:
    for prefix in PREFIXES:
        if path.startswith(prefix) and path != prefix:
            return ROUTES[prefix]
    return None if path in PREFIXES else ROUTES.get(path)


def listen_address(text: str) -> tuple[str, int]:
    """Host and port of OLLAMA_HOST, in any of the forms `host`, `host:port`, `:port` and `http://host:port`."""
    host, colon, port = text.rpartition("://")[2].rstrip("/").rpartition(":")
    if not colon:
        host, port = port, ""
    return host.strip("[]") or "0.0.0.0", int(port or 11434)


def visible_devices() -> list[str]:
    """The GPUs that a CUDA program would find: those that the container runtime was told to show."""
    named = os.environ.get("NVIDIA_VISIBLE_DEVICES", "")
    hidden = (
        os.environ.get("CUDA_VISIBLE_DEVICES", "") == "-1" or os.environ.get("OLLAMA_LLM_LIBRARY") == "cpu"
    )
    if hidden or named in NO_GPU:
        return []
    # "all" and indices name GPUs whose UUIDs a simulation cannot know.
    return [
        item if item.startswith(("GPU-", "MIG-")) else f"GPU-00000000-0000-0000-0000-{index:012}"
        for index, item in enumerate(named.split(","))
    ]


def log_devices(devices: list[str]) -> None:
    for index, device in enumerate(devices):
        log(
            "INFO", "types.go:42", "inference compute",
            f'id={device} filter_id="" library=CUDA compute=9.0 name=CUDA{index} description="Simulated GPU" '
            f"libdirs=ollama,cuda_v13 driver=13.0 pci_id=0000:{index + 1:02x}:00.0 type=discrete "
            'total="80.0 GiB" available="79.0 GiB"',
        )  # fmt: skip
    if not devices:
        log(
            "INFO", "types.go:60", "inference compute",
            'id=cpu library=cpu compute="" name=cpu description=cpu libdirs=ollama driver="" '
            'pci_id="" type="" '
            'total="31.3 GiB" available="30.4 GiB"',
        )  # fmt: skip


def log(level: str, source: str, message: str, fields: str = "") -> None:
    """One line as Go's slog writes it."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S") + f".{time.time_ns() // 10**6 % 1000:03}Z"
    quoted = f'"{message}"' if " " in message else message
    sys.stderr.write(f"time={stamp} level={level} source={source} msg={quoted} {fields}".rstrip() + "\n")


def serve() -> None:
    """Run the server with the knobs of the environment; never returns."""
    log(
        "INFO",
        "routes.go:1752",
        "server config",
        f'env="map[OLLAMA_HOST:{os.environ.get("OLLAMA_HOST", "")}]"',
    )
    asyncio.run(Server(Knobs.from_environment(os.environ)).run())
