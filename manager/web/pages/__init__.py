"""The pages, in the order of the navigation."""

from __future__ import annotations

from manager.web.pages.collections import COLLECTIONS
from manager.web.pages.gpus import GPUS
from manager.web.pages.instances import INSTANCES
from manager.web.pages.keys import KEYS
from manager.web.pages.models import MODELS
from manager.web.pages.overview import OVERVIEW
from manager.web.pages.requests import REQUESTS
from manager.web.pages.roles import ROLES
from manager.web.pages.runs import RUNS
from manager.web.pages.try_it import TRY
from manager.web.pages.usage import USAGE

PAGES = (OVERVIEW, INSTANCES, GPUS, MODELS, COLLECTIONS, ROLES, REQUESTS, RUNS, USAGE, KEYS, TRY)
