"""The control API as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
from fastapi.routing import APIRoute

from manager.web.app import application
from manager.wire.access import Access

if TYPE_CHECKING:
    from fastapi import FastAPI

ERROR = {"$ref": "#/components/schemas/ErrorBody"}


@pytest.fixture
def api() -> FastAPI:
    return application(Mock(), access=Access(allowed_hosts=()))  # only asked for its routes


def test_all_routes_are_built_before_the_first_request(api: FastAPI) -> None:
    built = {route.path_format for route in api.routes if isinstance(route, APIRoute)}
    assert built >= set(api.openapi()["paths"])


def test_every_refusal_is_described_as_an_error(api: FastAPI) -> None:
    document = api.openapi()
    refusals = [
        answer["content"]["application/json"]["schema"]
        for path, operations in document["paths"].items()
        if path.startswith("/api/")  # /readyz says 503 with its own document
        for operation in operations.values()
        for status, answer in operation["responses"].items()
        if status[0] in "45"
    ]
    assert len(refusals) > 100
    assert all(schema == ERROR for schema in refusals)
    assert "ErrorBody" in document["components"]["schemas"]
