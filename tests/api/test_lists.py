"""What all instances have and hold, as one list that a client takes for an Ollama's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import pytest
import requests

from manager.api.ollama import OllamaApi
from tests.api.raw_http import request, say
from tests.support.daemon import COMPUTE, wait_for
from tests.support.gateway import Gateway, gateway_over
from tests.support.state import stored

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.types import Message

    from tests.support.daemon import Daemon

ROLES = {
    "thinking": {"model": "qwen3:8b"},
    "embedding": {"model": "nowhere"},
    "tiny": {"model": "qwen3:8b"},
}
KEY = "correct-horse-battery-staple-0123456789"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """`one` and `two` share a model and have one each of their own; nobody answers at `gone`."""
    with gateway_over(
        tmp_path_factory.mktemp("lists"),
        ("one", "two"),
        knobs={"one": {"models": "tiny,minilm"}, "two": {"models": "tiny,qwen3:8b", "version": "0.33.1"}},
        instances={"gone": {"driver": "external", "url": "http://127.0.0.1:9"}},
        config={"roles": ROLES},
    ) as running:
        yield running


def names(gateway: Daemon) -> list[str]:
    return [model["name"] for model in gateway.get("/api/tags")["models"]]


def load(url: str, model: str) -> None:
    requests.post(f"{url}/api/embed", json={"model": model, "input": []}, timeout=10).raise_for_status()


# --- /, /api/version ------------------------------------------------------------------------------


def test_the_root_says_what_an_ollama_says(gateway: Gateway) -> None:
    answer = gateway.call("GET", "/", headers={"Accept": "*/*"}, allow_redirects=False)
    assert (answer.status_code, answer.text) == (200, "Ollama is running")
    answer = gateway.call("HEAD", "/")
    assert (answer.headers["content-length"], answer.content) == ("17", b"")


@pytest.mark.parametrize(
    ("accept", "status"),
    [("text/html,*/*", 307), ("TEXT/HTML;q=0.9", 307), ("*/*", 200), ("application/json,text/html", 200)],
)
async def test_a_browser_is_sent_to_the_pages(accept: str, status: int) -> None:
    said: list[Message] = []

    async def app(*_: object) -> None: ...

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        said.append(message)

    passing = MagicMock()
    passing.routing.rollout.raw = None
    backend: Any = SimpleNamespace(passing=passing)
    routes: Any = [SimpleNamespace(path="/docs"), SimpleNamespace(path="/ui")]
    api = OllamaApi(app, backend=backend, routes=routes)
    headers = [(b"accept", accept.encode())]
    await api({"type": "http", "method": "GET", "path": "/", "headers": headers}, receive, send)
    assert said[0]["status"] == status
    assert ((b"Location", b"/ui") in said[0]["headers"]) is (status == 307)


def test_the_version_is_that_of_the_first_instance_that_is_ready(gateway: Gateway) -> None:
    assert gateway.get("/api/version") == {"version": "0.24.0"}
    assert gateway.call("HEAD", "/api/version").headers["content-length"] == "20"


# --- /api/tags ------------------------------------------------------------------------------------


def test_each_model_is_listed_once_with_all_that_its_server_says(gateway: Gateway) -> None:
    answer = gateway.get("/api/tags")
    assert sorted(names(gateway)) == ["minilm:latest", "qwen3:8b", "thinking:latest", "tiny:latest"]
    own = requests.get(f"{gateway.servers['one'].url}/api/tags", timeout=10).json()["models"]
    for model in own:  # what `/api/show` says, which newer servers list themselves
        shown = {"tiny:latest": (2048, 64, "completion"), "minilm:latest": (512, 384, "embedding")}
        context, vector, can = shown[model["name"]]
        model["details"] |= {"context_length": context, "embedding_length": vector}
        model["capabilities"] = [can]
    others = ("qwen3:8b", "thinking:latest")
    assert [model for model in answer["models"] if model["name"] not in others] == own
    head = gateway.call("HEAD", "/api/tags")
    assert int(head.headers["content-length"]) == len(gateway.call("GET", "/api/tags").content)


def test_a_role_is_listed_as_its_model_is_so_that_clients_offer_it(gateway: Gateway) -> None:
    found = {model["name"]: model for model in gateway.get("/api/tags")["models"]}
    role, model = found["thinking:latest"], found["qwen3:8b"]
    assert role["details"]["parent_model"] == "qwen3:8b"
    for key in ("digest", "size", "modified_at"):
        assert role[key] == model[key]
    assert "embedding:latest" not in found, "no instance has its model"
    assert found["tiny:latest"]["details"]["parent_model"] == "", "this is the model"
    for name in ("thinking", "thinking:latest"):  # the second one is what Open WebUI sends
        shown = gateway.call("POST", "/api/show", json={"model": name})
        assert (shown.status_code, shown.headers["x-model"]) == (200, "qwen3:8b")
        answer = gateway.call("POST", "/api/chat", json={"model": name, "messages": [], "stream": False})
        assert (answer.status_code, answer.headers["x-model"]) == (200, "qwen3:8b"), answer.text


def test_what_was_made_behind_our_back_is_listed_soon(gateway: Gateway) -> None:
    url = gateway.servers["two"].url
    body = {"source": "tiny", "destination": "fresh"}
    requests.post(f"{url}/api/copy", json=body, timeout=10).raise_for_status()
    wait_for(lambda: names(gateway), lambda listed: "fresh:latest" in listed, within_s=5)
    requests.delete(f"{url}/api/delete", json={"model": "fresh"}, timeout=10).raise_for_status()
    wait_for(lambda: names(gateway), lambda listed: "fresh:latest" not in listed, within_s=5)


def test_many_who_ask_at_once_all_get_the_same(gateway: Gateway) -> None:
    with ThreadPoolExecutor(20) as pool:
        lists = list(pool.map(lambda _: sorted(names(gateway)), range(60)))
    assert all(one == lists[0] for one in lists)


def test_models_of_servers_that_are_away_are_known_across_restarts(tmp_path: Path) -> None:
    with gateway_over(tmp_path, ("one",), knobs={"one": {"version": "0.31.2"}}) as gateway:
        before = gateway.get("/api/tags")
        wait_for(lambda: stored_models(gateway), lambda stored: stored == 2)
        gateway.servers["one"].process.kill()
        gateway.wait_for_phase("one", "unavailable")
        assert gateway.get("/api/tags") == before
        assert gateway.get("/api/version") == {"version": "0.31.2"}
        gateway.stop()
        gateway.start(until_ready=False)
        gateway.wait_until_alive()
        assert gateway.get("/api/tags") == before
        listed = gateway.get("/v1/models")["data"]
        assert {entry["id"]: entry["loaded"] for entry in listed} == {
            "tiny:latest": False,
            "minilm:latest": False,
        }
        assert gateway.get("/api/ps") == {"models": []}
        assert gateway.get("/api/version")["version"], "nobody was seen since: what would run"


def stored_models(gateway: Daemon) -> int:
    rows = stored(gateway.state_dir, "SELECT entries FROM model_lists")
    return sum(len(json.loads(row["entries"])) for row in rows)


# --- /api/ps --------------------------------------------------------------------------------------


def test_loaded_models_say_on_which_instance(gateway: Gateway) -> None:
    load(gateway.url, "minilm")
    load(gateway.url, "qwen3:8b")
    models = gateway.get("/api/ps")["models"]
    assert [(model["instance"], model["name"]) for model in models] == [
        ("one", "minilm:latest"),
        ("two", "qwen3:8b"),
    ]
    own = requests.get(f"{gateway.servers['one'].url}/api/ps", timeout=10).json()["models"]
    assert {key: value for key, value in models[0].items() if key != "instance"} == own[0]


# --- /v1/models -----------------------------------------------------------------------------------


def entry(gateway: Gateway, name: str) -> dict[str, Any]:
    (found,) = [one for one in gateway.get("/v1/models")["data"] if one["id"] == name]
    return dict(found)


def test_openai_clients_see_where_a_model_is_and_whether_it_is_loaded(gateway: Gateway) -> None:
    load(gateway.url, "minilm")
    tiny, minilm = entry(gateway, "tiny:latest"), entry(gateway, "minilm:latest")
    assert (tiny["instances"], tiny["loaded"]) == (["one", "two"], False)
    assert (minilm["instances"], minilm["loaded"]) == (["one"], True)
    assert gateway.get("/v1/models/MiniLM") == {**entry(gateway, "minilm:latest"), "id": "MiniLM"}


def test_roles_are_entries_beside_models_of_their_name(gateway: Gateway) -> None:
    role = entry(gateway, "thinking")
    assert (role["model"], role["instances"], role["kind"]) == ("qwen3:8b", ["two"], "generate")
    assert gateway.get("/v1/models/thinking") == role
    assert entry(gateway, "embedding")["instances"] == []
    assert gateway.get("/v1/models/tiny") == entry(gateway, "tiny")
    assert (entry(gateway, "tiny")["model"], "model" in entry(gateway, "tiny:latest")) == ("qwen3:8b", False)
    assert gateway.get("/v1/models/tiny:latest") == entry(gateway, "tiny:latest")


def test_a_model_that_nobody_has_is_404_in_openais_words(gateway: Gateway) -> None:
    answer = gateway.call("GET", "/v1/models/me/nope:1")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["message"] == "model 'me/nope:1' not found"
    assert error["type"] == "not_found_error"


# --- what there is not ----------------------------------------------------------------------------


def test_an_unknown_route_is_told_as_ollama_tells_it(gateway: Gateway) -> None:
    for path in ("/nope", "/api/nope", "/api/tags/x", "/api/blobs/", "/uix"):
        answer = gateway.call("GET", path)
        assert (answer.status_code, answer.text) == (404, "404 page not found"), path
        assert answer.headers["content-type"] == "text/plain"
    answer = gateway.call("POST", "/v1/nope")
    assert answer.json() == {
        "error": {
            "message": "there is no POST /v1/nope",
            "type": "not_found_error",
            "param": None,
            "code": None,
        }
    }
    for path in (f"{COMPUTE}/nope", "/api/settings/nope", "/api/runtime"):
        assert gateway.call("GET", path).json()["error"]["code"] == "not_found", path


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/api/tags", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("HEAD", "/api/ps", "GET"),
        ("GET", "/api/delete", "DELETE"),
        ("PUT", "/api/blobs/sha256:0", "POST, HEAD"),
        ("GET", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/models", "GET"),
    ],
)
def test_a_wrong_method_names_the_right_ones(gateway: Gateway, method: str, path: str, allow: str) -> None:
    answer = gateway.call(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert answer.headers["content-type"] == "text/plain"
    assert answer.text == ("" if method == "HEAD" else "405 method not allowed")


def test_who_must_not_ask_is_told_in_the_words_of_the_route(gateway: Gateway) -> None:
    native = say(gateway.port, request("/api/tags", host="evil.example"))
    assert (native.status, list(json.loads(native.body))) == (403, ["error"])
    assert isinstance(json.loads(native.body)["error"], str)
    openai = say(gateway.port, request("/v1/models", host="evil.example"))
    assert (openai.status, openai.error["type"]) == (403, "permission_error")
    assert say(gateway.port, request("/nope", host="evil.example")).error["code"] == "host_not_allowed"


def test_a_key_is_wanted_on_ollamas_routes_too(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o400)
    with gateway_over(tmp_path / "home", (), config={"server": {"key_file": str(key_file)}}) as gateway:
        for path in ("/", "/api/tags", "/api/version", "/v1/models"):
            answer = gateway.call("GET", path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            assert "key" in json.dumps(answer.json()["error"])
            assert gateway.call("GET", path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


# --- nothing is started ---------------------------------------------------------------------------


def test_looking_starts_nothing_and_is_no_use(daemon: Daemon) -> None:
    for path in ("/api/tags", "/api/ps", "/v1/models", "/v1/models/tiny", "/api/version", "/"):
        assert daemon.call("GET", path).status_code == 200
    for instance in ("cpu", "second"):
        assert daemon.instance(instance)["phase"] == "stopped"
    daemon.started("cpu")
    used_at = wait_for_sample(daemon)
    for _ in range(50):
        daemon.get("/api/tags")
        daemon.get("/api/ps")
    assert wait_for_sample(daemon) == used_at


def wait_for_sample(daemon: Daemon) -> str:
    """When the instance was last used, by what its counters say since; they are looked at with each probe."""
    probes = {daemon.instance("cpu")["last_seen_at"]}

    def looked_at() -> bool:
        probes.add(daemon.instance("cpu")["last_seen_at"])
        return len(probes) > 3

    wait_for(looked_at)
    return str(daemon.instance("cpu")["last_used_at"])
