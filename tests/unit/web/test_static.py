"""What a browser loads: its weight, its licences, and that it is there."""

from __future__ import annotations

import gzip
from importlib.resources import files

import pytest

from manager.errors import Reason
from manager.web.pages import PAGES
from manager.web.rendering import Renderer, prose
from manager.web.static import static_files, static_url
from manager.web.texts import read_texts


def test_all_files_together_are_light() -> None:
    assert sum(len(one.content) for one in static_files().values()) <= 250_000


def test_a_compressed_file_is_the_same_file() -> None:
    for one in static_files().values():
        assert gzip.decompress(one.gzipped) == one.content


def test_files_of_other_people_come_with_their_licences() -> None:
    vendored = files("manager.web") / "static" / "vendor"
    names = [entry.name for entry in vendored.iterdir()]
    for name in names:
        project = name.split("-", maxsplit=1)[0].removeprefix("hx").lower() or "htmx"
        licences = [one for one in names if one.endswith(".LICENSE") and one.lower().startswith(project)]
        assert licences, name


def test_a_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"nothing\.css"):
        static_url("nothing.css")


async def test_every_template_compiles() -> None:
    await Renderer().prepare()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_has_a_title(page: object) -> None:
    assert read_texts()[page.name].title  # type: ignore[attr-defined]


def test_a_text_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"no text overview\.nothing"):
        _ = read_texts().overview.nothing


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_words(reason: Reason) -> None:
    assert read_texts().reasons.get(reason.value, "")


def test_what_stands_between_backticks_is_code_and_the_rest_is_escaped() -> None:
    assert prose("Run `a <b>` & wait") == "Run <code>a &lt;b&gt;</code> &amp; wait"
    assert prose("no code") == "no code"
