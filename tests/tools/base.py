"""A base image with Python, pip and a shell, made of what is on this machine: for where no registry is.

Made the way the image of the simulated Ollama is (tests/simulated/image.py), with the whole standard library.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from manager.cli.machine import which
from tests.simulated.image import _add, _add_folder, _libraries
from tests.tools.console import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import docker

REPOSITORY = "ollama-manager/python"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TAG = f"{PYTHON}-local"
BASE = f"{REPOSITORY}:{TAG}"

# A Python of the distribution looks for its parts below /usr and nowhere else; others go to /usr/local.
_PREFIX = "usr" if sys.base_prefix == "/usr" else "usr/local"
_STDLIB = f"{_PREFIX}/lib/python{PYTHON}"
# What the Dockerfile's commands are; `sh` comes from whatever shell /bin/sh is.
_PROGRAMS = ("sh", "install", "rm")
_FOR_WHEELS = (
    *("libgcc_s.so.1", "libstdc++.so.6", "libm.so.6", "libdl.so.2", "librt.so.1"),
    *("libpthread.so.0", "libutil.so.1", "libresolv.so.2"),
)
_UNUSED = re.compile(
    r"(^|/)(test|tests|idle_test|idlelib|tkinter|turtledemo|lib2to3|ensurepip|site-packages|dist-packages"
    r"|config-[^/]*|__pycache__|EXTERNALLY-MANAGED)(/|$)|\.a$"
)


def ensure_python_image(client: docker.DockerClient) -> str:
    """Have the base image in the engine of `client`; returns its name."""
    if not any(BASE in (image.tags or ()) for image in client.images.list(name=REPOSITORY)):
        client.api.import_image_from_data(
            build_archive(),
            repository=REPOSITORY,
            tag=TAG,
            changes=["ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin", "CMD python3"],
        )
        client.images.get(BASE)  # an import that failed says so in its output alone
    return BASE


def build_archive() -> bytes:
    """The root file system as a tar archive."""
    interpreter = Path(os.path.realpath(sys.executable))
    programs = {name: _program(name) for name in _PROGRAMS}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        for folder in ("tmp", "root", "proc", "sys", "dev", "etc", "run", "var", "var/lib", "var/tmp"):
            _add_folder(tar, folder, 0o1777 if folder.endswith("tmp") else 0o755)
        _add(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
        _add(tar, "etc/group", b"root:x:0:\nnogroup:x:65534:\n")
        _add(tar, "etc/nsswitch.conf", b"hosts: files dns\n")
        for name, path in programs.items():
            _add(tar, f"bin/{name}", path.read_bytes(), 0o755)
        for name in (f"python{PYTHON}", "python3"):
            _add(tar, f"{_PREFIX}/bin/{name}", interpreter.read_bytes(), 0o755)
        extensions = []
        for name, path in _standard_library():
            tar.add(path, f"{_STDLIB}/{name}", recursive=False, filter=_of_root)
            if path.suffix == ".so":
                extensions.append(path)
        _add_pip(tar)
        libraries = _libraries([interpreter, *programs.values(), *extensions])
        for target, source in (libraries | _for_wheels(libraries)).items():
            _add(tar, target.lstrip("/"), source.read_bytes(), 0o755)
    return archive.getvalue()


def _for_wheels(libraries: Mapping[str, Path]) -> dict[str, Path]:
    """The libraries that compiled wheels may take for granted (PEP 600), beside libc."""
    (libc,) = (Path(name) for name in libraries if Path(name).name == "libc.so.6")
    wanted = (libc.with_name(name) for name in _FOR_WHEELS)
    return {str(path): path for path in wanted if path.exists()}


def _program(name: str) -> Path:
    found = which(name)
    if found is None:
        raise ToolError(f"there is no {name} on this machine to make an image with")
    return Path(found).resolve()


def _standard_library() -> Iterator[tuple[str, Path]]:
    folder = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not _UNUSED.search(name):
            yield name, path


def _add_pip(tar: tarfile.TarFile) -> None:
    """The pip that comes with the interpreter: a new environment has it, without any network."""
    packages = "usr/lib/python3/dist-packages" if _PREFIX == "usr" else f"{_STDLIB}/site-packages"
    with tempfile.TemporaryDirectory() as environment:
        python = getattr(sys, "_base_executable", sys.executable)
        result = subprocess.run(
            [python, "-m", "venv", environment], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise ToolError(f"{python} -m venv failed: {result.stdout}{result.stderr}")
        (source,) = Path(environment, "lib").glob("python*/site-packages")
        for path in sorted(source.glob("pip*/**/*")):
            if path.is_file() and "__pycache__" not in path.parts:
                tar.add(path, f"{packages}/{path.relative_to(source)}", recursive=False, filter=_of_root)


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry
