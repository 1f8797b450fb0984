"""Builds the Docker image of the simulated Ollama out of what is on this machine: no registry, no Dockerfile.

The image has the running Python interpreter, the modules that the server imports and the libraries both are
linked with. `python -m tests.simulated.image` puts it into the engine that DOCKER_HOST names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import marshal
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import docker
from docker.errors import ImageNotFound

from tests.simulated.launcher import launcher

if TYPE_CHECKING:
    from types import CodeType

REPOSITORY = "ollama-manager/simulated"
TAG = "0.24.0"
IMAGE = f"{REPOSITORY}:{TAG}"
CONTENT_LABEL = "ollama-manager.simulated.content"

_SOURCES = Path(__file__).parent
_NOT_IN_THE_IMAGE = frozenset({"image.py", "launcher.py"})
_PACKAGE = "usr/lib/ollama/simulated"
_STDLIB = f"usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"

_SCRIPT_PATH = "usr/lib/ollama/ollama"
_SCRIPT = """\
#!/usr/bin/python3 -IS
import sys
sys.path.insert(0, "/usr/lib/ollama")
from simulated.ollama import main
sys.exit(main())
"""

_CHANGES = [
    'ENTRYPOINT ["/bin/ollama"]',
    'CMD ["serve"]',
    "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "ENV HOME=/root",
    "ENV OLLAMA_HOST=0.0.0.0:11434",
    "ENV NVIDIA_VISIBLE_DEVICES=all",
    "ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    "EXPOSE 11434",
]
"""What the real image sets, so that a template meets the same traps."""

# ssl and the OpenSSL hashes are left out: asyncio and hashlib do without them, and the image is half the
# size.
_LIST_MODULES = """
import sys, json
sys.modules["ssl"] = sys.modules["_ssl"] = sys.modules["_hashlib"] = None
sys.path.insert(0, {path!r})
import encodings.utf_8, encodings.latin_1, encodings.ascii, encodings.idna, hashlib, socket, traceback
import simulated.ollama, simulated.server
files = {{}}
for name, module in sorted(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and not name.startswith(("simulated", "__main__")):
        files[name] = file
print(json.dumps(files))
"""


def ensure_simulated_image(client: docker.DockerClient) -> str:
    """Have the image in the engine of `client`; returns its name. Does nothing if the same content is there.

    Raises docker.errors.APIError when the engine refuses it, RuntimeError when the interpreter cannot be
    taken along.
    """
    content = _content_hash()
    try:
        if client.images.get(IMAGE).labels.get(CONTENT_LABEL) == content:
            return IMAGE
    except ImageNotFound:
        pass
    client.api.import_image_from_data(
        build_archive(),
        repository=REPOSITORY,
        tag=TAG,
        changes=[*_CHANGES, f"LABEL {CONTENT_LABEL}={content}"],
    )
    try:
        client.images.get(IMAGE)  # an import that failed says so in its output alone
    except ImageNotFound:
        client.images.get(f"{REPOSITORY}:latest").tag(REPOSITORY, TAG)  # Podman 4.3 leaves the tag out
    return IMAGE


def build_archive() -> bytes:
    """The root file system as a tar archive."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for folder in ("tmp", "root", "root/.ollama", "proc", "sys", "dev", "etc", "run", "var", "var/tmp"):
            _add_folder(tar, folder, 0o1777 if folder.endswith("tmp") else 0o755)
        _add(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
        _add(tar, "etc/group", b"root:x:0:\nnogroup:x:65534:\n")
        _add(tar, "etc/nsswitch.conf", b"hosts: files dns\n")
        program = launcher(f"/{_SCRIPT_PATH}")
        _add(tar, _SCRIPT_PATH, _SCRIPT.encode(), 0o755)
        _add(tar, "bin/ollama", program or _SCRIPT.encode(), 0o755)
        _add_sources(tar)
        binaries = [Path(sys.executable).resolve(), *_add_stdlib(tar)]
        _add(tar, "usr/bin/python3", _stripped(binaries[0]), 0o755)
        for target, source in _libraries(binaries).items():
            _add(tar, target.lstrip("/"), _stripped(source), 0o755)
    return archive.getvalue()


def _content_hash() -> str:
    """Changes with whatever the archive is made from: the sources, this file and the interpreter."""
    hashed = hashlib.sha256(f"{sys.version} {sys.base_prefix} {_CHANGES}".encode())
    for path in sorted(_SOURCES.glob("*.py")):
        hashed.update(path.name.encode() + path.read_bytes())
    return hashed.hexdigest()


def _add_sources(tar: tarfile.TarFile) -> None:
    """The server, with its source for tracebacks and compiled for a quick start."""
    for path in sorted(_SOURCES.glob("*.py")):
        if path.name in _NOT_IN_THE_IMAGE:
            continue
        source = path.read_bytes()
        code = compile(source, f"/{_PACKAGE}/{path.name}", "exec", dont_inherit=True)
        _add(tar, f"{_PACKAGE}/{path.name}", source)
        cached = f"__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc"
        _add(tar, f"{_PACKAGE}/{cached}", _as_pyc(code, source))


def _add_stdlib(tar: tarfile.TarFile) -> list[Path]:
    """The modules that the server imports, compiled, without source; returns the shared objects."""
    extensions = []
    for name, file in _imported_modules().items():
        path = Path(file)
        if path.suffix != ".py":
            _add(tar, f"{_STDLIB}/lib-dynload/{path.name}", _stripped(path), 0o755)
            extensions.append(path)
            continue
        target = name.replace(".", "/") + ("/__init__.pyc" if path.name == "__init__.py" else ".pyc")
        source = path.read_bytes()
        code = compile(source, f"/{_STDLIB}/{target[:-1]}", "exec", dont_inherit=True)
        _add(tar, f"{_STDLIB}/{target}", _as_pyc(code, source))
    _add_folder(tar, f"{_STDLIB}/lib-dynload", 0o755)  # the interpreter looks for it, even when it is empty
    return extensions


def _imported_modules() -> dict[str, str]:
    """The server's part of the standard library, file by module: what a bare interpreter imports."""
    script = _LIST_MODULES.format(path=str(_SOURCES.parent))
    # Frozen copies of modules have no file; the image needs `os` and its like as files to find its own
    # prefix.
    command = [sys.executable, "-IS", "-X", "frozen_modules=off", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"cannot tell which modules the simulated Ollama needs:\n{result.stderr}")
    modules: dict[str, str] = json.loads(result.stdout)
    modules["os"] = str(Path(sysconfig.get_path("stdlib"), "os.py"))
    return modules


def _as_pyc(code: CodeType, source: bytes) -> bytes:
    """Compiled code that is used as it is: its header says not to check it against a source."""
    unchecked_hash = (1).to_bytes(4, "little")
    header = importlib.util.MAGIC_NUMBER + unchecked_hash + importlib.util.source_hash(source)
    return header + marshal.dumps(code)


def _libraries(binaries: list[Path]) -> dict[str, Path]:
    """The loader at its own path and all linked libraries beside libc, where the loader looks by itself."""
    output = "".join(_ldd(path) for path in binaries)
    found = dict(re.findall(r"^\s*(\S+) => (/\S+)", output, re.MULTILINE))
    loaders = set(re.findall(r"^\s*(/\S*ld-\S+) \(0x", output, re.MULTILINE))
    if not loaders or not found:
        raise RuntimeError(
            f"{sys.executable} is not a dynamically linked program that ldd understands:\n{output}"
        )
    folder = str(Path(next(path for name, path in found.items() if name.startswith("libc."))).parent)
    libraries = {f"{folder}/{name}": Path(path) for name, path in found.items()}
    return libraries | {loader: Path(loader) for loader in loaders}


def _ldd(path: Path) -> str:
    return subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout


def _stripped(path: Path) -> bytes:
    """A binary without its symbols, where `strip` is installed: they can be most of a Python."""
    strip = shutil.which("strip")
    if strip is None:
        return path.read_bytes()
    with tempfile.NamedTemporaryFile() as copy:
        result = subprocess.run(
            [strip, "--strip-unneeded", "-o", copy.name, str(path)], capture_output=True, check=False
        )
        return Path(copy.name).read_bytes() if result.returncode == 0 else path.read_bytes()


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


def _add_folder(tar: tarfile.TarFile, name: str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)


if __name__ == "__main__":
    sys.stdout.write(ensure_simulated_image(docker.from_env(use_context=False)) + "\n")
