"""The page of models: pulls, loads, copies and deletions, as an operator makes them."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import requests
from playwright.sync_api import expect

from tests.support.daemon import wait_for
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.gateway import gateway_over
from tests.support.keyed import keyed_gateway
from tests.support.ollama import set_knobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Locator

    from tests.support.browser import Visit
    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.gateway import Gateway

    NewVisit = Callable[..., Visit]

# Several tests share two cores.
expect.set_options(timeout=20_000)

MODELS = "/api/runtime/compute/models"
ROLES = {"thinking": {"model": "tiny"}, "control": {"model": "nobody-has:1b"}}
ONE_VOLUME = [{"source": "ollama-models", "target": "/root/.ollama"}]


@pytest.fixture(scope="module")
def daemon(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Instances `one` and `two` with stores of their own; only `one` runs."""
    environment = {"OLLAMA_SIM_PULLABLE": "big:1b,slow:1b"}
    with making_daemons(engine, tmp_path_factory.mktemp("models"), new_manager_id()) as make:
        made = make(
            instances={"one": {"template": "sim-pull", "slots": 4}, "two": {"template": "sim-pull"}},
            templates={"sim-pull": {"env": environment}},
            config={"roles": ROLES},
        ).start()
        made.started("one")
        wait_for(lambda: "tiny:latest" in models_of(made))
        yield made


@pytest.fixture
def visitor(daemon: Daemon, new_visit: NewVisit) -> Visit:
    knobs(daemon, pull_s=0, load_s=0, false_load="")
    for pull in pulls_of(daemon):  # of other tests: their order is random
        daemon.call("DELETE", f"models/pulls/{pull['id']}")
        daemon.call("DELETE", f"models/pulls/{pull['id']}")  # an ended one is forgotten
    wait_for(lambda: pulls_of(daemon) == [])
    found: Visit = new_visit()
    open_page(found, daemon)
    return found


def open_page(visitor: Visit, daemon: Daemon, path: str = "/ui/models") -> None:
    visitor.page.goto(f"{daemon.url}{path}")
    expect(visitor.page.locator("html[data-live=on]")).to_be_attached()


def knobs(daemon: Daemon, **changes: object) -> None:
    set_knobs(daemon.instance("one")["endpoint"], **changes)


def models_of(daemon: Daemon) -> dict[str, Any]:
    return {model["name"]: model for model in daemon.get(MODELS)["models"]}


