"""Container templates, and the limits that an operator sets for them."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from manager.domain.instance import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([bkmgt]?)(?:i?b)?", re.IGNORECASE)
_UNIT = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE_END = 2**63  # the engine counts in signed 64 bits


def parse_size(text: object) -> int:
    """Bytes from Docker's notation (`512m`, `8g`, a plain number): powers of 1024.

    Source of the notation: docker/go-units `RAMInBytes`.

    Raises:
        ValueError: not a size, not above zero, or more than the engine can count.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(str(text).strip())
        if match is None:
            raise ValueError("expected a size such as 512m or 8g")
        size = int(float(match[1]) * _UNIT[match[2].lower()])
    if not 0 < size < _SIZE_END:
        raise ValueError("expected a size above zero and below 8 EiB")
    return size


# The engine also spells a mount `source:target:mode`: a colon inside a path could smuggle in a second one.
_NOT_IN_A_PATH = re.compile(r"[\x00-\x1f\x7f:]")


def _absolute(path: str) -> str:
    """The path in one spelling, so that two spellings of one place cannot be taken for two places."""
    if not path.startswith("/") or ".." in path.split("/") or _NOT_IN_A_PATH.search(path):
        raise ValueError("expected an absolute path without '..', ':' and control characters")
    return str(PurePosixPath("/" + path.lstrip("/")))


# Mounting over these would replace the image's programs and what they are started with, or hand a container
# what its kernel is told by: as good as a key for a command, which a template does not have.
_SYSTEM_TARGETS = frozenset(
    "bin boot dev etc lib lib32 lib64 libx32 proc run sbin sys usr".split()  # noqa: SIM905
)
# An image may keep programs right in these; directories below them are free.
_SHARED_TARGETS = frozenset({"/", "/app", "/home", "/opt", "/root", "/var"})
_RUN = ("/var/run", "/var/lock")  # links to /run
_TARGET_RULE = (
    "expected a directory of its own, such as /root/.ollama, /models or /data: "
    f"none in {', '.join(sorted(f'/{name}' for name in _SYSTEM_TARGETS))} or {', '.join(_RUN)}, "
    f"and not {', '.join(sorted(_SHARED_TARGETS))} as a whole"
)


def _mount_target(path: str) -> str:
    first = PurePosixPath(path).parts[1:2]
    in_system = bool(first) and first[0] in _SYSTEM_TARGETS
    if in_system or path in _SHARED_TARGETS or any(_is_inside(path, directory) for directory in _RUN):
        raise ValueError(_TARGET_RULE)
    return path


def _is_inside(path: str, directory: str) -> bool:
    """Whether a path is a directory or lies below it."""
    return PurePosixPath(path).is_relative_to(directory)


# Docker's own rule for the names of volumes and networks (moby `daemon/names`).
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


def _mount_source(source: str) -> str:
    if source.startswith("/"):
        return _absolute(source)
    if _NAME.fullmatch(source) is None:
        raise ValueError("expected the name of a volume or an absolute path on the engine's host")
    return source


# Words that the engine reads as a mode, not as the name of a network; `host` would be a host namespace.
_NETWORK_MODES = ("default", "host", "none")


def _network(name: str) -> str:
    if _NAME.fullmatch(name) is None or name in _NETWORK_MODES:
        raise ValueError(f"expected the name of a network, and none of {', '.join(_NETWORK_MODES)}")
    return name


def _without_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("expected text without NUL")
    return value


def _environment(values: object) -> object:
    """YAML reads `1` and `true` as a number and a boolean; a container's environment knows only text."""
    if not isinstance(values, dict):
        return values
    return {
        key: str(value).lower()
        if isinstance(value, bool)
        else str(value)
        if isinstance(value, int | float)
        else value
        for key, value in values.items()
    }


Size = Annotated[int, BeforeValidator(parse_size)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]

# A name that contains `=` would reach the container as another name: `LD_PRELOAD=x` is then LD_PRELOAD.
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableValue = Annotated[str, AfterValidator(_without_nul)]

# Source of the grammar: distribution/reference, `[registry[:port]/]path[:tag][@digest]`.
_PATH = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
IMAGE_PATTERN = (
    rf"^(?:[a-zA-Z0-9][a-zA-Z0-9.-]*(?::[0-9]{{1,5}})?/)?{_PATH}(?:/{_PATH})*"
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?$"
)

