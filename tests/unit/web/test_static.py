"""What a browser loads: its weight, its licences, and that it is there."""

from __future__ import annotations

import gzip
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import manager
from manager.errors import Reason
from manager.web.pages import PAGES
from manager.web.rendering import Renderer, prose
from manager.web.static import static_files, static_url
from manager.web.texts import read_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

MANAGER = Path(manager.__file__).parent
# Tables of which a module takes texts.
IN_MODULES = {"settings_view.py": "roles"}

Place = tuple[str, ...]


def paths(table: dict[str, Any], above: Place = ()) -> Iterator[Place]:
    """Yield the path of each text."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from paths(value, (*above, name))
        else:
            yield (*above, name)


def references() -> set[Place]:
    """Return what sources name of the texts: `t.table.text` in templates, `texts.text` in modules."""
    found = []
    for template in (MANAGER / "web" / "templates").rglob("*.html"):
        source = template.read_text("utf-8")
        aliases = {"t": "", **dict(re.findall(r"{% set (\w+) = t\.([\w.]+) %}", source))}
        for alias, table in aliases.items():
            found += [(table, name) for name in re.findall(rf"(?<![\w.]){alias}\.([\w.]+)", source)]
    for module, table in IN_MODULES.items():
        source = (MANAGER / "web" / module).read_text("utf-8")
        found += [(table, name) for name in re.findall(r"(?<![\w.])texts\.([\w.]+)", source)]
    return {tuple(f"{table}.{name}".strip(".").split(".")) for table, name in found}


def words() -> set[str]:
    """Return the words of all sources except the references to texts."""
    sources = [*MANAGER.rglob("*.py"), *(MANAGER / "web" / "static").glob("*.js")]
    texts = [one.read_text("utf-8") for one in sources]
    templates = (MANAGER / "web" / "templates").rglob("*.html")
    texts += [re.sub(r"(?<![\w.])t\.[\w.]+", "", one.read_text("utf-8")) for one in templates]
    return set(re.findall(r"\w+", "\n".join(texts)))


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


def test_every_text_is_used() -> None:
    """A text is named by its path; or a table above it is, and its own name is a word of some source."""
    texts = set(paths(read_texts().plain()))
    tables = {path[:length] for path in texts for length in range(1, len(path))}
    used: set[Place] = {(page.name, "title") for page in PAGES}
    used_tables: set[Place] = set()
    known = words()
    for path in references():
        # What follows a text or a table is a method.
        named = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in texts | tables), ())
        (used if named in texts else used_tables).add(named)

    def is_used(path: Place) -> bool:
        in_table = any(path[:length] in used_tables for length in range(1, len(path)))
        return path in used or (in_table and path[-1].removesuffix("_whole") in known)

    assert [".".join(path) for path in sorted(texts) if not is_used(path)] == []


def test_links_to_parts_of_pages_have_the_ids_of_elements() -> None:
    for template in (MANAGER / "web" / "templates").rglob("*.html"):
        links = re.findall(r'href="/ui/[^"#]*#{{ (\w+)', template.read_text("utf-8"))
        assert set(links) <= {"element_id"}, template.name


def test_what_stands_between_backticks_is_code_and_the_rest_is_escaped() -> None:
    assert prose("Run `a <b>` & wait") == "Run <code>a &lt;b&gt;</code> &amp; wait"
    assert prose("no code") == "no code"
