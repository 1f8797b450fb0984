"""`make test-clients`: other people's clients, in several generations, through the gateway.

Installs them below `.build/clients` from PyPI, npm and the Go module proxy, which takes minutes the first
time, and runs `tests/clients`. Clients of a language whose tools are not on the PATH are left out. Not part
of `make test`: what the registries serve changes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.clients.others import CLIENTS, HOME, OLLAMA_VERSIONS, PROGRAMS, ROOT
from tests.tools.console import ToolError, say

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.clients.others import Client

# The server and its runners are C++: the command line is built without them where it can be.
_STUBS = {
    "server": 'package server\n\nimport (\n\t"errors"\n\t"net"\n)\n\n'
    'func Serve(net.Listener) error { return errors.New("no server here") }\n',
    "runner": 'package runner\n\nimport "errors"\n\n'
    'func Execute([]string) error { return errors.New("no runner here") }\n',
}


def main() -> int:
    HOME.mkdir(parents=True, exist_ok=True)
    for client in CLIENTS:
        _once(client.home, client.name, lambda home, client=client: _install(client, home))  # type: ignore[misc]
    for version in OLLAMA_VERSIONS:
        _once(
            HOME / f"ollama-{version}",
            f"the ollama command {version}",
            lambda home, version=version: _build_ollama(version, home),  # type: ignore[misc]
        )
    command = [sys.executable, "-m", "pytest", "tests/clients", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _once(home: Path, name: str, install: Callable[[Path], bool]) -> None:
    """Install into `home` unless that was done before; a stamp tells."""
    stamp = home / ".installed"
    if stamp.exists():
        return
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    say(f"make test-clients: installing {name}")
    if install(home):
        stamp.touch()
    else:
        say(f"make test-clients: {name} is left out")


def _install(client: Client, home: Path) -> bool:
    match client.program.rpartition(".")[2]:
        case "py":
            uv = os.environ.get("UV") or "uv"
            _run(uv, "venv", "--quiet", "--python", sys.executable, str(home), "--allow-existing")
            python = str(home / "bin" / "python")
            _run(uv, "pip", "install", "--quiet", "--python", python, *client.packages)
        case "mjs":
            if shutil.which("npm") is None:
                return False
            (home / "package.json").write_text('{"private": true}\n')
            _run("npm", "install", "--silent", "--no-audit", "--no-fund", *client.packages, cwd=home)
            for file in (client.program, "report.mjs"):
                shutil.copy(PROGRAMS / file, home)
        case _:
            if shutil.which("go") is None:
                return False
            _new_module(home, *client.packages)
            source = (PROGRAMS / client.program).read_text()
            (home / "main.go").write_text(
                source.replace('"MODULE', f'"{client.packages[0].partition("@")[0]}')
            )
            _run("go", "build", "-mod=mod", "-o", "client", ".", cwd=home)
    return True


def _build_ollama(version: str, home: Path) -> bool:
    if shutil.which("go") is None:
        return False
    module = "github.com/ollama/ollama"
    _new_module(home, f"{module}@{version}")
    found = _run("go", "mod", "download", "-json", f"{module}@{version}", cwd=home)
    source = home / "source"
    shutil.copytree(json.loads(found)["Dir"], source)
    _run("chmod", "-R", "u+w", str(source))
    for package, stub in _STUBS.items():
        for file in (source / package).glob("*.go"):
            file.unlink()
        (source / package / "stub.go").write_text(stub)
    _run("go", "build", "-mod=mod", "-o", str(home / "ollama"), ".", cwd=source)
    shutil.rmtree(source)
    return True


def _new_module(home: Path, *requirements: str) -> None:
    (home / "go.mod").write_text("module client\n\ngo 1.24\n")
    _run("go", "get", *requirements, cwd=home)


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(f"{' '.join(command)}:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolError as error:
        say(f"make test-clients: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
