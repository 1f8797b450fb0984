"""Requests: the open ones, the history, one of them explained, and where one would go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlencode

from pydantic import ValidationError

from manager.api.requests import RequestsQuery, ended_json, explained, explanation, filters_of
from manager.api.routing import RequestDescription
from manager.domain.explanation import passed_over_words
from manager.domain.record import Outcome
from manager.domain.roles import RequestKind
from manager.errors import ManagerError
from manager.settings.problems import described
from manager.web.page import Fragment, Page
from manager.web.request_view import fallback, row, stages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request
    from pydantic import BaseModel

    from manager.api.backend import Backend
    from manager.web.page import Sections
    from manager.web.viewer import Viewer

# Rows of a page of the history.
MOST_LISTED = 50
_FILTERS = ("project", "role", "model", "instance", "outcome", "key", "since")
_DESCRIPTION = ("model", "kind", "instance", "lane", "key")
_NO_PROBLEMS = dict.fromkeys((*_FILTERS, *_DESCRIPTION), "")
_LONGEST = 1024
_SPANS = ("15m", "1h", "24h", "7d")


def _fragments(sections: Sections, _viewer: Viewer) -> Mapping[str, Fragment]:
    requests: list[dict[str, Any]] = sections["requests"]
    opened = [row(one) for one in requests if one["open"]]
    newest = next((one["request_id"] for one in requests if not one["open"]), "")
    return {
        "requests-open": Fragment("requests/open.html", {"rows": opened}),
        # The script of the page asks for the rows of its own filters when this changes.
        "requests-pulse": Fragment("requests/pulse.html", {"newest": newest}),
    }


async def _context(backend: Backend, _viewer: Viewer, request: Request) -> Mapping[str, Any]:
    given = {name: value[:_LONGEST] for name, value in request.query_params.items() if value.strip()}
    if "id" in given:
        return {"view": "one", **await _one(backend, given["id"])}
    names = {
        "roles": [role.name for role in backend.model_settings.routing.roles.values()],
        "instances": [one.id for one in backend.fleet.instances()],
    }
    if given.get("view") == "explain":
        return {"view": "explain", **names, **_explanation(backend, given)}
    return {"view": "list", **names, **await _list(backend, given)}


async def _list(backend: Backend, given: Mapping[str, str]) -> dict[str, Any]:
    """Return a page of the history; with a wrong filter none, and what is wrong."""
    filters = {name: given[name] for name in _FILTERS if name in given}
    place = {name: given[name] for name in ("after", "before") if name in given}
    context = {
        "filters": {name: given.get(name, "") for name in _FILTERS},
        "is_filtered": bool(filters),
        "query": urlencode(filters),
        "outcomes": get_args(Outcome),
        "spans": _SPANS,
        "is_first": "before" not in given,
        "is_wrong": False,
        "rows": [],
        "cursor": None,
        "older": None,
        "problems": _NO_PROBLEMS,
    }
    try:
        query = RequestsQuery.model_validate({**filters, **place, "limit": MOST_LISTED})
    except ValidationError as error:
        return {**context, "problems": {**_NO_PROBLEMS, **_problems(error, RequestsQuery)}, "is_wrong": True}
    await backend.history.flush()
    page = await backend.history.store.last(
        filters_of(query), MOST_LISTED, after=query.after, before=query.before
    )
    rows = [row(ended_json(values)) for _, values in page.items]
    return {**context, "rows": rows, "cursor": page.cursor, "older": page.older}


async def _one(backend: Backend, request_id: str) -> dict[str, Any]:
    try:
        found = await explained(backend, request_id)
    except ManagerError as error:
        return {"one": None, "id": request_id, "missing": error.message}
    return {
        "one": row(found),
        "id": request_id,
        "record": found,
        "decision": found["decision"],
        "summary": found["summary"],
        "stages": stages(found),
        "fallback": fallback(found),
    }


def _explanation(backend: Backend, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the decision for the request that a form describes; none before it is filled in."""
    wanted: dict[str, Any] = {name: given[name].strip() for name in _DESCRIPTION if name in given}
    names = backend.passing.requests.names
    context = {
        "wanted": {name: given.get(name, "") for name in (*_DESCRIPTION, "local_only")},
        "kinds": list(RequestKind),
        "headers": {
            name: getattr(names, name).decode().title() for name in ("instance", "lane", "local_only")
        },
        "decision": None,
        "problems": _NO_PROBLEMS,
    }
    if "model" not in wanted:
        return context
    try:
        description = RequestDescription.model_validate({**wanted, "local_only": "local_only" in given})
        decision = explanation(backend, description)
    except ValidationError as error:
        return {**context, "problems": {**_NO_PROBLEMS, **_problems(error, RequestDescription)}}
    except ManagerError as error:
        return {**context, "problems": {**_NO_PROBLEMS, "key": error.message}}
    passed = [{**one, "words": passed_over_words(one)} for one in decision["passed_over"]]
    return {**context, "decision": {**decision, "passed_over": passed}}


def _problems(error: ValidationError, shape: type[BaseModel]) -> dict[str, str]:
    """Return what is wrong by the name of the field, in the words of the API."""
    found: dict[str, str] = {}
    for one in error.errors():
        for path, message in described(one, shape, mapping="an object"):
            found.setdefault(str(path[0]) if path else "", message)
    return found


REQUESTS = Page("requests", "/ui/requests", fragments=_fragments, context=_context)
