"""Embedding versions over the daemon as its users have it: killed, replaced, and asked while it cuts over."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.support.daemon import ROOT, Daemon, wait_for
from tests.support.embedding_server import MODEL, TOO_LONG, EmbeddingServer, vector_of
from tests.support.replacing import Replaceable, processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.integration.conftest import NewDaemon
    from tests.support.nursery import Process

__all__ = ["processes"]

BASE = "/api/v1/collections"
DOCS = f"{BASE}/docs"
BATCH = 128
# More by hand: BACKFILL_KILLS=30.
KILLS = int(os.environ.get("BACKFILL_KILLS", "8"))
ITEMS = 150 * KILLS
REPLACEMENTS = 3
# Queries that are due in a second of cut-overs, clients that ask them, and answers between two cut-overs at
# least. Two cores answer about 100 a second while they have other work: the clients then ask as fast as that.
QUERIES_PER_S, ASKERS, ANSWERED = 200, 32, 100
JSON = {"Content-Type": "application/json"}


class Docs:
    """A daemon with one external server, and its collection `docs` as a client sees it."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def ask(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        answer = self.daemon.call(method, path, **({} if body is None else {"json": body}))
        assert answer.status_code == status, (method, path, answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def create(self, **more: Any) -> None:
        self.ask("POST", BASE, {"name": "docs", "model": MODEL, **more}, status=201)

    def put(self, texts: dict[str, str], **more: Any) -> Any:
        items = [{"id": one, "text": text, **more} for one, text in texts.items()]
        return self.ask("PUT", f"{DOCS}/items", {"items": items})

    def query(self, text: str, **more: Any) -> Any:
        return self.ask("POST", f"{DOCS}/query", {"text": text, "k": 3, **more})

    def versions(self) -> list[dict[str, Any]]:
        found = self.ask("GET", f"{DOCS}/versions")
        versions: list[dict[str, Any]] = found["versions"] if isinstance(found, dict) else found
        return versions

    def version(self, state: str) -> dict[str, Any]:
        (found,) = [one for one in self.versions() if one["state"] == state]
        return found

    def backfill(self, **wanted: Any) -> Any:
        return self.ask("POST", f"{DOCS}/backfill", wanted, status=202)

    def progress(self) -> Any:
        return self.ask("GET", f"{DOCS}/backfill")

    def ended(self, status: str = "succeeded") -> Any:
        found = wait_for(self.progress, lambda one: one["status"] not in {"running", "paused"})
        assert found["status"] == status, found
        return found

    def assert_finds(self, texts: dict[str, str], ids: Sequence[str]) -> None:
        """Each text finds its own item, with a score of 1, in the active version."""
        active = self.version("active")["version"]
        for one in ids:
            answer = self.query(texts[one])
            assert answer["version"] == active
            best = answer["items"][0]
            assert (best["id"], best["embedding_version"]) == (one, active)
            assert best["score"] == pytest.approx(1.0, abs=1e-5)


@contextmanager
def rig(home: Path, server: EmbeddingServer, **more: Any) -> Iterator[Docs]:
    config = {
        "gpus": "none",
        "instances": {"one": {"driver": "external", "url": server.url, **more}},
        "lifecycle": {"probe_interval_s": 0.5, "resync_interval_s": 1},
    }
    with Daemon(home, config, engine_url="unix:///nonexistent/docker.sock") as daemon:
        yield Docs(daemon)


def start(docs: Docs) -> None:
    docs.daemon.start(until_ready=False)
    docs.daemon.wait_until_alive()


@pytest.fixture
def server() -> Iterator[EmbeddingServer]:
    with EmbeddingServer() as found:
        yield found


@pytest.fixture
def docs(tmp_path: Path, server: EmbeddingServer) -> Iterator[Docs]:
    with rig(tmp_path, server) as found:
        start(found)
        found.create()
        yield found


def texts_of(number: int) -> dict[str, str]:
    return {f"item-{at}": f"the text of item {at}" for at in range(number)}


def wait_for_more(seen: list[str]) -> None:
    """Wait until some more queries were answered."""
    wanted = len(seen) + ANSWERED
    wait_for(lambda: len(seen) >= wanted)


def put_all(docs: Docs, texts: dict[str, str]) -> None:
    """Write texts in calls of a thousand."""
    known = list(texts.items())
    for start in range(0, len(known), 1000):
        docs.put(dict(known[start : start + 1000]))


def wait_until_advanced(docs: Docs) -> None:
    """Wait until a backfill has embedded more, or has ended."""
    before = docs.progress()["rows"]
    wait_for(docs.progress, lambda one: one["rows"] > before or one["status"] != "running")


def wait_for_texts(docs: Docs, server: EmbeddingServer, more: int) -> None:
    """Wait until so many more texts have been embedded, or the backfill has ended."""
    wanted = len(server.texts) + more
    wait_for(lambda: len(server.texts) >= wanted or docs.progress()["status"] != "running")


def test_a_backfill_that_is_killed_again_and_again_repeats_one_batch_at_most(
    docs: Docs, server: EmbeddingServer
) -> None:
    texts = texts_of(ITEMS)
    put_all(docs, texts)
    first = docs.version("active")["version"]
    server.become("second")
    before = len(server.texts)
    chance = random.Random(ITEMS)
    docs.backfill(rate=1000)
    for kill in range(KILLS):
        if docs.progress()["status"] != "running":
            break
        # What is changed meanwhile is right at the end, wherever the process ends.
        one = f"item-{chance.randrange(ITEMS)}"
        texts[one] = f"changed before kill {kill}"
        assert docs.put({one: texts[one]})["versions"] == [docs.progress()["version"]]
        gone = f"item-{chance.randrange(ITEMS)}"
        if gone in texts:
            docs.ask("DELETE", f"{DOCS}/items/{gone}")
            del texts[gone]
        wait_for_texts(docs, server, chance.randint(1, BATCH))
        docs.daemon.kill()
        start(docs)
    done = docs.ended()
    assert (done["coverage"], done["missing"], done["quarantined"]) == (1.0, 0, 0)
    assert done["rows"] == done["items"] == len(texts)
    # One batch and one change a kill, and the text that shows the build.
    assert len(server.texts) - before <= ITEMS + KILLS * (BATCH + 1) + 1
    building = docs.version("building")["version"]
    docs.ask("POST", f"{DOCS}/cutover", {"version": building})
    docs.assert_finds(texts, random.Random(1).sample(sorted(texts), 20))
    by_id = {one["version"]: one for one in docs.versions()}
    assert by_id[first]["state"] == "archived"
    assert by_id[first]["coverage"] < 1.0, "it has no vectors of what was changed since"


def test_queries_during_a_cut_over_and_a_roll_back_are_each_of_one_version(
    docs: Docs, server: EmbeddingServer
) -> None:
    texts = texts_of(200)
    docs.put(texts)
    # A second version of the same build: both can be queried by text at any time.
    docs.backfill(prefix="search: ")
    docs.ended()
    versions = {one["version"] for one in docs.versions()}
    assert len(versions) == 2
    stop = threading.Event()
    problems: list[Any] = []
    seen: list[str] = []
    ids, numbers, began = sorted(texts), count(), time.monotonic()

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        with closing(http.client.HTTPConnection("127.0.0.1", docs.daemon.port, timeout=30)) as connection:
            # Each query has its time, whoever asks it.
            while not stop.wait(max(0.0, began + next(numbers) / QUERIES_PER_S - time.monotonic())):
                one = chance.choice(ids)
                connection.request("POST", f"{DOCS}/query", json.dumps({"text": texts[one], "k": 3}), JSON)
                answer = connection.getresponse()
                found = json.loads(answer.read())
                if answer.status != 200:
                    problems.append(found)
                    continue
                seen.append(found["version"])
                best = found["items"][0]
                if (
                    {hit["embedding_version"] for hit in found["items"]} != {found["version"]}
                    or best["id"] != one
                    or best["score"] < 0.9999
                ):
                    problems.append(found)

    with ThreadPoolExecutor(ASKERS) as pool:
        asking = [pool.submit(ask, seed) for seed in range(ASKERS)]
        try:
            for _ in range(3):
                wait_for_more(seen)
                (other,) = versions - {docs.version("active")["version"]}
                docs.ask("POST", f"{DOCS}/cutover", {"version": other})
            wait_for_more(seen)
            docs.ask("POST", f"{DOCS}/rollback")
            wait_for_more(seen)
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert problems == []
    assert set(seen) == versions
    assert len(seen) >= 4 * ANSWERED


def test_a_model_that_is_replaced_is_noticed_before_a_vector_of_it_is_stored_or_asked_for(
    docs: Docs, server: EmbeddingServer
) -> None:
    docs.put({"a": "alpha", "b": "beta"})
    active = docs.version("active")["version"]

    # The build changes while a text is embedded: after the request has come, before its answer.
    def change(_texts: Sequence[str]) -> None:
        server.become("second")

    server.before_answer = change
    for method, path, body in (
        ("POST", f"{DOCS}/query", {"text": "alpha"}),
        ("PUT", f"{DOCS}/items", {"items": [{"id": "c", "text": "gamma"}]}),
    ):
        answer = docs.ask(method, path, body, status=409)
        assert answer["error"]["code"] == "version_stale"
    assert docs.ask("GET", f"{DOCS}/items/c", status=404)["error"]["code"] == "unknown_item"
    wait_for(lambda: [one["state"] for one in docs.versions()] == ["stale"])
    assert "version_stale" in [event["kind"] for event in docs.daemon.events()]
    server.before_answer = lambda _texts: None
    # A vector is compared with the old ones: it embeds nothing.
    vector = docs.ask("GET", f"{DOCS}/items/a?vector=true")["vector"]
    found = docs.ask("POST", f"{DOCS}/query", {"vector": vector, "k": 1})
    assert (found["version"], found["items"][0]["id"]) == (active, "a")
    # The former build is there again: a write asks for it, once a second at most.
    server.become("first")
    item = {"items": [{"id": "c", "text": "gamma"}]}
    wait_for(lambda: docs.daemon.call("PUT", f"{DOCS}/items", json=item).status_code == 200)
    docs.assert_finds({"c": "gamma"}, ["c"])
    assert [one["state"] for one in docs.versions()] == ["active"]


def test_a_former_version_that_a_backfill_has_filled_can_be_rolled_back_to(docs: Docs) -> None:
    docs.put({"a": "alpha"})
    first = docs.version("active")["version"]
    docs.backfill(prefix="passage: ")
    docs.ended()
    docs.ask("POST", f"{DOCS}/cutover", {"version": docs.version("building")["version"]})
    docs.put({"b": "beta"})
    error = docs.ask("POST", f"{DOCS}/rollback", status=409)["error"]
    assert (error["code"], error["details"]["missing_ids"]) == ("below_threshold", ["b"])
    docs.backfill(prefix="")
    docs.ended()
    docs.ask("POST", f"{DOCS}/rollback")
    assert docs.version("active")["version"] == first
    docs.assert_finds({"a": "alpha", "b": "beta"}, ["a", "b"])


def test_what_is_written_during_a_backfill_is_in_both_versions(docs: Docs, server: EmbeddingServer) -> None:
    texts = texts_of(100)
    docs.put(texts)
    docs.backfill(prefix="passage: ", rate=40)
    numbers = count()
    while docs.progress()["status"] == "running":
        at = next(numbers)
        new = {f"item-{at % 100}": f"new {at}", f"more-{at}": f"more {at}"}
        docs.put(new)
        texts |= new
        if at % 3 == 0:
            gone = f"item-{(at * 7) % 100}"
            if gone in texts:
                docs.ask("DELETE", f"{DOCS}/items/{gone}")
                del texts[gone]
    done = docs.ended()
    assert (done["rows"], done["missing"]) == (len(texts), 0)
    docs.assert_finds(texts, sorted(texts)[:20])
    docs.ask("POST", f"{DOCS}/cutover", {"version": docs.version("building")["version"]})
    docs.assert_finds(texts, sorted(texts)[:20])


def test_items_that_fail_three_times_are_in_quarantine_and_named(
    tmp_path: Path, server: EmbeddingServer
) -> None:
    with rig(tmp_path, server) as docs:
        start(docs)
        docs.create(truncate=True)
        docs.put({"good": "short", "bad": f"{TOO_LONG} text"})
        answer = docs.backfill(truncate=False)
        assert answer["status"] == "running"
        done = docs.ended()
        assert (done["rows"], done["quarantined"], done["coverage"]) == (1, 1, 0.5)
        (failure,) = done["failures"]
        assert (failure["id"], failure["attempts"], failure["quarantined"]) == ("bad", 3, True)
        assert "context length" in failure["message"]
        # What is in quarantine does not hold the cut-over up, and the coverage does not hide it.
        docs.ask("POST", f"{DOCS}/cutover", {"version": docs.version("building")["version"]})
        assert docs.version("active")["coverage"] == 0.5


def test_a_cut_over_below_the_threshold_says_what_is_missing(docs: Docs, server: EmbeddingServer) -> None:
    docs.put(texts_of(10))
    held = threading.Event()

    def hold(texts: Sequence[str]) -> None:
        if len(texts) > 1:
            held.wait(30)

    server.before_answer = hold
    try:
        docs.backfill(prefix="passage: ")
        building = docs.version("building")["version"]
        answer = docs.ask("POST", f"{DOCS}/cutover", {"version": building}, status=409)
        error = answer["error"]
        assert error["code"] == "below_threshold"
        details = error["details"]
        assert (details["missing"], details["rows"]) == (10, 0)
        assert sorted(details["missing_ids"]) == sorted(texts_of(10))
    finally:
        held.set()
    docs.ended()
    docs.ask("POST", f"{DOCS}/cutover", {"version": building})


def test_a_table_that_is_lost_while_the_daemon_runs_lowers_the_coverage(
    docs: Docs, server: EmbeddingServer
) -> None:
    texts = texts_of(40)
    docs.put(texts)
    version = docs.version("active")
    assert version["coverage"] == 1.0
    (table,) = (docs.daemon.state_dir / "vectors").glob("v*.lance")
    assert int(table.stem[1:]) > 1_700_000_000, "no table that is left of a lost file has its name"
    for path in sorted((docs.daemon.state_dir / "vectors").rglob("*.lance"), reverse=True):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:40])
    answer = docs.ask("POST", f"{DOCS}/query", {"text": "the text of item 1"}, status=503)
    assert answer["error"]["code"] == "vectors_lost"
    version = docs.version("active")
    assert (version["rows"], version["coverage"]) == (0, 0.0)
    assert "vectors_lost" in [event["kind"] for event in docs.daemon.events()]
    docs.backfill()
    assert docs.ended()["coverage"] == 1.0
    docs.assert_finds(texts, sorted(texts)[:5])