def pulls_of(daemon: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = daemon.get(MODELS)["pulls"]
    return found


def row(visitor: Visit, name: str) -> Locator:
    return visitor.page.locator(f'.model[data-name="{name}"]')


def opened(visitor: Visit, name: str) -> Locator:
    """The row of a model, with its details."""
    found = row(visitor, name)
    if found.locator("details[open]").count() == 0:
        found.locator("summary").click()
    return found


def answer_dialog(visitor: Visit, answer: str) -> str:
    dialog = visitor.page.locator("#confirm")
    expect(dialog).to_be_visible()
    words = dialog.inner_text()
    dialog.get_by_role("button", name=answer, exact=True).click()
    expect(dialog).to_be_hidden()
    return words


def begin_pull(visitor: Visit, name: str) -> None:
    visitor.page.get_by_label("Model", exact=True).fill(name)
    visitor.page.get_by_role("button", name="Pull", exact=True).click()


def dismiss(visitor: Visit, name: str) -> None:
    button = visitor.page.get_by_role("button", name=f"Dismiss {name}")
    button.click()
    expect(button).to_have_count(0)


# --- pulls ---


def test_a_pull_shows_its_progress_survives_a_reload_and_is_cancelled(daemon: Daemon, visitor: Visit) -> None:
    knobs(daemon, pull_s=40)
    begin_pull(visitor, "slow:1b")
    pulls = visitor.page.get_by_role("region", name="Pulls")
    expect(pulls).to_contain_text("slow:1b")
    expect(pulls).to_contain_text("0 of 1 layers")
    expect(pulls).to_contain_text("742 KiB")
    visitor.page.reload()
    expect(pulls).to_contain_text("slow:1b")  # no client holds it open
    (pull,) = pulls_of(daemon)
    assert (pull["state"], pull["clients"], pull["is_kept"]) == ("pulling", 0, True)
    pulls.get_by_role("button", name="Cancel slow:1b").click()
    assert "What is here already stays" in answer_dialog(visitor, "Yes")
    expect(pulls).to_contain_text("cancelled")
    assert [one["state"] for one in pulls_of(daemon)] == ["cancelled"]
    assert daemon.instance("one")["in_flight"] == 0  # the server is not pulling any more
    dismiss(visitor, "slow:1b")
    expect(pulls).to_be_hidden()
    assert pulls_of(daemon) == []
    assert "slow:1b" not in models_of(daemon)


def test_a_pulled_model_is_listed_at_once(daemon: Daemon, visitor: Visit) -> None:
    begin_pull(visitor, "big:1b")
    expect(row(visitor, "big:1b")).to_be_visible()
    assert models_of(daemon)["big:1b"]["instances"] == ["one"]
    expect(visitor.page.get_by_label("Model", exact=True)).to_have_value("")


def test_a_pull_that_fails_says_why_and_a_wrong_name_is_refused_at_its_field(
    daemon: Daemon, visitor: Visit
) -> None:
    begin_pull(visitor, "unheard-of:1b")
    expect(visitor.page.get_by_role("region", name="Pulls")).to_contain_text("no such host")
    begin_pull(visitor, "thinking")
    expect(visitor.page.locator("#pull-model-problem")).to_contain_text("is a role")
    expect(visitor.page.get_by_label("Model", exact=True)).to_have_attribute("aria-invalid", "true")
    visitor.expect_problem("422")
    dismiss(visitor, "unheard-of:1b")


def test_a_pull_of_a_client_is_shown_and_can_be_cancelled(daemon: Daemon, visitor: Visit) -> None:
    knobs(daemon, pull_s=40)
    lines: list[bytes] = []

    def pull() -> None:
        with requests.post(
            f"{daemon.url}/api/pull", json={"model": "slow:1b"}, stream=True, timeout=60
        ) as answer:
            lines.extend(answer.iter_lines())

    client = threading.Thread(target=pull)
    client.start()
    pulls = visitor.page.get_by_role("region", name="Pulls")
    expect(pulls).to_contain_text("asked for by a client")
    pulls.get_by_role("button", name="Cancel slow:1b").click()
    answer_dialog(visitor, "Yes")
    client.join(20)
    assert "cancelled by an operator" in json.loads(lines[-1])["error"]
    dismiss(visitor, "slow:1b")


def test_a_model_that_only_a_role_names_is_a_warning_with_its_pull(daemon: Daemon, visitor: Visit) -> None:
    warning = visitor.page.locator("#warnings")
    expect(warning).to_contain_text("nobody-has:1b")
    expect(warning).to_contain_text("control")
    warning.get_by_role("button", name="Pull it").click()
    dismiss(visitor, "nobody-has:1b")


def test_what_is_typed_stays_while_models_come_and_values_change(daemon: Daemon, visitor: Visit) -> None:
    field = visitor.page.get_by_label("Model", exact=True)
    field.fill("half-typed")
    copy = opened(visitor, "tiny:latest").get_by_label("New name for a copy of tiny:latest").first
    copy.fill("half-typed, too")
    daemon.call("POST", "/api/copy", json={"source": "minilm@one", "destination": "came"}).raise_for_status()
    expect(row(visitor, "came:latest")).to_be_visible()  # the region was fetched again
    daemon.call("POST", "/api/generate", json={"model": "tiny@one"}).raise_for_status()
    expect(row(visitor, "tiny:latest").locator("summary")).to_contain_text("one · in memory")
    expect(field).to_have_value("half-typed")
    expect(copy).to_have_value("half-typed, too")
    expect(row(visitor, "tiny:latest").locator("details")).to_have_attribute("open", "")
    daemon.call("POST", "/api/generate", json={"model": "tiny@one", "keep_alive": 0}).raise_for_status()


# --- memory ---


def test_a_model_is_loaded_on_an_instance_and_unloaded(daemon: Daemon, visitor: Visit) -> None:
    knobs(daemon, load_s=2)
    tiny = opened(visitor, "tiny:latest")
    tiny.get_by_role("button", name="Load tiny:latest on one").click()
    expect(tiny.locator("summary")).to_contain_text("one · loading")
    expect(tiny.get_by_role("button", name="Load tiny:latest on one")).to_be_disabled()
    expect(tiny.locator("summary")).to_contain_text("one · in memory")
    assert models_of(daemon)["tiny:latest"]["loaded_on"] == ["one"]
    unload = tiny.get_by_role("button", name="Unload tiny:latest from one")
    unload.click()  # the details stayed open
    expect(tiny.locator("summary")).to_contain_text("not loaded")
    assert models_of(daemon)["tiny:latest"]["loaded_on"] == []


def test_a_load_that_fails_says_why(daemon: Daemon, visitor: Visit) -> None:
    knobs(daemon, load_s=2, false_load="nothing")
    tiny = opened(visitor, "tiny:latest")
    tiny.get_by_role("button", name="Load tiny:latest on one").click()
    expect(tiny.locator("summary")).to_contain_text("failed")
    error = models_of(daemon)["tiny:latest"]["error"]
    assert error["reason"] == "model_load_failed"
    expect(tiny).to_contain_text(error["message"])
    visitor.expect_problem("503")
    knobs(daemon, load_s=0, false_load="")
    tiny.get_by_role("button", name="Load tiny:latest on one").click()
    expect(tiny.locator("summary")).to_contain_text("one · in memory")
    assert models_of(daemon)["tiny:latest"]["error"] is None
    tiny.get_by_role("button", name="Unload tiny:latest from one").click()
    expect(tiny.locator("summary")).to_contain_text("not loaded")


def test_a_use_is_shown_when_it_ends(daemon: Daemon, visitor: Visit) -> None:
    minilm = opened(visitor, "minilm:latest")
    expect(minilm).to_contain_text("no use is known")
    answer = daemon.call("POST", "/api/embed", json={"model": "minilm", "input": ["a"]})
    assert answer.status_code == 200
    expect(minilm).to_contain_text("requests: 1")
    expect(minilm.locator("summary")).to_contain_text(" ago")
    assert models_of(daemon)["minilm:latest"]["lately"]["requests"] == 1


# --- copies and deletions ---


def test_a_model_is_copied_and_a_copy_under_a_roles_name_is_refused(daemon: Daemon, visitor: Visit) -> None:
    tiny = opened(visitor, "tiny:latest")
    place = tiny.get_by_role("region", name="tiny:latest on one")
    place.get_by_label("New name for a copy of tiny:latest").fill("thinking")
    place.get_by_role("button", name="Copy").click()
    expect(place.locator(".problem")).to_contain_text("is a role here")
    visitor.expect_problem("400")
    place.get_by_label("New name for a copy of tiny:latest").fill("twin:1b")
    place.get_by_role("button", name="Copy").click()
    expect(row(visitor, "twin:1b")).to_be_visible()
    assert models_of(daemon)["twin:1b"]["instances"] == ["one"]


def test_a_model_is_deleted_after_a_question_that_says_what_it_means(daemon: Daemon, visitor: Visit) -> None:
    tiny = opened(visitor, "tiny:latest")
    delete = tiny.get_by_role("region", name="tiny:latest on one").get_by_role("button", name="Delete")
    delete.click()
    words = answer_dialog(visitor, "No")
    assert "thinking" in words
    assert "742 KiB" in words
    assert "tiny:latest" in models_of(daemon)
    daemon.call("POST", "/api/copy", json={"source": "tiny@one", "destination": "gone:1b"}).raise_for_status()
    gone = opened(visitor, "gone:1b")
    gone.get_by_role("button", name="Delete").click()
    assert "No role uses it" in answer_dialog(visitor, "Yes")
    expect(gone).to_have_count(0)
    assert "gone:1b" not in models_of(daemon)


# --- looks ---


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")]
)
def test_the_page_is_accessible_and_fits(
    daemon: Daemon, new_visit: NewVisit, width: int, scheme: str
) -> None:
    visitor = new_visit(width=width, scheme=scheme)
    open_page(visitor, daemon)
    opened(visitor, "tiny:latest")
    visitor.assert_accessible()
    visitor.assert_fits()


