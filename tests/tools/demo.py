"""`make demo`: the main job once, from a client's side, and offline.

A Docker engine of its own, the simulated Ollama in it, a real daemon process, and a stand-in for the NVIDIA
driver's library, so that a graphics card is chosen by its UUID. Every step is checked: the first that is not
as it should be ends the demonstration with exit status 1. Nothing of it stays on the machine.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
import yaml

from manager.cli.machine import DOCKERD, IPTABLES, lacking
from manager.settings import packaged_templates
from tests.nvml import standin
from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.support.daemon import Daemon, wait_for
from tests.support.engine import NoEngineError, PrivateEngine, acquire_engine
from tests.tools.console import ToolError, say
from tests.tools.system import COMPILER, IP, provide
from tests.tools.transcript import Transcript, expect, run_command, tail

if TYPE_CHECKING:
    from collections.abc import Mapping

    import docker

    from tests.support.engine import Engine

_CARD = standin.Card("GPU-8c1f2d34-0b5a-4c1e-9f37-2a6d1e5b7c90", vram_used=2 * 2**30, name="Stand-in RTX")
_TTL_S = 5
_WORDS_PER_S = 24.0
_MANAGER_ID = "demo"
_TOLD = ("X-Instance", "X-Model", "X-Start-Ms", "X-Fallback-Reason")
_START_LIMIT_S = 60.0  # of the daemon, on a machine that has other things to do


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if os.geteuid() == 0:
        provide([DOCKERD, IPTABLES, IP, COMPILER])
    show = Transcript()
    show.title("Ollama Endpoint Manager: a demonstration without network, models and graphics card.")
    with tempfile.TemporaryDirectory(prefix="ollama-manager-demo-") as directory:
        home = Path(directory)
        show.step("A Docker engine of its own, a simulated Ollama, and the daemon")
        began = time.monotonic()
        with acquire_engine() as engine:
            show.result(f"an engine apart from yours is up ({time.monotonic() - began:.1f} s)")
            with closing(engine.client()) as client:
                _demonstrate(show, home, engine, client)
    if isinstance(engine, PrivateEngine):
        engine.assert_clean()
    show.end("Done. The daemon, its containers and the engine are gone")
    return 0


def _demonstrate(show: Transcript, home: Path, engine: Engine, client: docker.DockerClient) -> None:
    with show.timed("the image of the simulated Ollama is built"):
        ensure_simulated_image(client)
    with_gpu = not lacking([COMPILER])
    # Compiled modules lie where they always do, not in a directory that would stay.
    environment = {"PYTHONPYCACHEPREFIX": "", **(_graphics_card(home) if with_gpu else {})}
    with Daemon(
        home, _configuration(home, with_gpu=with_gpu), engine_url=engine.url, environment=environment
    ) as daemon:
        try:
            with show.timed(f"the daemon is ready at {daemon.url}"):
                daemon.start(until_ready=False).wait_until_ready(within_s=_START_LIMIT_S)
            _tour(show, daemon, client, with_gpu=with_gpu)
        except Exception as error:
            raise ToolError(f"{error}\n\nThe end of the daemon's log:\n{tail(daemon.log())}") from error


def _tour(show: Transcript, daemon: Daemon, client: docker.DockerClient, *, with_gpu: bool) -> None:
    show.step("What may run")
    run_command(show, daemon, "status")
    expect(_containers(client) == [], "no container runs yet")

    show.step("A client asks for an answer all the same: what it needs is started for it")
    came_from = _chat(show, daemon.url, "tiny")
    expect(came_from.get("X-Instance") == "cpu", "the answer says that it comes from cpu")
    expect("X-Start-Ms" in came_from, "the answer says how long cpu had to be started for it")
    expect(daemon.instance("cpu")["phase"] == "ready", "cpu is ready")

    show.step("The next one finds it warm, through the OpenAI API as well")
    expect("X-Start-Ms" not in _chat(show, daemon.url, "tiny"), "nothing had to be started")
    _openai_chat(show, daemon.url)

    if with_gpu:
        _graphics_tour(show, daemon, client)
    else:
        show.step("A graphics card: left out, as there is no C compiler to build the driver's stand-in with")

    show.step("What runs now")
    run_command(show, daemon, "status")

    show.step(f"Nobody uses cpu any more: after {_TTL_S} s the daemon stops it")
    with show.timed("cpu is stopped, its container is gone"):
        stopped = daemon.wait_for_phase("cpu", "stopped", within_s=_TTL_S + 15)
    expect(stopped["container"] is None, "cpu has no container")
    expect(f"{_MANAGER_ID}-ollama-cpu" not in _containers(client), "the container of cpu is removed")
    told = wait_for(lambda: _stops_of_cpu(daemon))
    expect(len(told) == 1, "the stop is among the events, once")
    show.result(f"the event says: {told[0]['detail']}")

    show.step("End")
    if with_gpu:
        run_command(show, daemon, "stop", "gpu0")
    expect(_containers(client) == [], "no container is left")
    with show.timed("the daemon has ended in order"):
        expect(daemon.stop() == 0, "the daemon exits 0")


def _stops_of_cpu(daemon: Daemon) -> list[dict[str, Any]]:
    """Empty as well while the daemon is slow to answer, for the stream is read until it falls silent."""
    with suppress(requests.Timeout):
        return [one for one in daemon.events() if (one["instance"], one["kind"]) == ("cpu", "stopped")]
    return []


def _graphics_tour(show: Transcript, daemon: Daemon, client: docker.DockerClient) -> None:
    show.step("The same on a graphics card (of a stand-in for the NVIDIA driver)")
    (card,) = daemon.get("gpus")["gpus"]
    expect(card["uuid"] == _CARD.uuid, "the card is found")
    show.result(
        f"card {card['index']}: {card['name']}, {_gib(card['vram_free_bytes'])} of "
        f"{_gib(card['vram_total_bytes'])} GiB free, {card['uuid']}"
    )
    came_from = _chat(show, daemon.url, "tiny@gpu0")
    expect(came_from.get("X-Instance") == "gpu0", "the answer says that it comes from gpu0")
    body = daemon.instance("gpu0")
    expect(body["phase"] == "ready", "gpu0 is ready")
    container = client.containers.get(body["container"]["id"])
    requested = [
        device
        for request in container.attrs["HostConfig"]["DeviceRequests"]
        for device in request["DeviceIDs"]
    ]
    expect(requested == [_CARD.uuid], "Docker was asked for exactly that card")
    show.result(f"Docker was asked for the card {requested[0]}, by UUID and for no other")


def _chat(show: Transcript, address: str, model: str) -> Mapping[str, str]:
    """A streamed answer; the headers that say where it came from."""
    question = "Why is the sky blue?"
    message = json.dumps({"model": model, "messages": [{"role": "user", "content": question}]})
    show.command(f"curl -i {address}/api/chat -d '{message}'")
    began = time.monotonic()
    first_s: float | None = None
    last: dict[str, Any] = {}
    with requests.post(f"{address}/api/chat", data=message, stream=True, timeout=60) as answer:
        expect(answer.status_code == requests.codes.ok, "the chat is answered")
        came_from = {name: value for name, value in answer.headers.items() if name in _TOLD}
        show.result("  ".join(f"{name}: {value}" for name, value in came_from.items()))
        show.piece("   ")
        for line in answer.iter_lines():
            last = json.loads(line)
            if first_s is None:
                first_s = time.monotonic() - began
            show.piece(last["message"]["content"])
    show.piece("\n")
    expect(last.get("done") is True and first_s is not None, "the stream comes to its end")
    show.result(
        f"(simulated: {last['eval_count']} tokens, the first after {first_s:.2f} s, the last after "
        f"{time.monotonic() - began:.1f} s)"
    )
    return came_from


def _openai_chat(show: Transcript, address: str) -> None:
    message = json.dumps({"model": "thinking", "messages": [{"role": "user", "content": "Hello"}]})
    show.command(f"curl {address}/v1/chat/completions -d '{message}'     # a role, not a model")
    answer = requests.post(f"{address}/v1/chat/completions", data=message, timeout=60)
    expect(answer.status_code == requests.codes.ok, "the OpenAI API answers")
    body = answer.json()
    content = body["choices"][0]["message"]["content"]
    show.result(f"{content[:60]}…  (model {body['model']}, {body['usage']['completion_tokens']} tokens)")


def _configuration(home: Path, *, with_gpu: bool) -> dict[str, Any]:
    """The packaged templates, as they are but for the image and the pace of its answers."""
    directory = home / "templates"
    directory.mkdir()
    for file in packaged_templates().glob("*.yaml"):
        template = yaml.safe_load(file.read_text(encoding="utf-8"))
        template["image"] = IMAGE
        template["env"]["OLLAMA_SIM_TOKENS_PER_S"] = str(_WORDS_PER_S)
        (directory / file.name).write_text(yaml.safe_dump(template), encoding="utf-8")
    gpu = {"gpu0": {"template": "ollama-gpu", "device": "auto", "ttl_s": 0}} if with_gpu else {}
    return {
        "manager_id": _MANAGER_ID,
        "templates": {"dir": str(directory)},
        "instances": {"cpu": {"template": "ollama-cpu", "ttl_s": _TTL_S}, **gpu},
        "gpus": "none",
        "roles": {"thinking": {"model": "tiny", "policy": "cpu_only"}},
        "lifecycle": {"probe_interval_s": 0.5, "stop_timeout_s": 10, "start_timeout_s": 60},
    }


def _graphics_card(home: Path) -> dict[str, str]:
    library = standin.build(home / "nvml")
    state = home / "nvml" / "state"
    standin.write(state, [_CARD])
    return standin.environment(library, state)


def _containers(client: docker.DockerClient) -> list[str]:
    found = client.containers.list(all=True, filters={"label": f"ollama-manager.manager={_MANAGER_ID}"})
    return sorted(str(container.name) for container in found)


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ToolError, NoEngineError, AssertionError) as error:
        say(f"make demo: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("make demo: interrupted; nothing is left running")
        sys.exit(130)