def test_a_daemon_that_is_replaced_takes_the_collections_over(docs: Docs, server: EmbeddingServer) -> None:
    texts = texts_of(50)
    docs.put(texts)
    assert docs.daemon.stop() == 0
    start(docs)
    docs.assert_finds(texts, sorted(texts)[:5])
    assert docs.ask("GET", DOCS)["items"] == 50


class Clients:
    """Clients that write and query, each over one connection, and send again what was refused with 503.

    Attributes:
        written: the text of each item whose write was acknowledged last.
        problems: answers that no client may get.
        refused: answers with 503, by what was asked.
        answered: answers with 200, by what was asked.
    """

    def __init__(self, docs: Docs, known: dict[str, str]) -> None:
        self.written = dict(known)
        self.problems: list[Any] = []
        self.refused: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.over = threading.Event()
        self._docs = docs
        self._known = known

    def wait_for_more(self) -> None:
        """Wait until some more writes and queries were answered, or there is a problem."""
        wanted = {path: self.answered[path] + 40 for path in ("items", "query")}
        wait_for(
            lambda: self.problems or all(self.answered[path] >= number for path, number in wanted.items())
        )

    def write(self, writer: int) -> None:
        """Write new items one after the other, and change an earlier one after each."""
        with requests.Session() as session:
            for at in count():
                if self.over.is_set():
                    return
                items = {f"new-{writer}-{at}": f"item {at} of writer {writer}"}
                if at:
                    items[f"new-{writer}-{at // 2}"] = f"changed by writer {writer} in step {at}"
                for one, text in items.items():
                    body = {"items": [{"id": one, "text": text}]}
                    if self._asked(session, "PUT", "items", body) is not None:
                        self.written[one] = text

    def query(self, seed: int) -> None:
        chance, ids = random.Random(seed), sorted(self._known)
        with requests.Session() as session:
            while not self.over.is_set():
                one = chance.choice(ids)
                found = self._asked(session, "POST", "query", {"text": self._known[one], "k": 3})
                if found is not None and (found["items"][0]["id"] != one or found["coverage"] != 1.0):
                    self.problems.append(found)

    def _asked(self, session: requests.Session, method: str, path: str, body: Any) -> Any:
        """Ask until the answer is no 503; None where it is a problem."""
        while True:
            try:
                answer = session.request(
                    method, f"{self._docs.daemon.url}{DOCS}/{path}", json=body, timeout=30
                )
            except requests.RequestException as error:
                self.problems.append(error)
                return None
            if answer.status_code == 200:
                self.answered[path] += 1
                return answer.json()
            if answer.status_code != 503 or "Retry-After" not in answer.headers:
                self.problems.append((path, answer.status_code, answer.text, dict(answer.headers)))
                return None
            self.refused[path] += 1
            time.sleep(float(answer.headers["Retry-After"]))


