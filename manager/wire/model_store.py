"""Ollama's store of models on disk, read out of tar archives: manifests and config blobs, never model layers.

`manifests/HOST/NAMESPACE/MODEL/TAG` is a manifest. Newer versions keep it as a blob, with a link to it below
`manifests-v2`. Source: Ollama `manifest/manifest.go`, `manifest/paths.go`, `server/model_list_cache.go`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import tarfile
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from manager.domain.models import is_possible

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The first one counts where both name a model.
MANIFEST_FOLDERS = ("manifests-v2", "manifests")
BLOB_FOLDER = "blobs"
# More models than this are not listed at all: a part of a list would deny the others.
MAX_MODELS = 5000
# A manifest has about 0.2 KB a layer, and models for MLX have a layer for each tensor.
MAX_MANIFEST_BYTES = 2**20

_DEFAULT_HOST = "registry.ollama.ai"
_DEFAULT_NAMESPACE = "library"
_MANIFEST_LIST = "application/vnd.ollama.manifest.list.v2+json"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_MODEL_LAYER = "application/vnd.ollama.image.model"
# The order in which Ollama looks for a manifest of a list that it can run on Linux.
_RUNNERS = ("ollama", "llamacpp", "mlx")
_BLOB = re.compile(r"sha256[-:]([0-9a-fA-F]{64})")
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)")
_PATH_PARTS = 5
# Two empty blocks.
_END_OF_ARCHIVE = bytes(1024)


class UnreadableStoreError(Exception):
    """The archive is broken or out of bounds: nothing is known of the store."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One manifest in an archive.

    Attributes:
        name: of the model, as `ollama list` prints it.
        path: below the store.
        blob: the file name of the blob that holds the manifest, None where `content` is the manifest.
        content: the bytes of the file, empty for a link.
        modified_at: RFC 3339, to the second.
    """

    name: str
    path: str
    blob: str | None
    content: bytes
    modified_at: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The facts of a manifest that a list of models needs.

    Attributes:
        size_bytes: all layers together.
        config: the file name of the config blob, None without one.
        parent: what the model was made from, empty where that is unknown.
    """

    size_bytes: int
    config: str | None
    parent: str


@dataclass(frozen=True, slots=True)
class ManifestReference:
    """The manifest is in this blob."""

    blob: str


def manifest_files(archive: bytes, folder: str) -> tuple[ManifestFile, ...]:
    """Return the manifests in the tar archive of a folder of manifests, without those of impossible names.

    Raises:
        UnreadableStoreError: the archive is broken, or has more than `MAX_MODELS` manifests.
    """
    found: list[ManifestFile] = []
    if not archive.endswith(_END_OF_ARCHIVE):
        # An engine that fails half-way ends its answer in good order all the same.
        raise UnreadableStoreError("its archive has no end")
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                file = _manifest_file(tar, member, folder)
                if file is not None:
                    found.append(file)
                if len(found) > MAX_MODELS:
                    raise UnreadableStoreError(f"it has more than {MAX_MODELS} models")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UnreadableStoreError(f"its archive is broken ({error})") from error
    return tuple(found)


