"""Forms in parts: the model is found wherever it stands, however the form is cut, and can be put into it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.multipart import BadFormError, FormHead, Found, boundary_of

AUDIO = b"RIFF\r\n--b\x00\xff" * 100


def part(name: str, content: bytes, more: str = "") -> bytes:
    head = f'--bound\r\nContent-Disposition: form-data; name="{name}"{more}\r\n'
    return head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n"


FILE = part("file", AUDIO, '; filename="model.wav"')
MODEL = part("model", b"whisper")
FIRST = MODEL + FILE + b"--bound--\r\n"
LAST = FILE + MODEL + b"--bound--\r\n"
NEVER = FILE + b"--bound--\r\n"


def read(form: bytes) -> FormHead:
    head = FormHead(b"bound")
    head.feed(form)
    return head


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=bound", b"bound"),
        ('Multipart/Form-Data; charset=utf-8; Boundary="a b:c"', b"a b:c"),
        ("multipart/form-data;boundary=x;y=z", b"x"),
    ],
)
def test_the_type_says_what_separates_the_parts(content_type: str, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data", "multipart/mixed"])
def test_another_type_is_refused(content_type: str) -> None:
    with pytest.raises(BadFormError):
        boundary_of(content_type)


def test_a_model_that_stands_first_is_found_without_the_file() -> None:
    head = FormHead(b"bound")
    head.feed(MODEL + b"--bound")
    assert (head.found, head.model, head.size) == (Found.NAMED, "whisper", len(MODEL) + 7)


@given(st.sampled_from([FIRST, LAST, NEVER]), st.lists(st.integers(0, len(FIRST))).map(sorted))
def test_the_model_is_found_wherever_the_form_is_cut(form: bytes, cuts: list[int]) -> None:
    head = FormHead(b"bound")
    seen = b""
    for start, end in zip([0, *cuts], [*cuts, len(form)], strict=True):
        head.feed(form[start:end])
        seen += form[start:end]
        assert head.size == len(seen)
        if head.found is not Found.NOT_YET:
            break
    assert head.found is (Found.NEVER if form is NEVER else Found.NAMED)
    assert head.model == ("" if form is NEVER else "whisper")
    assert head.with_model("whisper") == (seen if form is not NEVER else head.with_model("whisper"))


@pytest.mark.parametrize("form", [FIRST, LAST])
def test_another_model_is_put_in_its_place(form: bytes) -> None:
    changed = read(form).with_model("large-v3")
    assert changed == form.replace(b"whisper", b"large-v3")


@pytest.mark.parametrize("form", [NEVER, b"preamble\r\n" + NEVER])
def test_a_form_without_a_model_gets_one(form: bytes) -> None:
    again = read(read(form).with_model("whisper"))
    assert (again.found, again.model) == (Found.NAMED, "whisper")
    assert AUDIO in again.with_model("x")
    assert read(form).model == ""


@pytest.mark.parametrize(
    "form",
    [
        b"--bound\r\nContent-Disposition: form-data; name=model\r\n\r\nwhisper\r\n--bound--",
        b'--bound \r\ncontent-disposition:form-data;NAME="model"\r\n\r\n whisper \r\n--bound--',
        b"--bound\r\n\r\nno head\r\n--bound\r\nX: 1\r\n" + MODEL.partition(b"\r\n")[2] + b"--bound--",
        part("model", b"whisper", '; filename="name=file"') + b"--bound--",
        b"--bound\r\nContent-Disposition: form-data\r\n\r\n\r\n" + MODEL + b"--bound--",
    ],
)
def test_heads_of_parts_may_look_different(form: bytes) -> None:
    assert read(form).model == "whisper"


def test_a_form_that_comes_byte_by_byte_is_read() -> None:
    head = FormHead(b"bound")
    for byte in LAST:
        head.feed(bytes([byte]))
    assert (head.found, head.model) == (Found.NAMED, "whisper")


def test_an_empty_name_is_named_and_empty() -> None:
    head = read(part("model", b"") + b"--bound--")
    assert (head.found, head.model) == (Found.NAMED, "")


@pytest.mark.parametrize(
    "form",
    [
        b"x" * 20_000,
        b"--bound\r\nContent-Disposition: " + b"x" * 20_000,
        b'--bound\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"x" * 2_000,
    ],
)
def test_what_has_no_end_is_given_up(form: bytes) -> None:
    with pytest.raises(BadFormError):
        read(form)


def test_a_file_of_any_size_is_no_mistake() -> None:
    head = read(part("file", b"x" * 1_000_000))
    assert head.found is Found.NOT_YET


@given(st.binary())
def test_whatever_comes_is_a_form_or_waited_for(data: bytes) -> None:
    assert read(data).found is Found.NOT_YET or b"--bound" in data