def test_what_is_written_while_the_daemon_is_replaced_is_there_afterwards(
    docs: Docs, server: EmbeddingServer, processes: list[Process]
) -> None:
    known = texts_of(50)
    docs.put(known)
    # Most of the time a request waits for its vector: it is under way when its daemon gives way.
    server.before_answer = lambda _texts: time.sleep(0.05)
    clients = Clients(docs, known)
    one = Replaceable(docs.daemon, processes)
    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(clients.write, number) for number in range(4)]
        asking += [pool.submit(clients.query, seed) for seed in range(2)]
        try:
            for _ in range(REPLACEMENTS):
                clients.wait_for_more()
                one.replace()
            clients.wait_for_more()
        finally:
            clients.over.set()
        for task in asking:
            task.result()
    assert clients.problems == []
    for process in processes:
        assert process.wait(timeout=30) == 0
    assert "Traceback" not in docs.daemon.log()
    version = docs.version("active")
    assert (version["coverage"], version["rows"]) == (1.0, len(clients.written))
    for id_, text in clients.written.items():
        item = docs.ask("GET", f"{DOCS}/items/{id_}?vector=true")
        assert item["text"] == text
        assert item["vector"] == pytest.approx(vector_of(server.digest, text), abs=1e-5)


def test_what_is_under_way_when_the_daemon_is_replaced_is_refused_and_not_half_done(
    docs: Docs, server: EmbeddingServer, processes: list[Process]
) -> None:
    docs.put({"a": "alpha"})
    docs.ask("POST", BASE, {"name": "fresh", "model": MODEL}, status=201)
    held = threading.Event()
    reached = threading.Semaphore(0)

    def hold(_texts: Sequence[str]) -> None:
        reached.release()
        held.wait(60)

    item = {"items": [{"id": "b", "text": "beta"}]}
    asked = [
        ("PUT", f"{DOCS}/items", item),
        ("PUT", f"{BASE}/fresh/items", item),  # it would make a version that the new daemon does not know
        ("POST", f"{DOCS}/query", {"text": "alpha"}),
    ]
    server.before_answer = hold
    with ThreadPoolExecutor(len(asked)) as pool:
        try:
            asking = [pool.submit(docs.daemon.call, method, path, json=body) for method, path, body in asked]
            for _ in asked:
                assert reached.acquire(timeout=30)
            old = Replaceable(docs.daemon, processes).replace()
        finally:
            held.set()
        for one in asking:
            answer = one.result()
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1"), answer.text
    assert old.wait(timeout=30) == 0
    assert docs.ask("GET", DOCS)["items"] == 1
    assert docs.ask("GET", f"{BASE}/fresh/versions") == []
    for method, path, body in asked:
        docs.ask(method, path, body)
    docs.assert_finds({"a": "alpha", "b": "beta"}, ["a", "b"])
    found = docs.ask("POST", f"{BASE}/fresh/query", {"text": "beta"})
    assert [one["id"] for one in found["items"]] == ["b"]


