"""Builds the daemon's container image out of compose/Dockerfile and the pinned wheels: `make image`.

The build context (.build/image/) gets all wheels, so that the build itself needs no network. Packages are
those of requirements.lock without the ones for development.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import docker
from docker.errors import BuildError, DockerException

from manager import __version__

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = ROOT / ".build" / "image"
REPOSITORY = "ollama-endpoint-manager"

_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
# Newest glibc that a wheel may ask for: Debian 12 has 2.36, the default base a newer one.
_GLIBC_MINORS = range(17, 37)


class BuildFailedError(Exception):
    """The image cannot be built; the message says why."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make image", description=__doc__)
    parser.add_argument(
        "--base",
        default="python:3.13-slim",
        help="the image to build on (%(default)s); it has Python, pip and a shell",
    )
    parser.add_argument("--python", default="3.13", help="the version of Python in it (%(default)s)")
    parser.add_argument("--tag", default=f"{REPOSITORY}:latest", help="the image's name (%(default)s)")
    options = parser.parse_args()
    try:
        with closing(docker.from_env(use_context=False, timeout=600)) as client:
            built = build_image(client, base=options.base, python=options.python, tag=options.tag)
            client.images.get(built).tag(REPOSITORY, __version__)
    except DockerException as error:
        raise BuildFailedError(f"the Docker Engine said: {error}") from error
    print(built)
    return 0


def build_image(client: docker.DockerClient, *, base: str, python: str, tag: str) -> str:
    """Build the image in the engine of `client`; returns `tag`.

    Args:
        client: of an engine that has `base`, or can pull it.
        base: an image with Python, pip and a shell.
        python: the version of that Python, such as 3.13.
        tag: what the image is to be called.

    Raises:
        BuildFailedError: it could not be built; the message has the end of the output.
    """
    fill_context(python, str(client.version()["Arch"]))
    _say(f"building {tag} on {base} ...")
    try:
        client.images.build(path=str(CONTEXT), tag=tag, buildargs={"BASE": base}, rm=True, forcerm=True)
    except BuildError as error:
        output = "".join(str(line.get("stream", line.get("error", ""))) for line in error.build_log)
        tail = "\n".join(output.splitlines()[-25:])
        raise BuildFailedError(f"the image could not be built: {error}\n{tail}") from error
    return tag


def fill_context(python: str, architecture: str) -> None:
    """Write .build/image/: Dockerfile, requirements.txt, and wheels/ for that Python and architecture."""
    shutil.rmtree(CONTEXT, ignore_errors=True)
    wheels = CONTEXT / "wheels"
    wheels.mkdir(parents=True)
    shutil.copy(ROOT / "compose" / "Dockerfile", CONTEXT)
    machine = _ARCHITECTURES.get(architecture)
    if machine is None:
        raise BuildFailedError(f"no wheels for {architecture}; known: {', '.join(_ARCHITECTURES)}")
    uv = _uv()
    lock = CONTEXT / "requirements.txt"
    _say("collecting wheels ...")
    _run(
        *(uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-emit-index-url"),
        *(
            "--python-version",
            python,
            "--python-platform",
            f"{machine}-manylinux_2_36",
            "--only-binary=:all:",
        ),
        *("--generate-hashes", "--constraint", "requirements.lock"),
        *("--output-file", str(lock), "pyproject.toml"),
    )
    pip = _pip(uv)
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC_MINORS]
    _run(
        *(str(pip), "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--require-hashes"),
        *("--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"),
        *(f"--platform={platform}" for platform in [*platforms, f"manylinux2014_{machine}"]),
        *("--requirement", str(lock), "--dest", str(wheels)),
    )
    _run(uv, "build", "--quiet", "--wheel", "--out-dir", str(wheels), str(ROOT))
    for leftover in wheels.glob(".*"):
        leftover.unlink()


def _uv() -> str:
    """The uv that make has chosen, else one that is there."""
    for candidate in (os.environ.get("UV", ""), "uv", str(ROOT / ".build" / "uv" / "bin" / "uv")):
        if candidate and shutil.which(candidate, path=f"{os.environ.get('PATH', '')}:{ROOT}"):
            return candidate
    raise BuildFailedError("there is no uv; `make setup` brings one")


def _pip(uv: str) -> Path:
    """A Python with pip: uv has no `download`."""
    environment = ROOT / ".build" / "pip"
    python = environment / "bin" / "python"
    if not python.exists():
        _run(uv, "venv", "--quiet", "--seed", "--python", sys.executable, str(environment))
    return python


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(*command: str) -> None:
    result = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-25:])
        raise BuildFailedError(f"{' '.join(command[:4])} ... failed:\n{tail}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BuildFailedError as error:
        _say(f"make image: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