_LEAST_MEMORY = 6 * 2**20  # moby `daemon/daemon_unix.go`, linuxMinMemory


def _memory(size: int) -> int:
    if size < _LEAST_MEMORY:
        raise ValueError("expected 6m or more")
    return size


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Volume(_Strict):
    """A mount: `source` is a named volume, or an absolute path on the engine's host (a bind)."""

    source: Annotated[str, AfterValidator(_mount_source)]
    target: Annotated[AbsolutePath, AfterValidator(_mount_target)]
    read_only: StrictBool = False

    @property
    def is_bind(self) -> bool:
        return self.source.startswith("/")


class ContainerLimits(_Strict):
    """Bounds of a container; `vram` is what admission must find free on the card before a start."""

    memory: Annotated[Size, AfterValidator(_memory)] | None = None
    pids: Annotated[int, Field(strict=True, ge=16)] | None = 512
    shm: Size | None = None
    vram: Size | None = None


class ReadyCheck(_Strict):
    path: Annotated[str, Field(pattern=r"^/[\x21-\x7e]*$")] = "/api/version"


class Template(_Strict):
    """One container template. There is on purpose no key for a command, privileges or random ports."""

    description: str = ""
    image: Annotated[str, Field(max_length=255, pattern=IMAGE_PATTERN)]
    device: DeviceKind
    env: Annotated[dict[VariableName, VariableValue], BeforeValidator(_environment)] = Field(
        default_factory=dict
    )
    volumes: tuple[Volume, ...] = ()
    network: Annotated[str, AfterValidator(_network)] = "ollama-manager"
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 11434
    reach: Literal["auto", "network", "loopback"] = "auto"
    limits: ContainerLimits = Field(default_factory=ContainerLimits)
    ready: ReadyCheck = Field(default_factory=ReadyCheck)


# What makes a container CPU-only even under `default-runtime: nvidia` and an image that asks for all GPUs.
CPU_ONLY_ENVIRONMENT = {
    "NVIDIA_VISIBLE_DEVICES": "void",
    "CUDA_VISIBLE_DEVICES": "-1",
    "OLLAMA_VULKAN": "0",
    "OLLAMA_LLM_LIBRARY": "cpu",
}

# On a GPU the binding of the instance decides which card is seen; a template must not have a say in it.
_BOUND_BY_INSTANCE = ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


class Refusal(BaseModel):
    """One thing in a template that is not allowed: where, and what would be."""

    model_config = ConfigDict(frozen=True)
    key: tuple[str | int, ...]
    message: str


def refusals(
    template: Template,
    *,
    images: Sequence[str],
    env: Sequence[str],
    networks: Sequence[str],
    volumes: Sequence[str],
    binds: Sequence[str],
    real: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Refusal]:
    """Everything in `template` that the allow-lists (glob patterns; `binds` as `DIR` or `DIR:rw`) refuse.

    `real` has what paths of the host lead to, where that is known: binds are compared by it.
    """
    if not image_allowed(template.image, images):
        yield Refusal(key=("image",), message=_not_allowed(template.image, "allow.images", images))
    if not _matches(template.network, networks):
        yield Refusal(key=("network",), message=_not_allowed(template.network, "allow.networks", networks))
    for name, value in template.env.items():
        if not _matches(name, env):
            yield Refusal(key=("env", name), message=_not_allowed(name, "allow.env", env))
        elif message := _contradiction(template.device, name, value):
            yield Refusal(key=("env", name), message=message)
    yield from _volume_refusals(template.volumes, volumes=volumes, binds=binds, real=real)
    if template.limits.vram is not None and template.device is DeviceKind.CPU:
        yield Refusal(key=("limits", "vram"), message="a template for the CPU needs no GPU memory")


def _volume_refusals(
    mounts: Sequence[Volume], *, volumes: Sequence[str], binds: Sequence[str], real: Mapping[str, str]
) -> Iterator[Refusal]:
    targets: set[str] = set()
    for index, volume in enumerate(mounts):
        if volume.target in targets:
            yield Refusal(key=("volumes", index, "target"), message=f"{volume.target!r} is mounted twice")
        targets.add(volume.target)
        if volume.is_bind:
            message = _bind_refusal(volume, binds, real)
        elif _matches(volume.source, volumes):
            message = None
        else:
            message = _not_allowed(volume.source, "allow.volumes", volumes)
        if message:
            yield Refusal(key=("volumes", index, "source"), message=message)