def test_on_an_engine_a_container_is_started_for_a_collection_and_a_killed_daemon_goes_on(
    new_daemon: NewDaemon,
) -> None:
    items = 300
    models = {"OLLAMA_SIM_MODELS": "minilm,other=embed"}
    daemon = new_daemon(
        templates={"sim": {"env": models}},
        config={"roles": {"embedding": {"model": "minilm"}}},
    ).start()
    docs = Docs(daemon)
    docs.ask("POST", BASE, {"name": "docs"}, status=201)
    texts = texts_of(items)
    docs.put(texts)  # starts the container
    assert daemon.instance("cpu")["phase"] == "ready"
    first = docs.version("active")
    assert first["model"] == "minilm"
    # As a pull does: the name stands for another build from here on.
    copied = daemon.call("POST", "/api/copy", json={"source": "other", "destination": "minilm:latest"})
    assert copied.status_code == 200, copied.text
    docs.backfill(rate=200)
    for _ in range(3):
        wait_until_advanced(docs)
        daemon.kill()
        daemon.start()
    ended = docs.ended()
    assert (ended["rows"], ended["missing"], ended["coverage"]) == (items, 0, 1.0)
    assert docs.version("stale")["version"] == first["version"]
    building = docs.version("building")
    assert building["digest"] != first["digest"]
    docs.ask("POST", f"{DOCS}/cutover", {"version": building["version"]})
    docs.assert_finds(texts, sorted(texts)[:5])
    # The former build cannot be asked for any text: nobody rolls back to it by mistake.
    error = docs.ask("POST", f"{DOCS}/rollback", status=409)["error"]
    assert error["code"] == "version_stale"


def test_the_example_of_the_documentation_runs(docs: Docs) -> None:
    example = ROOT / "docs" / "examples" / "embeddings.py"
    done = subprocess.run(
        [sys.executable, str(example), docs.daemon.url, MODEL],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded: 3 of 3 items" in done.stdout
    assert done.stdout.count(": gpu 1.000") == 3
    assert [one["name"] for one in docs.ask("GET", BASE)["collections"]] == ["docs"]
