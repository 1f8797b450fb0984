"""`make run`: has an engine and the images ready, then becomes `ollama-manager serve`.

Where the Ollama image cannot be had, the simulated Ollama serves in its place, and that is said loudly.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import docker
import requests
import yaml
from docker.errors import DockerException, ImageNotFound
from docker.utils import parse_repository_tag
from urllib3.exceptions import HTTPError

from manager.errors import ConfigurationError
from manager.settings import Settings, load_settings, load_templates, packaged_templates
from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.tools.console import ToolError, banner, say
from tests.tools.system import provide_engine

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build" / "run"

# A pull that stands still for so long is given up: a registry that cannot be reached may never say so.
_NO_PROGRESS_S = 20
_OLLAMA = "ollama/ollama"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make run", add_help=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    known, _ = parser.parse_known_args()
    environment = dict(os.environ)
    try:
        given = {"server": {"host": known.host, "port": known.port}}
        settings = load_settings(known.config, overrides=given).settings
        images = {template.image for template in load_templates(settings).values()}
    except ConfigurationError:
        pass  # `serve` says what is wrong with it, and ends
    else:
        provide_engine(settings.engine.url, BUILD)
        environment |= _provide_images(settings, images)
    command = [sys.executable, "-m", "manager", "serve", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


def _provide_images(settings: Settings, images: set[str]) -> dict[str, str]:
    """Have the images in the engine; returns what the daemon's environment needs to get along without."""
    url = settings.engine.url
    with closing(docker.DockerClient(base_url=url)) as client:
        missing = [image for image in sorted(images) if not _has(client, image)]
        trouble = {image: why for image in missing if (why := _pull(url, image)) is not None}
        for image, why in trouble.items():
            say(f"{image} cannot be had: {why}")
        if not any(parse_repository_tag(image)[0] == _OLLAMA for image in trouble):
            return {}
        say("building the simulated Ollama ...")
        ensure_simulated_image(client)
    environment = _simulated(settings)
    banner(
        "SIMULATED OLLAMA",
        "",
        "The image of Ollama cannot be pulled from here, so a stand-in serves in its",
        "place. It has the models `tiny` and `minilm`, and answers are filler text.",
        "Try it with",
        f'  curl {_reached_at(settings)}/api/generate -d \'{{"model": "tiny", "prompt": "hi"}}\'',
        "`ollama-manager doctor` and `config show` see what this daemon sees after",
        *(f"  export {name}='{value}'" for name, value in environment.items()),
        "",
        "Once a registry can be reached, end this and say `make run` again.",
    )
    return environment


def _reached_at(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.server.host, settings.server.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{host}:{settings.server.port}"


def _has(client: docker.DockerClient, image: str) -> bool:
    try:
        client.images.get(image)
    except ImageNotFound:
        return False
    return True


def _pull(url: str, image: str) -> str | None:
    """Pull an image; why that did not work, None when it did."""
    say(f"pulling {image} ...")
    lines: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    # The SDK has no deadline for a pull; a thread that still waits ends when this program becomes the daemon.
    threading.Thread(target=_read_pull, args=(url, image, lines.put), daemon=True).start()
    layers: dict[str, tuple[int, int]] = {}
    said_at = time.monotonic()
    try:
        while (line := lines.get(timeout=_NO_PROGRESS_S)) is not None:
            if "error" in line:
                return str(line["error"])
            detail = line.get("progressDetail") or {}
            if line.get("status") == "Downloading" and detail.get("total"):
                layers[line["id"]] = (detail["current"], detail["total"])
            if layers and time.monotonic() - said_at > 1:
                done, total = (sum(column) for column in zip(*layers.values(), strict=True))
                say(f"  {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB")
                said_at = time.monotonic()
    except Empty:
        return f"no progress for {_NO_PROGRESS_S} s"
    return None


def _read_pull(url: str, image: str, put: Callable[[dict[str, Any] | None], None]) -> None:
    """Put every line of a pull, then None; an error is a line with the key `error`."""
    repository, tag = parse_repository_tag(image)
    try:
        with closing(docker.DockerClient(base_url=url)) as client:
            for line in client.api.pull(repository, tag or "latest", stream=True, decode=True):
                put(line)
            client.images.get(image)  # a pull that ends early says nothing
    except (DockerException, requests.RequestException, HTTPError) as error:
        put({"error": getattr(error, "explanation", None) or error})
    put(None)


def _simulated(settings: Settings) -> dict[str, str]:
    """The environment of a daemon that has the simulated Ollama in its templates.

    Models are on volumes of its own: the stand-in must not write among the real ones.
    """
    target = BUILD / "templates"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    source = settings.templates.dir or packaged_templates()
    volumes = set(settings.allow.volumes)
    for file in sorted(source.glob("*.y*ml")):
        template = yaml.safe_load(file.read_text(encoding="utf-8"))
        if parse_repository_tag(template["image"])[0] == _OLLAMA:
            template["image"] = IMAGE
            # A directory of the user's has no counterpart.
            named = [volume for volume in template.get("volumes", []) if "/" not in volume["source"]]
            template["volumes"] = [{**volume, "source": f"{volume['source']}-simulated"} for volume in named]
            volumes |= {volume["source"] for volume in template["volumes"]}
        (target / file.name).write_text(yaml.safe_dump(template, sort_keys=False), encoding="utf-8")
    return {
        "OLLAMA_MANAGER_TEMPLATES__DIR": str(target),
        "OLLAMA_MANAGER_ALLOW__VOLUMES": json.dumps(sorted(volumes)),
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolError as error:
        say(f"make run: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
