"""The fixtures themselves are in `tests/support/fixtures.py`, for other folders too."""

from __future__ import annotations

from tests.support.fixtures import FAST, NewDaemon, write_templates

__all__ = ["FAST", "NewDaemon", "write_templates"]
