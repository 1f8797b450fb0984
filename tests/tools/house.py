"""A machine with two cards and something to do, for pictures of the page and for people who work on it.

`python -m tests.tools.house` furnishes one and says where its page is, until Ctrl-C. It has a Docker engine
of its own with the simulated Ollama in it, a stand-in for the NVIDIA driver's library, another Ollama server,
and a stand-in for a paid one. Nothing of it stays on the machine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from manager.cli.machine import DOCKERD, IPTABLES
from tests.nvml.standin import Card, Process, Sensors
from tests.simulated.image import ensure_simulated_image
from tests.support.cards import GIB, Machine
from tests.support.engine import acquire_engine
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.ollama import running_ollama
from tests.support.provider import Provider
from tests.tools.console import say
from tests.tools.system import COMPILER, IP, provide

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker

    from tests.support.daemon import Daemon

_CARDS = (
    Card(
        "GPU-8c1f2d34-0b5a-4c1e-9f37-2a6d1e5b7c90",
        "00000000:41:00.0",
        "NVIDIA RTX 4090",
        24 * GIB,
        sensors=Sensors(41, 58, 182_000, 450_000),
    ),
    Card(
        "GPU-5d7e9a10-77c2-4e0f-8b6a-90c4f2d1e3ab",
        "00000000:c1:00.0",
        "NVIDIA RTX A6000",
        48 * GIB,
        sensors=Sensors(7, 44, 71_000, 300_000),
    ),
)
_MODELS = {
    "gpu0": "qwen3:8b,gemma3:4b,llama3.1:8b",
    "gpu1": "qwen3:8b,gemma3:4b,llama3.1:8b",
    "cpu": "gemma3:4b,bge-m3=embed",
    "nas": "gemma3:4b,bge-m3=embed",
}
_SIM = {"OLLAMA_SIM_TOKENS": "60", "OLLAMA_SIM_TOKENS_PER_S": "120", "OLLAMA_SIM_PULLABLE": "phi4:14b"}
_CONFIG: dict[str, Any] = {
    "gpus": "none",
    "roles": {
        "thinking": {
            "model": "qwen3:8b",
            "instances": ["gpu1", "gpu0"],
            "concurrency": 4,
            "paid_fallback": True,
        },
        "control": {"model": "gemma3:4b", "reserved": 0, "queue": {"length": 16, "wait_s": 10}},
        "alert-fast": {"model": "gemma3:4b", "instances": ["gpu0", "nas"], "reserved": 1},
        "embedding": {"model": "bge-m3"},
    },
    "fallback": {"enabled": True, "order": ["openai"]},
    "budgets": [
        {"scope": "global", "period": "month", "soft_usd": 20, "hard_usd": 30},
        {"scope": "project:research", "period": "day", "soft_usd": 0.00002, "hard_usd": 1},
    ],
}
_BUSY_S = 600


@dataclass(frozen=True, slots=True)
class House:
    """What stands in it. `keep_busy` begins requests that stay open until the house is left."""

    daemon: Daemon
    machine: Machine
    client: docker.DockerClient

    @property
    def url(self) -> str:
        return self.daemon.url

    def post(self, path: str, body: Any = None, **headers: str) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def chat(self, model: str, **headers: str) -> requests.Response:
        messages = [{"role": "user", "content": "Why did the last deployment fail?"}]
        return self.post("/api/chat", {"model": model, "messages": messages, "stream": False}, **headers)

    def show_memory(self) -> None:
        """Have the cards report the memory of the containers, and of a program of somebody else."""
        held = {"gpu0": 9 * GIB, "gpu1": 21 * GIB}
        cards = []
        for card, instance in zip(_CARDS, ("gpu0", "gpu1"), strict=True):
            processes = [Process(self._pid(instance), held[instance])] if self._pid(instance) else []
            if instance == "gpu0":
                processes.append(Process(os.getpid(), 3 * GIB))
            used = sum(one.used or 0 for one in processes) + GIB // 2
            cards.append(replace(card, vram_used=used, processes=tuple(processes)))
        self.machine.show(*cards)

    def _pid(self, instance: str) -> int:
        container = self.daemon.instance(instance)["container"]
        return self.client.containers.get(container["id"]).attrs["State"]["Pid"] if container else 0

    def furnish(self) -> None:
        """Make a history: answers, a fallback to the paid server, a refusal, a drain."""
        for instance in ("gpu0", "gpu1", "cpu"):
            self.daemon.started(instance)
        self.show_memory()
        projects = ("research", "support", "nightly")
        for number in range(9):
            project = {"X-Project-ID": projects[number % 3]}
            self.chat(("thinking", "control", "alert-fast")[number % 3], **project)
        self.post("/api/embed", {"model": "embedding", "input": ["a", "b"]}, **{"X-Project-ID": "nightly"})
        self.chat("no-such-model", **{"X-Project-ID": "support"})
        compute = "/api/runtime/compute/instances"
        for instance in ("gpu0", "gpu1"):
            self.post(f"{compute}/{instance}/drain", {"reason": "new cable", "stop": False})
        self.chat("thinking", **{"X-Project-ID": "research"})
        self.post(f"{compute}/gpu0/resume")

    def collect(self) -> None:
        """Make collections: one at rest, one that changes to another version slowly, one without items."""
        for name, count, body in (
            ("manuals", 400, {"prefix": "passage: "}),
            ("tickets", 900, {}),
            ("drafts", 0, {}),
        ):
            self.post("/api/v1/collections", {"name": name, **body})
            for at in range(0, count, 100):
                items = [
                    {"id": f"{name}-{number}", "text": f"Number {number} of the {name}."}
                    for number in range(at, at + 100)
                ]
                url = f"{self.url}/api/v1/collections/{name}/items"
                requests.put(url, json={"items": items}, timeout=60)
        change = {"prefix": "passage: ", "rate": 16, "threshold": 0.95}
        self.post("/api/v1/collections/tickets/backfill", change)

    def backfilled(self) -> int:
        """Return how many items the backfill has embedded."""
        answer = requests.get(f"{self.url}/api/v1/collections/tickets/backfill", timeout=60)
        rows: int = answer.json()["rows"]
        return rows

    def keep_busy(self) -> None:
        """Begin long answers."""
        body = {"model": "alert-fast", "options": {"num_predict": 60}, "stream": True}
        for project in ("research", "support"):
            threading.Thread(target=self._read, args=(body, project), daemon=True).start()

    def _read(self, body: dict[str, Any], project: str) -> None:
        messages = [{"role": "user", "content": "hi"}]
        with (
            suppress(requests.RequestException),  # the house was left
            requests.post(
                f"{self.url}/api/chat",
                json={**body, "messages": messages},
                headers={"X-Project-ID": project},
                stream=True,
                timeout=_BUSY_S,
            ) as answer,
        ):
            for _ in answer.iter_lines():
                pass


@contextmanager
def house(home: Path) -> Iterator[House]:
    """Build one in a directory of its own."""
    with ExitStack() as stack:
        engine = stack.enter_context(acquire_engine())
        client = engine.client()
        stack.callback(client.close)
        ensure_simulated_image(client)
        machine = Machine(home, *_CARDS)
        nas = stack.enter_context(running_ollama(models=_MODELS["nas"], tokens=40, tokens_per_s=60))
        paid = stack.enter_context(_paid_server())
        key_file = home / "paid.key"
        key_file.write_text("sk-stand-in-of-a-paid-server")
        key_file.chmod(0o600)
        prices = {"input_usd_per_mtok": 0.25, "output_usd_per_mtok": 2.0, "max_output_tokens": 4096}
        templates = {
            f"ollama-{id_}": {
                "device": "cpu" if id_ == "cpu" else "gpu",
                "env": {**_SIM, "OLLAMA_SIM_MODELS": _MODELS[id_]},
            }
            for id_ in ("gpu0", "gpu1", "cpu")
        }
        instances = {
            "gpu0": {"template": "ollama-gpu0", "device": _CARDS[0].uuid, "slots": 2},
            "gpu1": {"template": "ollama-gpu1", "device": _CARDS[1].uuid, "slots": 4},
            "cpu": {"template": "ollama-cpu"},
            "nas": {"driver": "external", "url": nas.url, "slots": 2},
            "openai": {
                "driver": "cloud",
                "protocol": "openai",
                "url": f"{paid}/v1",
                "key_file": str(key_file),
                "models": {"gpt": {**prices, "for": ["thinking"]}},
            },
        }
        make = stack.enter_context(making_daemons(engine, home, new_manager_id()))
        daemon = make(
            instances=instances, templates=templates, config=_CONFIG, environment=machine.environment
        ).start()
        yield House(daemon, machine, client)


@contextmanager
def _paid_server() -> Iterator[str]:
    """Run a stand-in for a paid server on an event loop of its own."""
    started, url = threading.Event(), ""
    loop = asyncio.new_event_loop()
    ends = asyncio.Event()

    async def serve() -> None:
        nonlocal url
        async with Provider(("gpt",)).serving() as provider:
            url = provider.url
            started.set()
            await ends.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join()
        loop.close()


def main() -> int:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it for what it runs behind itself
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    provide([DOCKERD, IPTABLES, IP, COMPILER])
    with tempfile.TemporaryDirectory(prefix="ollama-manager-house-") as home, house(Path(home)) as built:
        built.furnish()
        built.collect()
        say(f"the page is at {built.url}/ui; Ctrl-C ends it")
        try:
            while True:
                built.keep_busy()
                signal.sigtimedwait([], 20)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
