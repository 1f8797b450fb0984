"""What a container template may say, and what an operator allows templates to ask for."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from manager.domain.instance import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", re.IGNORECASE)
_UNIT = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: object) -> int:
    """Bytes from Docker's notation (`512m`, `8g`, a plain number): powers of 1024.

    Source of the notation: docker/go-units `RAMInBytes`.

    Raises:
        ValueError: not a size, or not above zero.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(str(text).strip())
        if match is None:
            raise ValueError("expected a size such as 512m or 8g")
        size = int(float(match[1]) * _UNIT[match[2].lower()])
    if size <= 0:
        raise ValueError("a size must be above zero")
    return size


def _absolute(path: str) -> str:
    if not PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("expected an absolute path without '..'")
    return path


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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Volume(_Strict):
    """A mount: `source` is a named volume, or an absolute path on the engine's host (a bind)."""

    source: Annotated[str, Field(min_length=1)]
    target: AbsolutePath
    read_only: bool = False

    @property
    def is_bind(self) -> bool:
        return self.source.startswith("/")


class ContainerLimits(_Strict):
    """Bounds of a container; `vram` is what admission must find free on the card before a start."""

    memory: Size | None = None
    pids: Annotated[int, Field(ge=16)] | None = 512
    shm: Size | None = None
    vram: Size | None = None


class ReadyCheck(_Strict):
    path: Annotated[str, Field(pattern=r"^/[\x21-\x7e]*$")] = "/api/version"


class Template(_Strict):
    """One container template. There is on purpose no key for a command, privileges or random ports."""

    description: str = ""
    image: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._/:@-]*$")]
    device: DeviceKind
    env: Annotated[dict[str, str], BeforeValidator(_environment)] = Field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    network: Annotated[str, Field(min_length=1)] = "ollama-manager"
    port: Annotated[int, Field(ge=1, le=65535)] = 11434
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
) -> Iterator[Refusal]:
    """Everything in `template` that the allow-lists (glob patterns; `binds` as `DIR` or `DIR:rw`) refuse."""
    if not _matches(_tagged(template.image), images):
        yield Refusal(key=("image",), message=_not_allowed(template.image, "allow.images", images))
    if not _matches(template.network, networks):
        yield Refusal(key=("network",), message=_not_allowed(template.network, "allow.networks", networks))
    for name, value in template.env.items():
        if not _matches(name, env):
            yield Refusal(key=("env", name), message=_not_allowed(name, "allow.env", env))
        elif message := _contradiction(template.device, name, value):
            yield Refusal(key=("env", name), message=message)
    yield from _volume_refusals(template.volumes, volumes=volumes, binds=binds)
    if template.limits.vram is not None and template.device is DeviceKind.CPU:
        yield Refusal(key=("limits", "vram"), message="a template for the CPU needs no GPU memory")


def _volume_refusals(
    mounts: Sequence[Volume], *, volumes: Sequence[str], binds: Sequence[str]
) -> Iterator[Refusal]:
    targets: set[str] = set()
    for index, volume in enumerate(mounts):
        if volume.target in targets:
            yield Refusal(key=("volumes", index, "target"), message=f"{volume.target!r} is mounted twice")
        targets.add(volume.target)
        if volume.is_bind:
            message = _bind_refusal(volume, binds)
        elif _matches(volume.source, volumes):
            message = None
        else:
            message = _not_allowed(volume.source, "allow.volumes", volumes)
        if message:
            yield Refusal(key=("volumes", index, "source"), message=message)


def _tagged(image: str) -> str:
    """`repo` means `repo:latest`, to the engine and so to the allow-list."""
    name = image.rsplit("/", 1)[-1]
    return image if ":" in name or "@" in name else f"{image}:latest"


def _matches(value: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns)


def _not_allowed(value: str, key: str, patterns: Sequence[str]) -> str:
    return f"{value!r} is not in {key}; allowed: {', '.join(patterns) or 'nothing'}"


def _contradiction(device: DeviceKind, name: str, value: str) -> str | None:
    if device is DeviceKind.CPU and value != CPU_ONLY_ENVIRONMENT.get(name, value):
        return f"{value!r} contradicts device: cpu, which sets {name}={CPU_ONLY_ENVIRONMENT[name]}"
    if device is DeviceKind.GPU and name in _BOUND_BY_INSTANCE:
        return "which GPU is seen is decided by the instance's device, not by a template"
    return None


def _bind_refusal(volume: Volume, binds: Sequence[str]) -> str | None:
    """A bind is allowed inside an allowed directory, and for writing only where that says `:rw`."""
    source = PurePosixPath(volume.source)
    if ".." in source.parts:
        return f"{volume.source!r} contains '..'"
    writable = False
    inside = False
    for entry in binds:
        directory, _, mode = entry.partition(":")
        if source == PurePosixPath(directory) or PurePosixPath(directory) in source.parents:
            inside = True
            writable = writable or mode == "rw"
    if not inside:
        return _not_allowed(volume.source, "allow.binds", binds)
    if not writable and not volume.read_only:
        return f"{volume.source!r} is allowed for reading only: set read_only: true, or allow it with ':rw'"
    return None
