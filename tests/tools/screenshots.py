"""`make screenshots`: pictures of every page, wide and narrow, light and dark, into docs/images."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manager.cli.machine import DOCKERD, IPTABLES
from manager.web.pages import PAGES
from manager.web.pages.collections import COLLECTIONS
from tests.support.browser import browser, chromium, visit
from tests.support.daemon import wait_for
from tests.tools.console import ToolError, say
from tests.tools.house import house
from tests.tools.system import COMPILER, IP, provide

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.tools.house import House

_IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
_WIDTHS = {"wide": 1280, "narrow": 360}
_SCHEMES = ("light", "dark")
# The collection that changes to another version.
_COLLECTION = replace(COLLECTIONS, name="collection", path=f"{COLLECTIONS.path}?name=tickets")
# Items of it that have a new vector when its first picture is taken.
_BACKFILLED = 200
# Their backfill fills the history of requests: collections come last.
_PAGES = (*(page for page in PAGES if page is not COLLECTIONS), COLLECTIONS, _COLLECTION)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.tools.screenshots", description=__doc__)
    parser.add_argument("names", nargs="*", help="pages; all of them where none is named")
    parser.add_argument("--to", type=Path, default=_IMAGES, help="the directory of the pictures")
    options = parser.parse_args()
    if chromium() is None:
        raise ToolError("there is no Chromium; Debian, Ubuntu: apt-get install chromium")
    provide([DOCKERD, IPTABLES, IP, COMPILER])
    options.to.mkdir(parents=True, exist_ok=True)
    pages = [page for page in _PAGES if not options.names or page.name in options.names]
    with (
        tempfile.TemporaryDirectory(prefix="ollama-manager-house-") as home,
        house(Path(home)) as built,
        browser() as running,
    ):
        built.furnish()
        is_collected = False
        for page in pages:
            if page in (COLLECTIONS, _COLLECTION) and not is_collected:
                built.collect()
                wait_for(lambda: built.backfilled() > _BACKFILLED)
                is_collected = True
            for width, scheme in product(_WIDTHS, _SCHEMES):
                built.keep_busy()
                file = options.to / f"{page.name}-{width}-{scheme}.png"
                _picture(running, built, page, file, width=_WIDTHS[width], scheme=scheme)
                say(file.name)
    return 0


def _picture(running: Browser, built: House, page: Any, file: Path, *, width: int, scheme: str) -> None:
    with visit(running, width=width, scheme=scheme) as visitor:
        visitor.page.goto(f"{built.url}{page.path}")
        visitor.page.wait_for_load_state("load")
        if page.fragments is not None:
            visitor.page.wait_for_selector("html[data-live=on]", state="attached")
            visitor.page.wait_for_timeout(1500)  # a few frames of the live channel
        visitor.page.screenshot(path=file)


if __name__ == "__main__":
    sys.exit(main())
