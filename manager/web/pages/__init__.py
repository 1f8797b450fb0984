"""The pages, in the order of the navigation."""

from __future__ import annotations

from manager.web.pages.keys import KEYS
from manager.web.pages.overview import OVERVIEW
from manager.web.pages.usage import USAGE

PAGES = (OVERVIEW, USAGE, KEYS)