def test_the_details_open_by_keyboard_and_a_live_change_leaves_the_focus(
    daemon: Daemon, visitor: Visit
) -> None:
    summary = row(visitor, "tiny:latest").locator("summary")
    summary.focus()
    visitor.page.keyboard.press("Enter")
    visitor.page.keyboard.press("Tab")
    visitor.page.keyboard.press("Tab")
    focused = visitor.page.locator(":focus")
    expect(focused).to_have_text("one")
    daemon.call("POST", "/api/generate", json={"model": "tiny@one", "keep_alive": -1}).raise_for_status()
    expect(summary).to_contain_text("in memory")
    expect(focused).to_have_text("one")
    daemon.call("POST", "/api/generate", json={"model": "tiny@one", "keep_alive": 0}).raise_for_status()
    expect(summary).to_contain_text("not loaded")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    names = ",".join(f"model{number:03}:1b" for number in range(200))
    roles = {"roles": {"control": {"model": "model150:1b"}}}
    with gateway_over(
        tmp_path_factory.mktemp("many"), ("nas",), knobs={"nas": {"models": names}}, config=roles
    ) as gateway:
        yield gateway


def test_a_long_list_is_searched_and_sorted_and_a_reload_keeps_both(
    many: Gateway, new_visit: NewVisit
) -> None:
    visitor = new_visit()
    open_page(visitor, many)
    rows = visitor.page.locator(".model:visible")
    expect(rows).to_have_count(200)
    shape = "JSON.stringify([...document.querySelectorAll('.model summary')].map((one) => one.offsetHeight))"
    before = visitor.page.evaluate(shape)
    many.call("POST", "/api/generate", json={"model": "model120:1b", "prompt": "hi"}).raise_for_status()
    expect(row(visitor, "model120:1b").locator("summary")).to_contain_text("ago")
    assert visitor.page.evaluate(shape) == before  # nothing jumps
    expect(rows.first).to_have_attribute("data-name", "model000:1b")  # nor moves by itself
    visitor.page.get_by_label("Order").select_option("used")
    expect(rows.first).to_have_attribute("data-name", "model120:1b")
    visitor.page.get_by_label("Name, family, role, instance").fill("model15")
    expect(rows).to_have_count(10)
    expect(visitor.page.locator("#models-count")).to_have_text("10 of 200")
    visitor.page.get_by_label("Name, family, role, instance").fill("control")
    expect(rows).to_have_count(1)
    visitor.page.reload()
    expect(rows).to_have_count(1)
    expect(visitor.page.get_by_label("Order")).to_have_value("used")
    visitor.page.get_by_label("Name, family, role, instance").fill("nothing like that")
    expect(visitor.page.get_by_text("No model matches.")).to_be_visible()


