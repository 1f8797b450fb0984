"""The models of the simulated Ollama: names, what is known of each, and where new ones are kept."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(
    rf"(?:(?:(?P<host>[A-Za-z0-9][A-Za-z0-9_.:-]*)/)?(?P<namespace>{_PART})/)?(?P<model>{_PART})(?::(?P<tag>{_PART}))?"
)
_IMAGE_MADE_AT = "2026-11-21T08:00:05.374443553Z"

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"


class BadNameError(Exception):
    """Not a model name."""


@dataclass(frozen=True, slots=True)
class Name:
    """A model name with the parts that may be left out filled in: `qwen3` and `qwen3:latest` are equal."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> Name:
        """Raises BadNameError."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise BadNameError(text)
        return cls(
            match["host"] or DEFAULT_HOST,
            match["namespace"] or DEFAULT_NAMESPACE,
            match["model"],
            match["tag"] or "latest",
        )

    @property
    def full(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def shortest(self) -> str:
        """The name as Ollama shows it."""
        return self.full.removeprefix(f"{DEFAULT_HOST}/").removeprefix(f"{DEFAULT_NAMESPACE}/")

    @property
    def key(self) -> str:
        """Equal for names that Ollama takes for the same: it does not tell upper from lower case."""
        return self.full.lower()

    @property
    def relative_path(self) -> Path:
        return Path(self.host, self.namespace, self.model, self.tag)


@dataclass(frozen=True, slots=True)
class Model:
    """What the API says of one model. `name` is its shortest form, `layer` the digest of its weights."""

    name: str
    digest: str
    layer: str
    size: int
    loaded_bytes: int
    family: str
    parameter_size: str
    context_length: int
    embedding: bool
    modified_at: str
    parent: str = ""
    system: str = ""

    @property
    def parsed(self) -> Name:
        return Name.parse(self.name)

    @property
    def details(self) -> dict[str, Any]:
        return {
            "parent_model": self.parent,
            "format": "gguf",
            "family": self.family,
            "families": [self.family],
            "parameter_size": self.parameter_size,
            "quantization_level": "F16",
        }


_TINY = Model(
    name="tiny:latest",
    digest="aa77da2f43cce6977953afdddbd6b4fc9a98687644bba8fff1074a062174ee69",
    layer="d6f3d2caa67f5ac5f7e102efb4a97cc52d3bc530cd6c6c9dab2820e3575aa103",
    size=760257,
    loaded_bytes=1475840,
    family="llama",
    parameter_size="344K",
    context_length=2048,
    embedding=False,
    modified_at=_IMAGE_MADE_AT,
)
_MINILM = Model(
    name="minilm:latest",
    digest="6cf97aa9ab2e7b3b0dc526238904e189ea5bf0076e1d102b61d21fa09e34caea",
    layer="797b70c4edf85907fe0a49eb85811256f65fa0f7bf52166b147fd16be2be4662",
    size=45949702,
    loaded_bytes=85149696,
    family="bert",
    parameter_size="22.57M",
    context_length=512,
    embedding=True,
    modified_at="2026-11-21T08:01:38.805136883Z",
)


class Library:
    """Built-in models and those on disk, which any server that shares the directory sees.

    A model made at run time is a manifest and a config blob, as Ollama writes them; what only the simulation
    needs is below `simulated` in the config. The layers do not exist. Nothing is cached: every listing reads
    the directory. Where it cannot be written, new models live in memory.
    """

    def __init__(self, directory: Path) -> None:
        self._manifests = directory / "manifests"
        self._blobs = directory / "blobs"
        self._built_in: dict[str, Model] = {}
        self._in_memory: dict[str, Model | None] = {}  # None hides a built-in model
        self._blobs_in_memory: set[str] = set()

    def set_built_in(self, names: str) -> None:
        """Take the list of the knob `models`. Raises BadNameError."""
        models = [described(item) for item in names.split(",") if item.strip()]
        self._built_in = {model.parsed.key: model for model in models}

    def all(self) -> list[Model]:
        """Newest first, as /api/tags lists them."""
        found: dict[str, Model | None] = {**self._built_in, **self._on_disk(), **self._in_memory}
        return sorted(
            (model for model in found.values() if model), key=lambda model: model.modified_at, reverse=True
        )

    def get(self, name: Name) -> Model | None:
        return next((model for model in self.all() if model.parsed.key == name.key), None)

    def put(self, model: Model) -> None:
        self._keep(model.parsed, model)

    def remove(self, name: Name) -> None:
        if name.key in self._built_in:
            self._keep(name, None)
            return
        (self._manifests / name.relative_path).unlink(missing_ok=True)
        self._in_memory.pop(name.key, None)

    def has_blob(self, digest: str) -> bool:
        return digest in self._blobs_in_memory or self._blob_path(digest).exists()

    def put_blob(self, digest: str, pieces: list[bytes]) -> None:
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._blob_path(digest).write_bytes(b"".join(pieces))
        except OSError:
            self._blobs_in_memory.add(digest)

    def _blob_path(self, digest: str) -> Path:
        return self._blobs / digest.replace(":", "-")

    def _keep(self, name: Name, model: Model | None) -> None:
        path = self._manifests / name.relative_path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_text(json.dumps(model and self._manifest(model)))
            partial.replace(path)
        except OSError:
            self._in_memory[name.key] = model

    def _on_disk(self) -> dict[str, Model | None]:
        found: dict[str, Model | None] = {}
        for folder, _, files in os.walk(self._manifests):
            for file in files:
                if file.startswith("."):
                    continue
                path = Path(folder, file)
                name = Name(*path.relative_to(self._manifests).parts)
                try:
                    found[name.key] = self._read(name, path)
                except FileNotFoundError:
                    continue  # deleted by another server meanwhile
        return found

    def _manifest(self, model: Model) -> dict[str, Any]:
        """Write the config blob of a model, and return its manifest."""
        only_here = ("layer", "loaded_bytes", "context_length", "embedding", "system")
        config = json.dumps(
            {
                "model_format": model.details["format"],
                "model_family": model.family,
                "model_families": model.details["families"],
                "model_type": model.parameter_size,
                "file_type": model.details["quantization_level"],
                "simulated": {key: value for key, value in asdict(model).items() if key in only_here},
            }
        ).encode()
        digest = f"sha256:{_sha256(config)}"
        self.put_blob(digest, [config])
        layer = {
            "mediaType": "application/vnd.ollama.image.model",
            "digest": f"sha256:{model.layer}",
            "size": model.size - len(config),
            **({"from": model.parent} if model.parent else {}),
        }
        return {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "digest": digest,
                "size": len(config),
            },
            "layers": [layer],
        }

    def _read(self, name: Name, path: Path) -> Model | None:
        content = path.read_bytes()
        manifest = json.loads(content)
        if manifest is None:
            return None
        (layer,) = manifest["layers"]
        config = json.loads(self._blob_path(manifest["config"]["digest"]).read_bytes())
        return Model(
            name=name.shortest,
            digest=_sha256(content),
            size=layer["size"] + manifest["config"]["size"],
            family=config["model_family"],
            parameter_size=config["model_type"],
            modified_at=timestamp(path.stat().st_mtime_ns),
            parent=layer.get("from", ""),
            **config["simulated"],
        )


def described(item: str) -> Model:
    """A model from an item of the knobs `models` and `pullable`. Raises BadNameError."""
    text, _, kind = item.strip().partition("=")
    name = Name.parse(text)
    template = _MINILM if kind == "embed" or name.model == "minilm" else _TINY
    if name.shortest == template.name:
        return template
    return renamed(template, name, _IMAGE_MADE_AT)


def renamed(model: Model, name: Name, modified_at: str, **changes: str) -> Model:
    """The same weights under another name, with digests that follow from the name."""
    values = (
        asdict(model)
        | {"name": name.shortest, "modified_at": modified_at, "digest": _digest(name.key)}
        | changes
    )
    return Model(**values)


def timestamp(moment_ns: int) -> str:
    """Nanoseconds since the epoch as Go's RFC 3339 does it: in UTC, without trailing zeros."""
    seconds, fraction = divmod(moment_ns, 1_000_000_000)
    digits = f".{fraction:09}".rstrip("0").rstrip(".")
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}{digits}Z"


def _sha256(content: bytes) -> str:
    import hashlib  # noqa: PLC0415 - most servers never need it, and it costs a start

    return hashlib.sha256(content).hexdigest()


def _digest(text: str) -> str:
    """64 hexadecimal digits that depend on `text` alone; not a real SHA-256, which would cost an import."""
    return "".join(f"{crc32(f'{text}/{index}'.encode()):08x}" for index in range(8))
