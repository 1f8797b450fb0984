"""Forms in parts: the model is found wherever it stands, however the form is cut, and can be put into it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.multipart import BadFormError, FormHead, Found, boundary_of, is_named_in

AUDIO = b"RIFF\r\n--b\x00\xff" * 100


def part(name: str, content: bytes, more: str = "") -> bytes:
    head = f'--bound\r\nContent-Disposition: form-data; name="{name}"{more}\r\n'
    return head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n"


FILE = part("file", AUDIO, '; filename="model.wav"')
MODEL = part("model", b"whisper")
FIRST = MODEL + FILE + b"--bound--\r\n"
LAST = FILE + MODEL + b"--bound--\r\n"
NEVER = FILE + b"--bound--\r\n"


def read(form: bytes, size: int = 2**30) -> FormHead:
    head = FormHead(b"bound")
    for at in range(0, len(form), size):
        head.feed(form[at : at + size])
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


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/mixed; boundary=x",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 71}",
        "multipart/form-data; boundary=x; Boundary*=utf-8''y",
    ],
)
def test_another_type_is_refused(content_type: str) -> None:
    with pytest.raises(BadFormError):
        boundary_of(content_type)


def test_a_model_that_stands_first_is_found_without_the_file() -> None:
    head = FormHead(b"bound")
    head.feed(MODEL + b"--bound\r\n")
    assert (head.found, head.model, head.size) == (Found.NAMED, "whisper", len(MODEL) + 9)


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


@pytest.mark.parametrize("form", [NEVER, b"\r\n" + NEVER])
def test_a_form_without_a_model_gets_one(form: bytes) -> None:
    again = read(read(form).with_model("whisper"))
    assert (again.found, again.model) == (Found.NAMED, "whisper")
    assert AUDIO in again.with_model("x")
    assert read(form).model == ""


@pytest.mark.parametrize(
    "form",
    [
        b"--bound\r\nContent-Disposition: form-data; name=model\r\n\r\nwhisper\r\n--bound--",
        b'--bound\r\ncontent-disposition:form-data;NAME="model"\r\n\r\n whisper \r\n--bound--',
        b"\r\n--bound\r\nCONTENT-DISPOSITION: Form-Data; name=model; filename=\r\n\r\nwhisper\r\n--bound--",
        part("model", b"whisper", '; filename=""') + b"--bound--",
        b"--bound\r\n\r\nno head\r\n--bound\r\nX: 1\r\n" + MODEL.partition(b"\r\n")[2] + b"--bound--",
        part("file", b"x", '; filename="x; name=model"') + MODEL + b"--bound--",
        part("file", b"x", '; filename="x\\"; name=model"') + MODEL + b"--bound--",
        part("x", b"x", '; title="; name=model"') + MODEL + b"--bound--",
        part("model", b"no name", '; filename="x"') + MODEL + b"--bound--",
        part("models", b"x") + part("odel", b"x") + MODEL + b"--bound--",
        MODEL.replace(b"form-data", b"attachment").replace(b"whisper", b"x") + MODEL + b"--bound--",
        MODEL + part("model", b"second") + b"--bound--",
        b"--bound\r\nContent-Disposition: form-data\r\n\r\n\r\n" + MODEL + b"--bound--",
    ],
)
def test_heads_of_parts_may_look_different(form: bytes) -> None:
    assert read(form).model == "whisper"


def test_a_form_has_a_bounded_number_of_parts() -> None:
    assert read(part("x", b"") * 999 + MODEL + b"--bound--").model == "whisper"
    with pytest.raises(BadFormError, match="more than 1000 parts"):
        read(part("x", b"") * 1001)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        (b"", False),
        (b"x=model&models=1", False),
        (b"model=x", True),
        (b"a&mode%6c=", True),
        (b"model", True),
        (b"\xff=%ff", False),
    ],
)
def test_a_model_in_the_query_is_seen(query: bytes, *, named: bool) -> None:
    assert is_named_in(query) is named


VALUES = st.sampled_from([b"whisper", b"", b"\r", b"\r\n--boun", b"--bound", b"a\r\nb", b" x ", b"\r\n\r\n"])


@given(VALUES, VALUES, st.integers(1, 60), st.booleans())
def test_only_the_value_of_the_model_is_replaced(value: bytes, other: bytes, size: int, also: bool) -> None:
    form = part("other", value) + part("model", value) + part("language", other) + b"--bound--\r\n"
    form = b"\r\n" * also + form
    head = FormHead(b"bound")
    at = 0
    while head.found is Found.NOT_YET:
        head.feed(form[at : at + size])
        at += size
    assert head.model == value.decode().strip()
    model = part("model", b"large")
    expected = b"\r\n" * also + part("other", value) + model + part("language", other) + b"--bound--\r\n"
    assert head.with_model("large") + form[at:] == expected


def test_a_form_that_comes_byte_by_byte_is_read() -> None:
    head = FormHead(b"bound")
    for byte in LAST:
        head.feed(bytes([byte]))
    assert (head.found, head.model) == (Found.NAMED, "whisper")


def test_an_empty_name_is_named_and_empty() -> None:
    head = read(part("model", b"") + b"--bound--")
    assert (head.found, head.model) == (Found.NAMED, "")


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (b"x" * 20_000, "does not begin with its boundary"),
        (b"preamble\r\n" + FIRST, "does not begin with its boundary"),
        (FIRST.replace(b"\r\n", b"\n"), "does not begin with its boundary"),
        (b"--bound\r\nContent-Disposition: " + b"x" * 20_000, "cannot be read"),
        (b"--bound\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(20)), "cannot be read"),
        (b'--bound\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"x" * 9_000, "at most 1024"),
        (part("model", b"x" * 1025) + b"--bound--", "at most 1024 characters"),
        (part("x", b"x", "; name*=utf-8''model"), "in two ways"),
        (part("x", b"x", "; NAME*0=model"), "in two ways"),
        (part("model", b"x", "; filename*=utf-8''"), "as a file"),
        (MODEL.replace(b"form-data; ", b'form-data; x="\\\\"; '), "in two ways"),
        (
            MODEL.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"),
            "is encoded",
        ),
        (MODEL.replace(b"\r\n\r\n", b"\r\nX:\r\n\r\n"), "an empty header, or one twice"),
        (MODEL.replace(b"\r\n\r\n", b"\r\nX: 1\r\nx: 2\r\n\r\n"), "an empty header, or one twice"),
        (
            MODEL.replace(b"\r\n\r\n", b'\r\nContent-disposition: form-data; name="x"\r\n\r\n'),
            "an empty header, or one twice",
        ),
    ],
)
def test_what_cannot_be_read_or_could_be_read_otherwise_is_refused(form: bytes, why: str) -> None:
    for size in (1, 7, len(form)):
        with pytest.raises(BadFormError, match=why):
            read(form, size)


def test_a_file_of_any_size_is_no_mistake() -> None:
    head = read(part("file", b"x" * 1_000_000))
    assert head.found is Found.NOT_YET


@given(st.binary())
def test_whatever_comes_is_a_form_or_waited_for(data: bytes) -> None:
    head = FormHead(b"bound")
    with suppress(BadFormError):
        head.feed(data)
    assert head.found is Found.NOT_YET or b"--bound" in data