def test_a_list_without_models_says_what_to_do(tmp_path: Path, new_visit: NewVisit) -> None:
    with gateway_over(tmp_path, ()) as gateway:
        visitor = new_visit()
        open_page(visitor, gateway)
        expect(visitor.page.get_by_text("No models yet.")).to_be_visible()
        visitor.assert_accessible()
        visitor.page.close()


def test_one_name_for_two_models_is_a_warning(tmp_path: Path, new_visit: NewVisit) -> None:
    with gateway_over(tmp_path, ("a", "b"), knobs={"b": {"models": "minilm"}}) as gateway:
        body = {"model": "tiny", "from": "minilm", "stream": False}
        requests.post(f"{gateway.servers['b'].url}/api/create", json=body, timeout=10).raise_for_status()
        visitor = new_visit()
        open_page(visitor, gateway)
        warning = visitor.page.locator("#warnings")
        expect(warning).to_contain_text("tiny:latest is not the same on all instances")
        digests = {place["digest"] for place in models_of(gateway)["tiny:latest"]["places"]}
        assert len(digests) == 2
        for digest in digests:
            expect(warning).to_contain_text(digest[:12])
        expect(row(visitor, "tiny:latest")).to_contain_text("differs")
        visitor.page.close()


# --- who may what ---


def test_a_key_that_may_read_sees_no_buttons(tmp_path: Path, new_visit: NewVisit) -> None:
    with keyed_gateway(tmp_path) as keyed:
        secret = keyed.make("looker", "read")
        visitor = new_visit()
        visitor.page.goto(f"{keyed.gateway.url}/sign-in?next=/ui/models")
        visitor.page.get_by_label("Key").fill(secret)
        visitor.page.get_by_role("button", name="Sign in").click()
        expect(visitor.page.get_by_text("This key may look only.")).to_be_visible()
        opened(visitor, "tiny:latest")
        names = [one.inner_text() for one in visitor.page.get_by_role("main").get_by_role("button").all()]
        assert names == []
        assert visitor.page.locator("[hx-post], [hx-delete]").count() == 0
        visitor.assert_accessible()
        visitor.page.close()


