"""A store of models is read as Ollama would list it, whatever is in the archive."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire import model_store
from manager.wire.model_store import (
    Manifest,
    ManifestFile,
    ManifestReference,
    UnreadableStoreError,
    blob_name,
    digest_of,
    list_entry,
    manifest_files,
    modified_at,
    only_file,
    read_manifest,
)

HEX = "ab" * 32
V2 = "application/vnd.docker.distribution.manifest.v2+json"
LIST = "application/vnd.ollama.manifest.list.v2+json"
MODEL = "application/vnd.ollama.image.model"
LIBRARY = "manifests/registry.ollama.ai/library"


def archive(*members: tuple[str, bytes | str | None], mtime: int = 1_795_856_352) -> bytes:
    """A tar archive: bytes are a file, text is a link to that, None is a folder."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return raw.getvalue()


def names(*paths: str) -> list[str]:
    found = manifest_files(archive(*((f"manifests/{path}", b"{}") for path in paths)), "manifests")
    return [file.name for file in found]


# --- which models there are -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("registry.ollama.ai/library/qwen3/8b", "qwen3:8b"),
        ("registry.ollama.ai/library/tiny/latest", "tiny:latest"),
        ("Registry.Ollama.AI/Library/Tiny/Q4_K_M", "Tiny:Q4_K_M"),
        ("registry.ollama.ai/someone/tiny/latest", "someone/tiny:latest"),
        ("hf.co/bartowski/Llama-3.2-1B-GGUF/latest", "hf.co/bartowski/Llama-3.2-1B-GGUF:latest"),
        ("localhost:5000/library/tiny/1.0", "localhost:5000/library/tiny:1.0"),
    ],
)
def test_names_are_those_that_ollama_list_prints(path: str, name: str) -> None:
    assert names(path) == [name]


@pytest.mark.parametrize(
    "path",
    [
        "registry.ollama.ai/library/tiny",
        "registry.ollama.ai/library/tiny/latest/more",
        "registry.ollama.ai/library/tiny/.latest.123",
        "registry.ollama.ai/library/.DS_Store/latest",
        "registry.ollama.ai/library/ti ny/latest",
        "registry.ollama.ai/library//latest",
        "../library/tiny/latest",
    ],
)
def test_what_is_no_model_is_left_out_and_the_others_stay(path: str) -> None:
    assert names(path, "registry.ollama.ai/library/tiny/latest") == ["tiny:latest"]


def test_a_manifest_is_a_file_or_a_link_to_a_blob_and_nothing_else() -> None:
    found = manifest_files(
        archive(
            ("manifests", None),
            (f"{LIBRARY}/a", None),
            (f"{LIBRARY}/a/folder", None),
            (f"./{LIBRARY}/a/file", b"{}"),
            (f"{LIBRARY}/a/link", f"../../../../blobs/sha256-{HEX.upper()}"),
            (f"{LIBRARY}/a/elsewhere", "../../../../../../etc/shadow"),
            ("other/registry.ollama.ai/library/b/latest", b"{}"),
        ),
        "manifests",
    )
    assert found == (
        ManifestFile("a:file", f"{LIBRARY}/a/file", None, b"{}", "2026-11-28T08:59:12Z"),
        ManifestFile("a:link", f"{LIBRARY}/a/link", f"sha256-{HEX}", b"", "2026-11-28T08:59:12Z"),
    )


def test_a_manifest_that_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "MAX_MANIFEST_BYTES", 10)
    tar = archive((f"{LIBRARY}/a/x", b"0" * 10), (f"{LIBRARY}/a/y", b"0" * 11))
    assert [file.name for file in manifest_files(tar, "manifests")] == ["a:x"]
    assert only_file(archive(("y", b"0" * 11))) is None


def test_more_models_than_the_bound_are_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "MAX_MODELS", 2)
    members = [(f"{LIBRARY}/a/{tag}", b"{}") for tag in "xyz"]
    assert len(manifest_files(archive(*members[:2]), "manifests")) == 2
    with pytest.raises(UnreadableStoreError, match="more than 2 models"):
        manifest_files(archive(*members), "manifests")


