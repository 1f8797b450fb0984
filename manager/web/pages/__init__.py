"""The pages, in the order of the navigation."""

from __future__ import annotations

from manager.web.pages.overview import OVERVIEW
from manager.web.pages.try_it import TRY

PAGES = (OVERVIEW, TRY)
