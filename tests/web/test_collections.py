"""The page of collections, over a real daemon and a server whose embedding model can be replaced."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from tests.support.daemon import wait_for
from tests.support.embedding_server import TOO_LONG, EmbeddingServer
from tests.support.gateway import NO_ENGINE, Gateway, gateway_over
from tests.support.keyed import keyed_gateway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from playwright.sync_api import Locator

    from tests.support.browser import Visit

COLLECTIONS = "/api/v1/collections"
HOSTILE = "<script>window.hit=1</script><img src=x onerror=window.hit=1>"


class Stage:
    """A daemon, the server behind it, and whether that one embeds the items of a backfill now."""

    def __init__(self, daemon: Gateway, server: EmbeddingServer) -> None:
        self.daemon = daemon
        self.server = server
        self._may_embed = threading.Event()
        self._may_embed.set()
        server.before_answer = self._wait

    def _wait(self, texts: Sequence[str]) -> None:
        # A query and the text that shows the build pass.
        if any("held" in text for text in texts):
            assert self._may_embed.wait(60)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no text with the word `held` be embedded meanwhile."""
        self._may_embed.clear()
        try:
            yield
        finally:
            self._may_embed.set()

    def call(self, method: str, path: str, **options: Any) -> Any:
        answer = self.daemon.call(method, f"{COLLECTIONS}{path}", **options)
        assert answer.ok, answer.text
        return answer.json()

    def collection(self, name: str, *texts: str, **options: Any) -> str:
        """Make a collection with these texts; return its name."""
        self.call("POST", "", json={"name": name, "model": "minilm", **options})
        if texts:
            items = [{"id": f"i{at}", "text": text, "metadata": {"n": at}} for at, text in enumerate(texts)]
            self.call("PUT", f"/{name}/items", json={"items": items})
        return name

    def versions(self, name: str) -> dict[str, str]:
        """Return the states of the versions by their ids."""
        return {one["version"]: one["state"] for one in self.call("GET", f"/{name}/versions")}

    def active(self, name: str) -> str:
        found: str = self.call("GET", f"/{name}")["version"]
        return found

    def replaced(self, build: str, *names: str) -> None:
        """Replace the model by another build; wait until the versions of these collections are stale."""
        self.server.become(build)
        for name in names:
            wait_for(lambda name=name: self.state(name), lambda state: state == "stale")  # type: ignore[misc]

    def listed(self) -> list[str]:
        """Return the builds that the daemon lists; it reads the list of the server anew."""
        return [one["digest"] for one in self.daemon.call("GET", "/api/tags").json()["models"]]

    def state(self, name: str) -> Any:
        self.listed()
        return self.call("GET", f"/{name}")["state"]

    def filled(self, name: str, **options: Any) -> str:
        """Do a backfill from beginning to end; return its version."""
        version: str = self.call("POST", f"/{name}/backfill", json=options)["version"]
        wait_for(lambda: self.call("GET", f"/{name}/backfill")["status"], lambda status: status != "running")
        return version


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with EmbeddingServer() as server:
        instances = {"one": {"driver": "external", "url": server.url}}
        with gateway_over(tmp_path_factory.mktemp("collections"), (), instances=instances) as daemon:
            daemon.wait_until_usable("one")
            yield Stage(daemon, server)


@pytest.fixture(autouse=True)
def _first_build(stage: Stage) -> None:
    """Each test begins with the same build of the model, and the daemon knows it."""
    stage.server.become("first")
    wait_for(lambda: stage.listed() == [stage.server.digest])


@pytest.fixture
def visitor(new_visit: Callable[..., Visit]) -> Visit:
    return new_visit()


def seen(visitor: Visit, stage: Stage, name: str = "", **query: str) -> None:
    wanted = "&".join(f"{key}={value}" for key, value in ({"name": name} if name else query).items())
    visitor.page.goto(f"{stage.daemon.url}/ui/collections?{wanted}")


def row(visitor: Visit, name: str) -> Locator:
    return visitor.page.locator(f"[data-collection='{name}']")


