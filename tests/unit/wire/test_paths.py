"""One spelling for every path: what is equivalent becomes equal, and nothing becomes another route."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.paths import Target, decoded, normalised, read_target
from manager.wire.routes import INFERENCE

SEGMENTS = [
    b"",
    b".",
    b"..",
    b"a",
    b"%2e",
    b"%2E%2e",
    b"%2F",
    b"%2f..%2f",
    b"%",
    b"%6",
    b"%61",
    b"%%361",
    b"x",
]
paths = st.lists(st.sampled_from(SEGMENTS) | st.binary(max_size=4), max_size=8).map(
    lambda parts: b"/" + b"/".join(parts)
)


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        (b"/", b"/"),
        (b"", b"/"),
        (b"//", b"/"),
        (b"/api/tags", b"/api/tags"),
        (b"/api/tags/", b"/api/tags"),
        (b"//api///tags//", b"/api/tags"),
        (b"/api/%63hat", b"/api/chat"),
        (b"/%61%70%69/%7e%2d%2E%5f", b"/api/~-._"),
        (b"/api/./tags", b"/api/tags"),
        (b"/healthz/../readyz", b"/readyz"),
        (b"/healthz/%2e%2E/readyz", b"/readyz"),
        (b"/../../x", b"/x"),
        (b"/a/b/..", b"/a"),
        (b"/.../..a/.b", b"/.../..a/.b"),
        (b"/healthz%2f..%2freadyz", b"/healthz%2F..%2Freadyz"),
        (b"/api%2fchat", b"/api%2Fchat"),
        (b"/%2e%2e%2fx", b"/..%2Fx"),
        (b"/%252e%252e/x", b"/%252e%252e/x"),
        (b"/%zz%", b"/%25zz%25"),
        (b"/%%361", b"/%2561"),
        (b"/a\xff\\b c", b"/a%FF%5Cb%20c"),
        (b"/api/blobs/sha256:00", b"/api/blobs/sha256:00"),
        (b"/api/v1/collections/", b"/api/v1/collections"),
        (b"/api/v1/./collections//", b"/api/v1/collections"),
        (b"/api/v1/collections/docs/", b"/api/v1/collections/docs/"),
        (b"//api/v1/%63ollections/docs/items/..", b"/api/v1/collections/docs/items/%2E%2E"),
        (b"/api/v1/collections/docs/items/%2e", b"/api/v1/collections/docs/items/%2E"),
        (b"/api/v1/collections/../keys", b"/api/v1/collections/%2E%2E/keys"),
        (b"/api/v1/collections//docs", b"/api/v1/collections//docs"),
        (b"/key/om/api/v1/collections/docs/items/..", b"/key/om/api/v1/collections/docs/items/%2E%2E"),
        (b"/x/api/v1/collections/docs/..", b"/x/api/v1/collections"),
        (b"/api/v1/collections/docs/items/a%2fb%252F", b"/api/v1/collections/docs/items/a%2Fb%252F"),
    ],
)
def test_a_path_has_one_normal_form(path: bytes, normal: bytes) -> None:
    assert normalised(path) == normal


@given(paths)
def test_the_normal_form_is_normal_and_hides_nothing(path: bytes) -> None:
    normal = normalised(path)
    assert normalised(normal) == normal
    assert normal.startswith(b"/")
    segments = normal.split(b"/")[1:]
    assert not {b".", b".."} & set(segments)
    assert normal == b"/" or b"" not in segments
    text = decoded(normal)
    assert text.count("/") == normal.count(b"/")
    assert not {".", ".."} & set(text.split("/"))


@given(paths)
def test_below_collections_no_segment_is_a_step(path: bytes) -> None:
    """What access checks and routes see names the same segments as the client has."""
    normal = normalised(b"/api/v1/collections/docs/items" + path)
    assert normalised(normal) == normal
    assert normal.startswith(b"/api/v1/collections/docs/items/")
    assert normal.count(b"/") == path.count(b"/") + 5
    assert not {b".", b".."} & set(normal.split(b"/"))


@pytest.mark.parametrize("path", INFERENCE)
def test_every_spelling_of_an_inference_route_names_it(path: bytes) -> None:
    for spelled in (
        path + b"/",
        b"/" + path,
        path.replace(b"/", b"//"),
        path.replace(b"/", b"/./"),
        b"/x/.." + path,
        b"".join(b"%%%02x" % byte if byte != ord("/") else b"/" for byte in path),
    ):
        assert normalised(spelled) == path
    assert normalised(path.replace(b"/", b"%2F")) not in INFERENCE


@pytest.mark.parametrize(
    ("raw", "target"),
    [
        (b"/api/tags", Target(b"/api/tags", b"")),
        (b"//api/%74ags/?x=%61&y=/../", Target(b"/api/tags", b"x=%61&y=/../")),
        (b"/api/tags?a?b", Target(b"/api/tags", b"a?b")),
        (b"/api/tags#a?b", Target(b"/api/tags", b"")),
        (b"http://127.0.0.1:1/api/%63hat?x", Target(b"/api/chat", b"x", b"127.0.0.1:1")),
        (b"HTTPS://h/", Target(b"/", b"", b"h")),
        (b"http://h", Target(b"/", b"", b"h")),
        (b"http://h?x=/a", Target(b"/", b"x=/a", b"h")),
        (b"http://h#/a", Target(b"/", b"", b"h")),
        (b"http://[::1]:1/x", Target(b"/x", b"", b"[::1]:1")),
        (b"*", Target(b"*", b"")),
    ],
)
def test_a_target_is_read_in_every_form(raw: bytes, target: Target) -> None:
    assert read_target(raw) == target


@pytest.mark.parametrize(
    "raw",
    [b"", b"h:80", b"api/tags", b"http:///x", b"http://", b"http:/x", b"ftp://h/x", b"http://u@h/x",
     b"http://localhost@evil.example/", b"**"],
)  # fmt: skip
def test_what_names_no_path_of_this_server_is_no_target(raw: bytes) -> None:
    assert read_target(raw) is None


def test_a_target_goes_on_in_origin_form() -> None:
    assert Target(b"/a", b"", b"h").raw == b"/a"
    assert Target(b"/a", b"x=1", b"h").raw == b"/a?x=1"
