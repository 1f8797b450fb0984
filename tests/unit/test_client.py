"""The client for other programs, against a server that is there, away, slow or wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from manager.client import ModelSettingsClient, SettingsUnavailableError
from manager.settings.model import ServerSettings
from tests.unit.cli.stand_in import Answer, StandInDaemon

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUTE = "GET /api/settings/models/effective"


def effective(**models: str | None) -> dict[str, Any]:
    return {
        "roles": {role: {"model": {"value": model, "source": "file"}} for role, model in models.items()},
        "ignored": [],
    }


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    with StandInDaemon() as daemon:
        daemon.answers[ROUTE] = Answer(effective(output="tiny", thinking=None))
        yield daemon


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(daemon: StandInDaemon, clock: Clock) -> Iterator[ModelSettingsClient]:
    with ModelSettingsClient(daemon.url, ttl_s=30, timeout_s=5, now=clock) as client:
        yield client


def test_the_model_of_a_role_is_asked_for_once_within_the_ttl(
    daemon: StandInDaemon, client: ModelSettingsClient, clock: Clock
) -> None:
    assert (client.model_for("output"), client.model_for("thinking")) == ("tiny", None)
    assert client.effective() == effective(output="tiny", thinking=None)
    clock.now += 29.9
    assert client.model_for("output") == "tiny"
    assert len(daemon.seen) == 1
    daemon.answers[ROUTE] = Answer(effective(output="other"))
    clock.now += 0.1
    assert client.model_for("output") == "other"
    assert len(daemon.seen) == 2
    assert not client.stale


def test_a_role_that_there_is_not_is_named_with_those_there_are(client: ModelSettingsClient) -> None:
    with pytest.raises(KeyError, match="there is no role 'nope'; there is: output, thinking"):
        client.model_for("nope")


def test_what_was_given_away_can_be_changed_without_harm(client: ModelSettingsClient) -> None:
    client.effective()["roles"].clear()
    assert client.model_for("output") == "tiny"


WRONG = {
    "an error": Answer({"error": {"code": "x", "message": "the daemon failed"}}, 500),
    "no key": Answer({"error": {"code": "unauthorized", "message": "present the key"}}, 401),
    "another server": Answer("hello", 404),
    "a redirect": Answer("", 302, {"Location": "/elsewhere"}),
    "no JSON": Answer("hello"),
    "a list": Answer([]),
    "no roles": Answer({"roles": []}),
    "a role that is none": Answer({"roles": {"output": []}}),
    "a model that is none": Answer({"roles": {"output": {"model": "tiny"}}}),
    "a model without a value": Answer({"roles": {"output": {"model": {}}}}),
    "a model that is a number": Answer({"roles": {"output": {"model": {"value": 1}}}}),
}


@pytest.mark.parametrize("name", WRONG)
def test_while_the_daemon_cannot_be_asked_the_last_known_values_are_used_and_said_to_be_stale(
    daemon: StandInDaemon, client: ModelSettingsClient, clock: Clock, name: str
) -> None:
    good = daemon.answers[ROUTE]
    assert client.model_for("output") == "tiny"
    daemon.answers[ROUTE] = WRONG[name]
    clock.now += 31
    assert client.model_for("output") == "tiny"
    assert client.stale
    assert client.trouble is not None
    assert client.trouble.startswith(f"{daemon.url} cannot be asked: it answered") or name == "no JSON"
    clock.now += 4.9
    client.effective()
    assert len(daemon.seen) == 2, "it is not asked again at once"
    clock.now += 0.1
    client.effective()
    assert len(daemon.seen) == 3
    assert client.stale
    daemon.answers[ROUTE] = good
    clock.now += 5
    assert client.model_for("output") == "tiny"
    assert not client.stale
    assert client.trouble is None


@pytest.mark.parametrize("name", WRONG)
def test_when_nothing_was_ever_known_there_is_an_error_until_there_is_an_answer(
    daemon: StandInDaemon, client: ModelSettingsClient, name: str
) -> None:
    good, daemon.answers[ROUTE] = daemon.answers[ROUTE], WRONG[name]
    for ask in (client.effective, lambda: client.model_for("output")):
        with pytest.raises(
            SettingsUnavailableError, match="nothing was ever known of its settings"
        ) as caught:
            ask()
        assert daemon.url in str(caught.value)
    daemon.answers[ROUTE] = good
    assert client.model_for("output") == "tiny"


def test_a_daemon_that_is_not_there_is_named(clock: Clock) -> None:
    with (
        ModelSettingsClient("http://127.0.0.1:9", now=clock) as client,
        pytest.raises(SettingsUnavailableError, match=r"^http://127\.0\.0\.1:9 cannot be asked: .*refused"),
    ):
        client.effective()


def test_values_outlive_a_daemon_that_goes_away(clock: Clock) -> None:
    with StandInDaemon() as daemon:
        daemon.answers[ROUTE] = Answer(effective(output="tiny"))
        client = ModelSettingsClient(daemon.url, ttl_s=1, now=clock)
        assert client.model_for("output") == "tiny"
    clock.now += 3600
    assert client.model_for("output") == "tiny"
    assert client.stale
    client.close()


def test_a_daemon_that_never_answers_is_given_up(clock: Clock) -> None:
    goes_on = threading.Event()

    def never() -> Iterator[str]:
        goes_on.wait(20)
        yield "{}"

    with StandInDaemon() as daemon:
        daemon.answers[ROUTE] = Answer(never())
        with (
            ModelSettingsClient(daemon.url, timeout_s=0.1, now=clock) as client,
            pytest.raises(SettingsUnavailableError, match="timed out"),
        ):
            client.effective()
        goes_on.set()


def test_without_a_ttl_it_is_asked_each_time(daemon: StandInDaemon, clock: Clock) -> None:
    with ModelSettingsClient(daemon.url, ttl_s=0, now=clock) as client:
        for _ in range(3):
            client.effective()
    assert len(daemon.seen) == 3


def test_many_threads_share_one_question(daemon: StandInDaemon, client: ModelSettingsClient) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: client.model_for("output"), range(200)))
    assert found == ["tiny"] * 200
    assert len(daemon.seen) == 1


class Queue:
    """A lock that tells of everyone who comes to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.came = threading.Semaphore(0)

    def __enter__(self) -> None:
        self.came.release()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_many_threads_share_one_failure(daemon: StandInDaemon, client: ModelSettingsClient) -> None:
    all_there = threading.Event()

    def late() -> Iterator[str]:
        all_there.wait(20)
        yield "no JSON"

    def ask(_: int) -> str:
        with pytest.raises(SettingsUnavailableError) as caught:
            client.effective()
        return str(caught.value)

    daemon.answers[ROUTE] = Answer(late())
    queue = Queue()
    client._asking = queue  # type: ignore[assignment]
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(ask, range(8))
        for _ in range(8):
            assert queue.came.acquire(timeout=20)
        all_there.set()
        assert len(set(asked)) == 1
    assert len(daemon.seen) == 1


def test_the_key_is_sent_and_the_url_may_come_from_the_environment(
    daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SETTINGS_API_URL", f" {daemon.url}/ ")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with ModelSettingsClient(key="a-key") as client:
        assert client.url == daemon.url
        assert client.model_for("output") == "tiny"
    headers = {name.lower(): value for name, value in daemon.seen[0].headers.items()}
    assert headers["authorization"] == "Bearer a-key"


@pytest.mark.parametrize("url", [None, "", "http://127.0.0.1:11435"])
def test_without_a_url_it_asks_the_daemon_of_this_machine(
    url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SETTINGS_API_URL", raising=False)
    assert ModelSettingsClient(url).url == f"http://127.0.0.1:{ServerSettings().port}"


@pytest.mark.parametrize("url", ["127.0.0.1:11435", "ftp://x"])
def test_of_what_is_no_url_it_says_what_it_expects(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected http://HOST:PORT, given here or in \$SETTINGS_API_URL"):
        ModelSettingsClient(url)


def test_it_brings_nothing_of_the_daemon_along() -> None:
    source = (
        "import manager.client, sys; "
        "print(sorted(name for name in sys.modules if name.startswith('manager') or name == 'pydantic'))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "['manager', 'manager.client']\n"