def version_row(visitor: Visit, version: str) -> Locator:
    return visitor.page.locator(f"[data-version='{version}']")


def confirm(visitor: Visit, words: str) -> None:
    """Say yes to a question that has these words."""
    dialog = visitor.page.locator("#confirm")
    expect(dialog).to_contain_text(words)
    dialog.get_by_role("button", name="Yes").click()


def search(visitor: Visit, text: str, *, version: str = "", k: str = "10") -> Locator:
    """Try a query; return its hits."""
    form = visitor.page.locator("#query form")
    form.get_by_label("Text").fill(text)
    form.get_by_label("Hits at most").fill(k)
    form.get_by_label("Version").fill(version)
    form.get_by_role("button", name="Search").click()
    return visitor.page.locator("#hits")


def test_a_model_change_from_stale_to_cut_over_and_back(visitor: Visit, stage: Stage) -> None:
    page, name = visitor.page, stage.collection("change", "held a", "held b", "c")
    first = stage.active(name)
    seen(visitor, stage)
    expect(row(visitor, name)).to_contain_text("100 %")
    expect(row(visitor, name).locator(".state-ok")).to_have_text("active")
    stage.replaced("change-2", name)
    expect(row(visitor, name).locator(".state-bad")).to_have_text("stale")
    expect(row(visitor, name)).to_contain_text("Begin a backfill, or pull the former build.")
    row(visitor, name).get_by_role("link", name=name).click()
    expect(page.locator("#stale")).to_contain_text(first)
    expect(page.locator("#stale")).to_contain_text("What to do:")
    with stage.held():
        page.get_by_role("button", name="Begin a backfill").click()
        dialog = page.get_by_role("dialog", name="Begin a backfill")
        dialog.get_by_label("Cut-over from (% of the items)").fill("60")
        dialog.get_by_label("Items a second at most").fill("500")
        visitor.assert_accessible()
        dialog.get_by_role("button", name="Begin", exact=True).click()
        expect(dialog).to_be_hidden()
        backfill = page.locator("#backfill")
        expect(backfill.locator("p.row .state-work")).to_have_text("running")
        expect(backfill).to_contain_text("0 of 3 items")
        told = stage.call("GET", f"/{name}/backfill")
        assert (told["threshold"], told["rate"], told["auto_cutover"]) == (0.6, 500, False)
        second = told["version"]
        expect(version_row(visitor, second).locator(".state-work")).to_have_text("building")
        backfill.get_by_role("button", name="Pause").click()
        expect(backfill.locator("p.row .state-warn")).to_have_text("paused")
        backfill.get_by_role("button", name="Resume").click()
        expect(backfill.locator("p.row .state-work")).to_have_text("running")
    expect(backfill.locator("p.row .state-ok")).to_have_text("done")
    expect(backfill).to_contain_text("3 of 3 items")
    version_row(visitor, second).get_by_role("button", name="Cut over").click()
    confirm(visitor, f"Make version {second} of minilm")
    expect(page.locator("#collection .state-ok")).to_have_text("active")
    expect(page.locator("#stale")).to_have_count(0)
    expect(version_row(visitor, first).locator(".state-off")).to_have_text("archived")
    assert stage.active(name) == second


def test_a_roll_back_needs_the_former_build(visitor: Visit, stage: Stage) -> None:
    page, name = visitor.page, stage.collection("back", "a", "b", "c")
    first = stage.active(name)
    stage.replaced("back-2", name)
    second = stage.filled(name)
    stage.call("POST", f"/{name}/cutover", json={"version": second})
    seen(visitor, stage, name)
    page.get_by_role("button", name="Roll back").click()
    confirm(visitor, f"Go back to version {first}")
    expect(page.locator("#toasts .notice-bad")).to_contain_text("version_stale")
    visitor.expect_problem("409")
    stage.server.become("first")
    wait_for(lambda: stage.state(name), lambda state: state == "stale")
    page.get_by_role("button", name="Roll back").click()
    confirm(visitor, f"Go back to version {first}")
    expect(version_row(visitor, first).locator(".state-ok")).to_have_text("active")
    assert stage.active(name) == first
    version_row(visitor, second).get_by_role("button", name="Delete").click()
    confirm(visitor, "with the vectors of 3 items")
    expect(version_row(visitor, second)).to_have_count(0)
    assert set(stage.versions(name)) == {first}


