"""A gateway that needs keys, and its keys."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import requests

    from tests.support.gateway import Gateway

KEYS = "/api/v1/keys"


class Keyed:
    """A gateway with an admin key in its registry, and no key file."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.secrets: dict[str, str] = {}
        made = gateway.call("POST", KEYS, json={"name": "root", "scopes": ["admin"]})
        assert made.status_code == 201, made.text
        self.secrets["root"] = made.json()["secret"]

    def ask(
        self,
        method: str,
        path: str,
        *,
        key: str | None = "root",
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> requests.Response:
        """One request with the key of that name, or without one."""
        sent = dict(headers or {})
        if key is not None:
            sent["Authorization"] = f"Bearer {self.secrets[key]}"
        return self.gateway.call(method, path, headers=sent, **options)

    def make(self, name: str, *scopes: str, **limits: Any) -> str:
        """Make a key; return its secret."""
        answer = self.ask("POST", KEYS, json={"name": name, "scopes": scopes or ["client"], **limits})
        assert answer.status_code == 201, answer.text
        secret: str = answer.json()["secret"]
        self.secrets[name] = secret
        return secret

    def listed(self, name: str) -> dict[str, Any]:
        """A key as it is listed."""
        (found,) = [one for one in self.ask("GET", KEYS).json()["keys"] if one["name"] == name]
        return dict(found)


@contextmanager
def keyed_gateway(home: Path, ids: Sequence[str] = ("one",), **options: Any) -> Iterator[Keyed]:
    """As `gateway_over`, with keys."""
    with gateway_over(home, ids, **options) as gateway:
        yield Keyed(gateway)


def as_header(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}
