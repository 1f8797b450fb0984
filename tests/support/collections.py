"""A collection of a daemon, as a client of its API has it."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.api.raw_http import Answer, request, say
from tests.support.daemon import wait_for
from tests.support.embedding_server import DIMENSIONS, MODEL, EmbeddingServer
from tests.support.gateway import Gateway, gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import requests

PATH = "/api/v1/collections"
_numbers = itertools.count()


class Collection:
    """One collection, and the server that embeds its texts."""

    def __init__(self, gateway: Gateway, server: EmbeddingServer, name: str) -> None:
        self.gateway, self.server, self.name = gateway, server, name
        self.path = f"{PATH}/{name}"

    def ask(self, method: str, path: str = "", json: Any = None, **options: Any) -> requests.Response:
        return self.gateway.call(method, self.path + path, json=json, **options)

    def good(self, method: str, path: str = "", json: Any = None, **options: Any) -> Any:
        answer = self.ask(method, path, json, **options)
        assert answer.ok, answer.text
        return answer.json()

    def put(self, *items: dict[str, Any]) -> Any:
        return self.good("PUT", "/items", {"items": items})

    def changed(self, build: str, **wanted: Any) -> dict[str, Any]:
        """Replace the model by another build, backfill, and return the backfill once it has ended."""
        self.server.become(build)
        answer = self.ask("POST", "/backfill", wanted)
        assert answer.status_code == 202, answer.text
        ended = ("succeeded", "failed", "cancelled")
        return wait_for(lambda: self.good("GET", "/backfill"), lambda body: body["status"] in ended)


@contextmanager
def embedding_gateway(home: Path, server: EmbeddingServer) -> Iterator[Gateway]:
    """A daemon in front of a server, whose model is that of the role `embedding`."""
    instances = {"one": {"driver": "external", "url": server.url}}
    config = {"roles": {"embedding": {"model": MODEL}}, "gateway": {"max_body": 8 * 2**20}}
    with gateway_over(home, (), instances=instances, config=config) as gateway:
        gateway.wait_until_usable("one")
        yield gateway


@contextmanager
def new_collection(gateway: Gateway, server: EmbeddingServer) -> Iterator[Collection]:
    """An empty collection with a name of its own, over the first build of the model."""
    server.become("first", DIMENSIONS)
    collection = Collection(gateway, server, f"docs-{next(_numbers)}")
    made = gateway.call("POST", PATH, json={"name": collection.name})
    assert made.status_code == 201, made.text
    yield collection
    collection.ask("DELETE")


def raw(gateway: Gateway, method: str, path: str, body: bytes = b"") -> Answer:
    """Send a path as it is; the connection stays open meanwhile, as a client keeps it."""
    length = f"Content-Length: {len(body)}"
    head = request(path, "Content-Type: application/json", length, method=method)
    return say(gateway.port, head, body, end=False)


def error_of(answer: requests.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) <= {"code", "message", "details"}
    return answer.status_code, error["code"]


def fields_of(answer: requests.Response) -> list[str]:
    """The fields that a refusal names."""
    assert error_of(answer) == (422, "invalid_request"), answer.text
    return [one["field"] for one in answer.json()["error"]["details"]["fields"]]


def message_of(answer: requests.Response) -> str:
    return str(answer.json()["error"]["message"])