def test_a_cut_over_below_the_threshold_says_what_is_missing(visitor: Visit, stage: Stage) -> None:
    name = stage.collection("below", "held a", "held b")
    first = stage.active(name)
    stage.replaced("below-2", name)
    with stage.held():
        second = stage.call("POST", f"/{name}/backfill")["version"]
        seen(visitor, stage, name)
        version_row(visitor, second).get_by_role("button", name="Cut over").click()
        confirm(visitor, "It has vectors of 0 of 2 items")
        expect(visitor.page.locator("#toasts .notice-bad")).to_contain_text("2 are missing")
        visitor.expect_problem("409")
        assert stage.active(name) == first
        visitor.page.get_by_role("button", name="Cancel").first.click()
        confirm(visitor, "Cancel the backfill?")
        expect(visitor.page.locator("#backfill p.row .state-off")).to_have_text("cancelled")


def test_a_backfill_cuts_over_by_itself_where_that_is_wished(visitor: Visit, stage: Stage) -> None:
    name = stage.collection("alone", "a", "b")
    stage.replaced("alone-2", name)
    seen(visitor, stage, name)
    visitor.page.get_by_role("button", name="Begin a backfill").click()
    dialog = visitor.page.get_by_role("dialog", name="Begin a backfill")
    dialog.get_by_label("Cut over by itself").check()
    dialog.get_by_role("button", name="Begin", exact=True).click()
    expect(visitor.page.locator("#collection .state-ok")).to_have_text("active")
    expect(visitor.page.locator("#versions tbody tr")).to_have_count(2)
    expect(visitor.page.locator("#backfill p.row .state-ok")).to_have_text("done")


def test_what_is_wrong_in_the_form_of_a_backfill_is_told_at_its_field(visitor: Visit, stage: Stage) -> None:
    name = stage.collection("form", "a")
    seen(visitor, stage, name)
    visitor.page.get_by_role("button", name="Begin a backfill").click()
    dialog = visitor.page.get_by_role("dialog", name="Begin a backfill")
    dialog.get_by_label("Cut-over from (% of the items)").fill("150")
    dialog.get_by_role("button", name="Begin", exact=True).click()
    expect(dialog.locator("#begin-threshold-problem")).not_to_be_empty()
    visitor.expect_problem("422")
    dialog.get_by_label("Cut-over from (% of the items)").fill("100")
    dialog.get_by_role("button", name="Begin", exact=True).click()
    expect(dialog.locator("[data-problem]")).to_contain_text("nothing_to_do")
    visitor.expect_problem("409")
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()


def test_items_that_cannot_be_embedded_are_listed_with_the_reason(visitor: Visit, stage: Stage) -> None:
    name = stage.collection("failing", "a", f"{TOO_LONG} {HOSTILE}", truncate=True)
    stage.replaced("failing-2", name)
    stage.filled(name, truncate=False)
    seen(visitor, stage, name)
    backfill = visitor.page.locator("#backfill")
    failure = backfill.locator("tbody tr")
    expect(failure).to_have_count(1)
    expect(failure).to_contain_text("i1")
    expect(failure.locator(".state-bad")).to_have_text("in quarantine")
    expect(failure).to_contain_text("exceeds the context length")
    expect(backfill).to_contain_text("1 of 2 items")
    visitor.assert_accessible()