@pytest.mark.parametrize("cut", [100, 512, 700, 1100, 1700, 2600])
def test_half_an_archive_is_no_list(cut: int) -> None:
    whole = archive((f"{LIBRARY}/a/x", b"{}" * 300), (f"{LIBRARY}/a/y", b"{}" * 300))
    with pytest.raises(UnreadableStoreError, match="no end"):
        manifest_files(whole[:cut], "manifests")


def test_a_file_that_is_longer_than_the_archive_makes_it_no_list() -> None:
    header = archive((f"{LIBRARY}/a/x", b"{}" * 5000))[:512]
    with pytest.raises(UnreadableStoreError, match="broken"):
        manifest_files(header + bytes(2048), "manifests")
    assert only_file(header + bytes(2048)) is None


@given(st.binary(max_size=2000))
def test_an_archive_that_makes_no_sense_is_no_list(raw: bytes) -> None:
    with suppress(UnreadableStoreError):
        assert manifest_files(raw + bytes(1024), "manifests") == ()
    assert only_file(raw) is None


def test_the_one_file_of_an_archive() -> None:
    assert only_file(archive(("latest", b"content"), ("more", b"x"))) == b"content"
    for wrong in (
        archive(("latest", None)),
        archive(("latest", "link")),
        archive(),
        archive(("x", b"y" * 600))[:700],
    ):
        assert only_file(wrong) is None


# --- manifests ------------------------------------------------------------------------------------


def layer(kind: str, size: object, **more: object) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{HEX}", "size": size, **more}


def raw(document: object) -> bytes:
    return json.dumps(document).encode()


def test_the_size_of_a_model_is_that_of_all_its_layers_and_the_config() -> None:
    document = {
        "schemaVersion": 2,
        "mediaType": V2,
        "config": layer("config", 485),
        "layers": [
            layer(MODEL, 760_000, **{"from": "base:7b"}),
            layer("license", 7),
            layer("x", True),
            "odd",
        ],
    }
    assert read_manifest(raw(document)) == Manifest(760_492, f"sha256-{HEX}", "base:7b")


def test_a_manifest_without_a_config_is_one() -> None:
    assert read_manifest(raw({"layers": []})) == Manifest(0, None, "")
    assert read_manifest(raw({"layers": [], "config": {"digest": "../../etc"}})) == Manifest(0, None, "")


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{", b"{}", b'{"layers":7}', b"\xff", b"[" * 100_000]
)
def test_a_manifest_that_makes_no_sense_is_none(content: bytes) -> None:
    assert read_manifest(content) is None


def test_of_a_list_of_manifests_the_one_for_this_machine_counts() -> None:
    def child(runner: str, **more: object) -> dict[str, Any]:
        return {"mediaType": V2, "runner": runner, **more}

    inline = child("llamacpp", layers=[layer(MODEL, 5)])
    of = [child("mlx", digest=f"sha256:{'c' * 64}"), inline, "odd"]
    assert read_manifest(raw({"mediaType": LIST, "manifests": of})) == Manifest(5, None, "")
    of.append(child("Ollama", digest=f"sha256:{HEX}"))
    assert read_manifest(raw({"mediaType": LIST, "manifests": of})) == ManifestReference(f"sha256-{HEX}")
    nested = {"mediaType": LIST, "runner": "ollama", "manifests": []}
    assert read_manifest(raw({"mediaType": LIST, "manifests": [nested]})) is None
    assert read_manifest(raw({"mediaType": LIST, "manifests": [child("ollama", digest="x")]})) is None
    assert read_manifest(raw({"mediaType": LIST, "manifests": 7})) is None


@pytest.mark.parametrize(
    ("digest", "name"),
    [
        (f"sha256:{HEX}", f"sha256-{HEX}"),
        (f"sha256-{HEX.upper()}", f"sha256-{HEX}"),
        (f"sha256:{HEX}0", None),
        (f"sha256:../{HEX[3:]}", None),
        ("", None),
        (None, None),
        (7, None),
    ],
)
def test_a_blob_has_the_name_of_its_digest_and_no_other(digest: object, name: str | None) -> None:
    assert blob_name(digest) == name


def test_the_digest_is_that_of_the_manifest_file() -> None:
    assert digest_of(b"{}\n") == hashlib.sha256(b"{}\n").hexdigest()


# --- entries --------------------------------------------------------------------------------------

FILE = ManifestFile("tiny:latest", f"{LIBRARY}/tiny/latest", None, b"", "2026-11-21T08:00:05Z")
CONFIG = {
    "model_format": "gguf",
    "model_family": "llama",
    "model_families": ["llama"],
    "model_type": "344K",
    "file_type": "F16",
    "architecture": "amd64",
    "rootfs": {"type": "layers"},
}


def entry(config: bytes | None, parent: str = "") -> dict[str, Any] | None:
    return list_entry(FILE, Manifest(760257, "x", parent), HEX, "2026-11-21T08:00:05.374443553Z", config)


def test_an_entry_has_the_keys_values_and_order_of_a_server_s() -> None:
    """As recorded from Ollama 0.24."""
    expected = {
        "name": "tiny:latest",
        "model": "tiny:latest",
        "modified_at": "2026-11-21T08:00:05.374443553Z",
        "size": 760257,
        "digest": HEX,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "344K",
            "quantization_level": "F16",
        },
    }
    assert json.dumps(entry(raw(CONFIG))) == json.dumps(expected)


