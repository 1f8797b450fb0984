"""`ollama-manager up` with the simulated Ollama: for `make run` where Ollama's image is out of reach."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import docker
import yaml
from docker.utils import parse_repository_tag

from manager.cli.commands import up
from manager.cli.failures import explain
from manager.errors import ManagerError
from manager.settings import load_settings, packaged_templates
from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.tools.console import banner, say

if TYPE_CHECKING:
    from manager.settings import LoadedSettings, Settings

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build" / "run"

_OLLAMA = "ollama/ollama"


def main() -> None:
    with up.make_context("ollama-manager up", sys.argv[1:]) as context:
        given = context.params
    server = {"host": given["host"], "port": given["port"]}
    try:
        loaded = load_settings(given["config"], overrides={"server": server})
        environment = {**os.environ, **_with_the_simulated_ollama(loaded)}
    except ManagerError as error:
        sys.exit(explain(error))
    command = [sys.executable, "-m", "manager", "up", "--yes", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


def _with_the_simulated_ollama(loaded: LoadedSettings) -> dict[str, str]:
    """Return the environment of a daemon that uses the simulated Ollama."""
    say("building the simulated Ollama ...")
    with closing(docker.DockerClient(base_url=loaded.settings.engine.url)) as client:
        ensure_simulated_image(client)
    environment = _simulated(loaded.settings)
    banner(
        "SIMULATED OLLAMA",
        "",
        "The image of Ollama cannot be pulled from here, so a stand-in serves in its",
        "place. It has the models `tiny` and `minilm`, and answers are filler text.",
        "Try it with",
        f'  curl {_reached_at(loaded.settings)}/api/generate -d \'{{"model": "tiny", "prompt": "hi"}}\'',
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
        main()
    except KeyboardInterrupt:
        sys.exit(130)