def test_a_query_shows_its_hits_and_marks_a_version_that_is_not_active(visitor: Visit, stage: Stage) -> None:
    name = stage.collection("query", "a", "b", "c")
    first = stage.active(name)
    item = {"id": HOSTILE, "text": "d", "metadata": {"html": HOSTILE}}
    stage.call("PUT", f"/{name}/items", json={"items": [item]})
    seen(visitor, stage, name)
    hits = search(visitor, "a")
    expect(hits.locator("tbody tr")).to_have_count(4)
    expect(hits.locator("tbody tr").first).to_contain_text("1.0000")
    expect(hits.locator("tbody tr").first).to_contain_text('{"n":0}')
    expect(hits).to_contain_text(HOSTILE)
    expect(hits.locator(".tag")).to_have_count(0)
    expect(search(visitor, "b", k="1").locator("tbody tr")).to_have_count(1)
    visitor.assert_accessible()
    stage.replaced("query-2", name)
    second = stage.filled(name)
    stage.call("POST", f"/{name}/cutover", json={"version": second})
    stage.server.become("first")
    hits = search(visitor, "a", version=first)
    expect(hits.locator("tbody tr")).to_have_count(4)
    expect(hits.locator("p .tag-warn")).to_have_text("not active: archived")
    expect(hits.locator("tbody .tag-warn")).to_have_count(4)
    search(visitor, "", version=first)
    expect(visitor.page.locator("#query [data-problem]")).to_contain_text("`text`")
    expect(hits.locator("tbody tr")).to_have_count(0)
    visitor.expect_problem("422")
    search(visitor, "a", k="1001")
    expect(visitor.page.locator("#query-k-problem")).to_contain_text("1 to 1000")
    visitor.expect_problem("422")
    search(visitor, "a", version="0" * 16)
    expect(visitor.page.locator("#query [data-problem]")).to_contain_text(f"there are: {first}")
    visitor.expect_problem("404")
    assert visitor.page.evaluate("window.hit") is None


def test_what_is_typed_stays_while_the_page_is_brought_up_to_date(visitor: Visit, stage: Stage) -> None:
    name = stage.collection("typed", "held a", "b")
    stage.replaced("typed-2", name)
    with stage.held():
        seen(visitor, stage, name)
        visitor.page.locator("#query-text").fill("half a query")
        version = stage.call("POST", f"/{name}/backfill")["version"]
        # The page polls seldom before it knows of the backfill, and often from then on.
        expect(version_row(visitor, version)).to_be_visible()
        expect(visitor.page.locator("#collection[data-polls=often]")).to_be_attached()
        expect(visitor.page.locator("#query-text")).to_have_value("half a query")
    expect(visitor.page.locator("#backfill p.row .state-ok")).to_have_text("done")
    expect(visitor.page.locator("#query-text")).to_have_value("half a query")


def test_a_collection_is_deleted_after_a_question_that_says_what_it_costs(
    visitor: Visit, stage: Stage
) -> None:
    name = stage.collection("gone", "a", "b")
    seen(visitor, stage, name)
    visitor.page.get_by_role("button", name="Delete the collection").click()
    confirm(visitor, "2 items with their texts and metadata, and the vectors of all versions (1)")
    expect(visitor.page).to_have_url(f"{stage.daemon.url}/ui/collections")
    expect(row(visitor, name)).to_have_count(0)
    assert stage.daemon.call("GET", f"{COLLECTIONS}/{name}").status_code == 404
    seen(visitor, stage, name)
    expect(visitor.page.get_by_text("This collection is not known.")).to_be_visible()