def test_an_entry_has_what_newer_servers_add() -> None:
    remote = {"remote_model": "gpt-oss:120b", "remote_host": "https://ollama.com:443"}
    found = entry(raw({**CONFIG, **remote, "context_length": 4096, "embedding_length": 0}), parent="base")
    assert found is not None
    assert {key: found[key] for key in remote} == remote
    assert (found["details"]["context_length"], found["details"]["parent_model"]) == (4096, "base")
    assert "embedding_length" not in found["details"]


def test_details_that_are_unknown_or_odd_are_blank_as_go_writes_them() -> None:
    blank = {"parent_model": "", "format": "", "family": "", "families": None, "parameter_size": ""}
    for config in (None, b"{}", raw({"model_format": 7, "model_families": "x", "context_length": "y"})):
        found = entry(config)
        assert found is not None
        assert found["details"] == {**blank, "quantization_level": ""}


@pytest.mark.parametrize("config", [b"", b"null", b"{", b"\xff"])
def test_a_model_whose_config_is_corrupt_is_not_listed(config: bytes) -> None:
    assert entry(config) is None


# --- times ----------------------------------------------------------------------------------------


def stat(mtime: object) -> str:
    return base64.b64encode(raw({"name": "latest", "mode": 420, "mtime": mtime})).decode()


@pytest.mark.parametrize(
    ("mtime", "at"),
    [
        ("2026-11-21T08:00:05.374443553Z", "2026-11-21T08:00:05.374443553Z"),
        ("2026-11-21T08:00:05Z", "2026-11-21T08:00:05Z"),
        ("2026-11-21T08:00:05.500Z", "2026-11-21T08:00:05.5Z"),
        ("2026-11-21T01:00:05.000000001+02:00", "2026-11-20T23:00:05.000000001Z"),
        ("0001-01-01T00:00:00+14:00", None),
        ("2026-13-21T08:00:05Z", None),
        ("yesterday", None),
        (7, None),
    ],
)
def test_a_time_is_told_to_the_nanosecond_and_in_utc(mtime: object, at: str | None) -> None:
    assert modified_at(stat(mtime)) == at


@pytest.mark.parametrize(
    "header", ["", "!", "e30", base64.b64encode(b"[]").decode(), base64.b64encode(b"x").decode()]
)
def test_a_header_that_makes_no_sense_has_no_time(header: str) -> None:
    assert modified_at(header) is None