# --- hostile names ---

BODIES = "[...document.querySelectorAll('[data-body]')].map((one) => JSON.parse(one.dataset.body).model)"

HOSTILE = (
    "<script>document.title='owned'</script>",
    "\"'><img src=x onerror=\"document.title='owned'\">",
    "'}' hx-on:click='alert(1)",
    "{{ 7*7 }} {% raw %} ${7*7}",
    "name with spaces@one",
    "../../etc/passwd",
    "\u202egnp.evil\u202c \u0000 \x1b[31m",
    "x" * 600,
)


class _Hostile(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        details = {"family": HOSTILE[0], "parameter_size": HOSTILE[1], "quantization_level": HOSTILE[2]}
        entries = [{"name": name, "size": 1, "digest": HOSTILE[0], "details": details} for name in HOSTILE]
        documents = {"/api/version": {"version": "0.24.0"}, "/api/tags": {"models": entries}}
        self._send(documents.get(self.path, {"models": []}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send({"capabilities": [HOSTILE[0]], "model_info": {}})

    def _send(self, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hostile_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hostile) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_hostile_names_are_text(tmp_path: Path, new_visit: NewVisit) -> None:
    with hostile_server() as url:
        instances = {"one": {"driver": "external", "url": url}}
        with gateway_over(tmp_path, (), instances=instances) as gateway:
            wait_for(lambda: len(models_of(gateway)) >= len(HOSTILE) - 1)
            for width in (1280, 360):
                visitor = new_visit(width=width)
                open_page(visitor, gateway)
                for summary in visitor.page.locator("summary").all():
                    summary.click()
                expect(visitor.page).to_have_title(re.compile("^Models"))
                expect(visitor.page.get_by_text(HOSTILE[0], exact=True).first).to_be_visible()
                assert visitor.page.locator("main img, main script").count() == 0
                visitor.assert_fits()
                visitor.page.get_by_role("button", name="Delete").first.click()
                answer_dialog(visitor, "No")
                bodies = visitor.page.evaluate(BODIES)
                names = set(models_of(gateway))
                assert set(bodies) == names | {f"{name}@one" for name in names}
                visitor.page.close()


def test_a_link_names_a_model_to_pull(daemon: Daemon, visitor: Visit) -> None:
    visitor.page.goto(f"{daemon.url}/ui/models?pull=a%22%3Eb")
    expect(visitor.page.get_by_label("Model", exact=True)).to_have_value('a">b')