def only_file(archive: bytes) -> bytes | None:
    """Return the content of the one regular file in a tar archive, None where that is something else."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            member = tar.next()
            return None if member is None else _content(tar, member)
    except (tarfile.TarError, ValueError, EOFError):
        return None


def read_manifest(content: bytes) -> Manifest | ManifestReference | None:
    """Read a manifest, or choose one of a list of them; None where it makes no sense."""
    document = _document(content)
    if document is None:
        return None
    if document.get("mediaType") != _MANIFEST_LIST:
        return _manifest(document)
    listed = document.get("manifests")
    children = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    for runner in _RUNNERS:
        for child in children:
            if child.get("mediaType") in (None, "", _MANIFEST) and _text(child, "runner").lower() == runner:
                blob = None if "layers" in child or "config" in child else blob_name(child.get("digest"))
                return _manifest(child) if blob is None else ManifestReference(blob)
    return None


def digest_of(content: bytes) -> str:
    """Return the digest of a manifest, as a list of models has it."""
    return hashlib.sha256(content).hexdigest()


def blob_name(digest: object) -> str | None:
    """Return the file name of a blob below `blobs`, None where the digest is none."""
    match = _BLOB.fullmatch(digest) if isinstance(digest, str) else None
    return None if match is None else f"sha256-{match[1].lower()}"


def list_entry(
    file: ManifestFile, manifest: Manifest, digest: str, modified_at: str, config: bytes | None
) -> dict[str, Any] | None:
    """Return a model's entry of `/api/tags`; None where its config makes no sense, as Ollama leaves it out.

    Args:
        file: where the manifest was found.
        manifest: what it says.
        digest: of the manifest.
        modified_at: RFC 3339.
        config: the config blob; None where the manifest has none, or it was not read.
    """
    settings = {} if config is None else _document(config)
    if settings is None:
        return None
    families = settings.get("model_families")
    details: dict[str, Any] = {
        "parent_model": manifest.parent,
        "format": _text(settings, "model_format"),
        "family": _text(settings, "model_family"),
        "families": [str(one) for one in families] if isinstance(families, list) else None,
        "parameter_size": _text(settings, "model_type"),
        "quantization_level": _text(settings, "file_type"),
    }
    entry: dict[str, Any] = {"name": file.name, "model": file.name}
    for key in ("remote_model", "remote_host"):  # Go leaves out what is empty
        if value := _text(settings, key):
            entry[key] = value
    for key in ("context_length", "embedding_length"):
        if count := _count(settings.get(key)):
            details[key] = count
    return {
        **entry,
        "modified_at": modified_at,
        "size": manifest.size_bytes,
        "digest": digest,
        "details": details,
    }


def modified_at(stat: str) -> str | None:
    """Return the time in the header `X-Docker-Container-Path-Stat`, as Ollama writes it in a container.

    The archive itself has whole seconds only (moby `pkg/archive`). None where the header makes no sense.
    """
    try:
        document = json.loads(base64.b64decode(stat))
    except (binascii.Error, ValueError):
        return None
    text = document.get("mtime") if isinstance(document, dict) else None
    match = _TIME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    zone = "+00:00" if match[3] == "Z" else match[3]
    try:
        at = datetime.fromisoformat(match[1] + zone).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    fraction = (match[2] or "").rstrip("0").rstrip(".")
    return f"{at:%Y-%m-%dT%H:%M:%S}{fraction}Z"


# --- helpers, in call order ---


def _manifest_file(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: str) -> ManifestFile | None:
    parts = member.name.removeprefix("./").split("/")
    if len(parts) != _PATH_PARTS or parts[0] != folder:
        return None
    name = _shortest(*parts[1:])
    if not is_possible(name):
        return None
    at = datetime.fromtimestamp(member.mtime, UTC)
    path, modified = "/".join(parts), f"{at:%Y-%m-%dT%H:%M:%S}Z"
    if member.issym():
        blob = blob_name(member.linkname.rpartition("/")[2])
        return None if blob is None else ManifestFile(name, path, blob, b"", modified)
    content = _content(tar, member)
    return None if content is None else ManifestFile(name, path, None, content, modified)


def _shortest(host: str, namespace: str, model: str, tag: str) -> str:
    """Return the name as `ollama list` prints it (`types/model/name.go` DisplayShortest)."""
    if host.lower() != _DEFAULT_HOST:
        return f"{host}/{namespace}/{model}:{tag}"
    if namespace.lower() != _DEFAULT_NAMESPACE:
        return f"{namespace}/{model}:{tag}"
    return f"{model}:{tag}"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    if not member.isreg() or member.size > MAX_MANIFEST_BYTES:
        return None
    file = tar.extractfile(member)
    return None if file is None else file.read()


def _manifest(document: Mapping[str, Any]) -> Manifest | None:
    layers = document.get("layers")
    if not isinstance(layers, list):
        return None
    config = document.get("config")
    parts = [part for part in (*layers, config) if isinstance(part, dict)]
    return Manifest(
        size_bytes=sum(_count(part.get("size")) for part in parts),
        config=blob_name(config.get("digest")) if isinstance(config, dict) else None,
        parent=next(_parents(parts), ""),
    )


def _parents(layers: list[dict[str, Any]]) -> Iterator[str]:
    return (_text(layer, "from") for layer in layers if layer.get("mediaType") == _MODEL_LAYER)


def _document(content: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    return value if isinstance(value, str) else ""


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
