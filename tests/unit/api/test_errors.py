"""What the control API says of a request that is not as it describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Header, Query

# FastAPI reads annotations at run time.
from manager.api.compute import LogsQuery, NoQuery, StartQuery  # noqa: TC001
from manager.api.errors import add_error_handlers
from manager.api.keys import KeyRequest  # noqa: TC001
from manager.api.loading import LoadRequest  # noqa: TC001
from manager.api.model_settings import ModelsChange  # noqa: TC001
from manager.api.routing import RoutingChange  # noqa: TC001
from manager.api.schemas import DrainRequest, InstancePatch, LiftRequest, PullRequest  # noqa: TC001
from manager.api.usage import UsageQuery, usage_router

if TYPE_CHECKING:
    from collections.abc import Iterable

# How pydantic begins and ends its own sentences.
RAW = (
    "List should",
    "Input should",
    "String should",
    "Extra inputs",
    "Field required",
    "Value error",
    "unable to",
    "at most 1 ",
)


@pytest.fixture
def api() -> FastAPI:
    """The real models behind routes that do nothing."""
    api = FastAPI()

    @api.post("/models")
    async def models(_change: ModelsChange, _query: Annotated[NoQuery, Query()]) -> None: ...

    @api.post("/routing")
    async def routing(_change: RoutingChange) -> None: ...

    @api.patch("/instance")
    async def instance(_patch: InstancePatch, _query: Annotated[StartQuery, Query()]) -> None: ...

    @api.post("/load")
    async def load(_order: LoadRequest) -> None: ...

    @api.post("/drain")
    async def drain(order: DrainRequest) -> str:
        return str(order.until)

    @api.post("/lift")
    async def lift(_order: LiftRequest) -> None: ...

    @api.post("/pull")
    async def pull(_request: PullRequest) -> None: ...

    @api.get("/logs")
    async def logs(_query: Annotated[LogsQuery, Query()]) -> None: ...

    @api.get("/events")
    async def events(last_event_id: Annotated[int, Header(ge=0)] = 0) -> None: ...

    _add_accounts(api)
    add_error_handlers(api, list(api.routes))
    return api


def _add_accounts(api: FastAPI) -> None:
    @api.post("/keys")
    async def keys(_request: KeyRequest) -> None: ...

    @api.get("/usage")
    async def usage(_query: Annotated[UsageQuery, Query()]) -> None: ...

    nothing: Any = None
    api.router.routes.extend(usage_router(nothing).routes)


async def problems(api: FastAPI, method: str, path: str, **options: Any) -> list[str]:
    """What is wrong with a request, as FIELD: MESSAGE."""
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://manager") as client:
        answer = await client.request(method, path, **options)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "invalid_request")
    found = [f"{one['field']}: {one['message']}" for one in error["details"]["fields"]]
    assert error["message"] == found[0]
    return found


def role(**values: Any) -> dict[str, Any]:
    return {"roles": {"thinking": values}}


BODIES: Iterable[tuple[str, str, Any, str]] = [
    ("POST", "/models", role(policy="gpu"), "policy: 'gpu'; expected 'auto', 'prefer_gpu' or 'cpu_only'"),
    ("POST", "/models", role(model=3), "model: 3; expected text"),
    ("POST", "/models", role(model="a b"), "model: 'a b'; expected the name of a model, without spaces"),
    ("POST", "/models", role(target="CPU"), "target: 'CPU'; expected text that matches"),
    ("POST", "/models", role(think="yes"), "think: 'yes'; expected true or false"),
    ("POST", "/models", role(fallbacks="x"), "fallbacks: 'x'; expected a list"),
    ("POST", "/models", role(fallbacks=["a"] * 101), "fallbacks: a list; expected at most 100 entries"),
    ("POST", "/models", role(fallbacks=["Bad"]), "fallbacks.0: 'Bad'; expected text that matches"),
    ("POST", "/models", role(system=3), "system: 3; expected an object"),
    ("POST", "/models", role(body={"defaults": []}), "body.defaults: a list; expected an object"),
    ("POST", "/models", role(body={"defaults": {"model": 1}}), "body.defaults.model: which model answers"),
    ("POST", "/models", role(modl="m"), "modl: unknown key; did you mean 'model'? allowed: model, target,"),
    ("POST", "/models", role(body={"x": 1}), "body.x: unknown key; allowed: defaults, overrides"),
    ("POST", "/models", {"roles": {"Big": {}}}, "body.roles.Big: 'Big' as a key; expected text that matches"),
    ("POST", "/models", [], "body: a list; expected an object"),
    ("POST", "/routing", {}, "body.roles: missing; this key is needed (known here: roles)"),
    ("POST", "/routing", role(policy={}), "policy: an object; expected 'auto'"),
    ("PATCH", "/instance", {"ttl_s": "soon"}, "body.ttl_s: 'soon'; expected a number"),
    ("PATCH", "/instance", {"ttl_s": -1}, "body.ttl_s: -1; expected 0 or more"),
    ("PATCH", "/instance", {"ttl_s": 1e9}, "body.ttl_s: 1000000000.0; expected 31622400 or less"),
    ("PATCH", "/instance", {"pinned": 1}, "body.pinned: 1; expected true or false"),
    (
        "PATCH",
        "/instance",
        {"tt_s": 1},
        "body.tt_s: unknown key; did you mean 'ttl_s'? allowed: ttl_s, pinned",
    ),
    ("PATCH", "/instance", None, "body: missing; expected an object"),
    *(
        (
            "POST",
            path,
            {"until": until},
            f"body.until: '{until}'; expected a time that has a year of 1 to 9999",
        )
        for path in ("/drain", "/lift")
        for until in ("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59")
    ),
    *(
        ("POST", "/load", {"model": "m", "keep_alive": given}, f"body.keep_alive: {shown}; {problem}")
        for given, shown, problem in (
            ("2d", "'2d'", "expected seconds, or a duration"),
            ("5 m", "'5 m'", "expected seconds, or a duration"),
            (True, "true", "expected seconds, or a duration"),
            ([], "a list", "expected seconds, or a duration"),
            (10**10, "10000000000", "expected 9000000000 seconds at most"),
            (-1e300, "-1e+300", "expected 9000000000 seconds at most"),
            ("9999999999h", "'9999999999h'", "expected 9000000000 seconds at most"),
            (0, "0", "that would unload the model"),
            ("0s", "'0s'", "that would unload the model"),
        )
    ),
    ("POST", "/keys", {"name": "a", "scopes": []}, "body.scopes: a list; expected entries, 1 at least"),
    ("POST", "/pull", {"image": "a b"}, "body.image: 'a b'; expected text that matches"),
    ("POST", "/pull", {"image": "a" * 600}, "…; expected at most 512 characters"),
]


@pytest.mark.parametrize(("method", "path", "body", "problem"), BODIES)
async def test_a_wrong_field_is_told_with_what_was_given_and_what_is_allowed(
    api: FastAPI, method: str, path: str, body: Any, problem: str
) -> None:
    headers = {"Content-Type": "application/json"}
    (found,) = await problems(api, method, path, headers=headers, **({} if body is None else {"json": body}))
    assert problem in found
    assert not any(words in found for words in RAW)


@pytest.mark.parametrize(
    ("method", "url", "problem"),
    [
        ("GET", "/logs?tail=x", "query.tail: 'x'; expected a whole number"),
        ("GET", "/logs?tail=0", "query.tail: '0'; expected 1 or more"),
        ("GET", "/logs?lines=1", "query.lines: unknown key; allowed: tail, follow"),
        (
            "GET",
            "/usage?frm=1d",
            "query.frm: unknown key; did you mean 'from'? allowed: from, to, by, format",
        ),
        (
            "GET",
            "/api/v1/usage?from=2026-03-02T00:00:00Z&to=2026-03-01T00:00:00Z",
            "query.from: 2026-03-02T00:00:00+00:00; expected a time before `to`, 2026-03-01T00:00:00+00:00",
        ),
        ("PATCH", "/instance?wait=maybe", "query.wait: 'maybe'; expected true or false"),
        ("POST", "/models?x=1", "query.x: unknown key; allowed: none"),
    ],
)
async def test_a_wrong_parameter_is_told_in_the_same_words(
    api: FastAPI, method: str, url: str, problem: str
) -> None:
    assert await problems(api, method, url, json={}) == [problem]


async def test_a_wrong_header_is_told_in_the_same_words(api: FastAPI) -> None:
    found = await problems(api, "GET", "/events", headers={"Last-Event-ID": "x"})
    assert found == ["header.last-event-id: 'x'; expected a whole number"]


@pytest.mark.parametrize("content", ["{", '{"a": {b}}', "{0}"])
async def test_a_body_that_is_no_json_is_told_so(api: FastAPI, content: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert await problems(api, "PATCH", "/instance", content=content, headers=headers) == [
        "body: it is not JSON"
    ]


async def test_every_problem_of_a_request_is_told(api: FastAPI) -> None:
    found = await problems(api, "PATCH", "/instance?wait=x", json={"ttl_s": [], "pinned": "no"})
    assert found == [
        "query.wait: 'x'; expected true or false",
        "body.ttl_s: a list; expected a number",
        "body.pinned: 'no'; expected true or false",
    ]


async def test_a_time_is_read_in_utc(api: FastAPI) -> None:
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://manager") as client:
        answer = await client.post("/drain", json={"until": "9999-12-31T23:59:59+01:00"})
    assert answer.json() == "9999-12-31 22:59:59+00:00"


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/api/v1/usages", 404, "there is no GET /api/v1/usages"),
        ("POST", "/api/v1/usage", 405, "/api/v1/usage is not for POST; allowed: GET"),
    ],
)
async def test_a_route_that_is_not_there_is_named(
    api: FastAPI, method: str, path: str, status: int, message: str
) -> None:
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://manager") as client:
        answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)