def test_the_list_finds_names_and_models(visitor: Visit, stage: Stage) -> None:
    for number in range(11):
        stage.collection(f"many-{number}", prefix=HOSTILE)
    seen(visitor, stage)
    visitor.page.get_by_label("Name or model").fill("MANY-7")
    visitor.page.get_by_role("button", name="Find").click()
    expect(visitor.page.locator("[data-collection]")).to_have_count(1)
    expect(row(visitor, "many-7")).to_contain_text("no items yet")
    row(visitor, "many-7").get_by_role("link").click()
    expect(visitor.page.locator("#collection")).to_contain_text(HOSTILE)
    expect(visitor.page.get_by_text("No version yet.")).to_be_visible()
    expect(search(visitor, "a")).to_contain_text("The collection has no items yet.")
    seen(visitor, stage, search="%3Cscript%3E")
    expect(visitor.page.get_by_text("No collection has this name or model.")).to_be_visible()
    assert visitor.page.evaluate("window.hit") is None


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_is_accessible_and_fits(
    stage: Stage, new_visit: Callable[..., Visit], width: int, scheme: str
) -> None:
    visitor, name = new_visit(width=width, scheme=scheme), f"looks-{width}"
    stage.collection(name, "held a", "b", f"{TOO_LONG}", truncate=True, prefix="search_document: " * 8)
    stage.replaced(name, name)
    with stage.held():
        stage.call("POST", f"/{name}/backfill", json={"truncate": False})
        seen(visitor, stage)
        expect(row(visitor, name)).to_contain_text("running")
        narrow = row(visitor, name).locator(".narrow-only")
        expect(narrow).to_be_visible(visible=width < 800)
        visitor.assert_accessible()
        visitor.assert_fits()
        seen(visitor, stage, name)
        expect(visitor.page.locator("#stale")).to_be_visible()
        visitor.assert_accessible()
        visitor.assert_fits()
    expect(visitor.page.locator("#backfill p.row .state-ok")).to_have_text("done")
    visitor.page.get_by_role("button", name="Begin a backfill").focus()
    visitor.page.keyboard.press("Enter")
    expect(visitor.page.get_by_role("dialog", name="Begin a backfill")).to_be_visible()
    visitor.assert_accessible()
    visitor.assert_fits()
    visitor.page.keyboard.press("Escape")


# --- who sees what --------------------------------------------------------------------------------


def test_a_key_sees_and_does_what_its_scope_permits(tmp_path: Path, new_visit: Callable[..., Visit]) -> None:
    with EmbeddingServer() as server:
        instances = {"one": {"driver": "external", "url": server.url}}
        with keyed_gateway(tmp_path, (), instances=instances) as keyed:
            wait_for(lambda: keyed.ask("GET", "/api/tags").json()["models"])
            keys = {
                "look": ["read"],
                "opera": ["operator"],
                "both": ["read", "client"],
                "program": ["client"],
            }
            for name, scopes in keys.items():
                keyed.make(name, *scopes)
            made = keyed.ask("POST", COLLECTIONS, json={"name": "docs", "model": "minilm"})
            assert made.status_code == 201, made.text
            put = keyed.ask("PUT", f"{COLLECTIONS}/docs/items", json={"items": [{"id": "a", "text": "a"}]})
            assert put.ok, put.text
            parts = ("#collection", "#versions", "#begin-backfill", "#collection .button-bad", "#query")
            shown = {}
            for name in ("root", *keys):
                header = {"Authorization": f"Bearer {keyed.secrets[name]}"}
                visitor = new_visit(extra_http_headers=header)
                visitor.page.goto(f"{keyed.gateway.url}/ui/collections?name=docs")
                shown[name] = [visitor.page.locator(part).count() > 0 for part in parts]
                if name == "program":
                    visitor.expect_problem("403")
            assert shown == {
                "root": [True, True, True, True, True],
                "look": [True, True, False, False, False],
                "opera": [True, True, True, True, False],
                "both": [True, True, False, False, True],
                "program": [False, False, False, False, False],
            }


def test_without_the_extra_the_page_says_what_to_install(
    tmp_path: Path, new_visit: Callable[..., Visit]
) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import sys\nsys.modules['lancedb'] = None\n")
    config = {"gpus": "none", "instances": {}}
    with Gateway(
        tmp_path / "home", config, engine_url=NO_ENGINE, environment={"PYTHONPATH": str(hook)}
    ) as daemon:
        daemon.start(until_ready=False)
        daemon.wait_until_alive()
        visitor = new_visit()
        visitor.page.goto(f"{daemon.url}/ui/collections")
        expect(visitor.page.get_by_text("Collections are not installed.")).to_be_visible()
        expect(visitor.page.locator(".empty")).to_contain_text("ollama-endpoint-manager[embeddings]")
        visitor.assert_accessible()