def image_allowed(image: str, images: Sequence[str]) -> bool:
    """Whether the operator's patterns allow an image, by the same rules for templates and for pulls."""
    return _matches(_tagged(image), images)


def _tagged(image: str) -> str:
    """`repo` means `repo:latest`, to the engine and so to the allow-list."""
    name = image.rsplit("/", 1)[-1]
    return image if ":" in name or "@" in name else f"{image}:latest"


def _matches(value: str, patterns: Sequence[str]) -> bool:
    """`*` and `?` stay inside one step of a path: `ollama:*` must not allow the registry `ollama:5000/…`."""
    steps = value.split("/")
    return any(
        len(steps) == len(wanted) and all(map(fnmatchcase, steps, wanted))
        for wanted in (pattern.split("/") for pattern in patterns)
    )


def _not_allowed(value: str, key: str, patterns: Sequence[str]) -> str:
    return f"{value!r} is not in {key}; allowed: {', '.join(patterns) or 'nothing'}"


def _contradiction(device: DeviceKind, name: str, value: str) -> str | None:
    if device is DeviceKind.CPU and value != CPU_ONLY_ENVIRONMENT.get(name, value):
        return f"{value!r} contradicts device: cpu, which sets {name}={CPU_ONLY_ENVIRONMENT[name]}"
    if device is DeviceKind.GPU and name in _BOUND_BY_INSTANCE:
        return "which GPU is seen is decided by the instance's device, not by a template"
    return None


def _bind_refusal(volume: Volume, binds: Sequence[str], real: Mapping[str, str]) -> str | None:
    """A bind is allowed inside an allowed directory, and for writing only where that says `:rw`."""
    source = real.get(volume.source, volume.source)
    writable = False
    inside = False
    for entry in binds:
        directory, _, mode = entry.partition(":")
        if _is_inside(source, real.get(directory, directory)):
            inside = True
            writable = writable or mode == "rw"
    if not inside:
        if source != volume.source:
            allowed = ", ".join(binds) or "nothing"
            return f"{volume.source!r} leads to {source!r}, which is not in allow.binds; allowed: {allowed}"
        return _not_allowed(source, "allow.binds", binds)
    if not writable and not volume.read_only:
        return f"{volume.source!r} is allowed for reading only: set read_only: true, or allow it with ':rw'"
    return None


# Directories of a host that no model lies in. A container that gets one can read what protects the host or,
# with `:rw`, replace its programs.
_HOST_DIRECTORIES = {
    "/bin": "the host's programs",
    "/boot": "the host's kernel",
    "/dev": "the host's devices",
    "/etc": "the host's configuration",
    "/lib": "the host's libraries",
    "/lib64": "the host's libraries",
    "/proc": "the host's processes",
    "/root": "the files of the host's root",
    "/run": "the sockets of the host's services",
    "/sbin": "the host's programs",
    "/sys": "the host's kernel",
    "/usr": "the host's programs",
    "/var/lib/containerd": "the engine's own files",
    "/var/lib/containers": "the engine's own files",
    "/var/lib/docker": "the engine's own files",
    "/var/run": "the sockets of the host's services",
}
# Of these, a part is as bad as the whole.
_KERNEL = ("/dev", "/proc", "/sys")


def bind_dangers(
    binds: Sequence[str], *, private: Mapping[str, str], real: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """A sentence for each entry of `allow.binds` that opens to templates what they should not have.

    Args:
        binds: the entries, `DIR` or `DIR:rw`.
        private: paths of this installation that no container should have, with what each is.
        real: as for `refusals`.
    """
    known = _HOST_DIRECTORIES | dict(private)
    for entry in binds:
        directory = str(PurePosixPath(entry.partition(":")[0]))
        names = {directory, real.get(directory, directory)}
        if any(set(PurePosixPath(name).parts) <= {"/", "//"} for name in names):
            opened = ["the whole file system of the host"]
        else:
            opened = [
                what
                for path, what in known.items()
                if any(
                    _is_inside(each, name) or (path in _KERNEL and _is_inside(name, path))
                    for name in names
                    for each in (path, real.get(path, path))
                )
            ]
        if opened:
            yield f"allow.binds: {entry!r} lets templates mount {', '.join(dict.fromkeys(opened))}"
