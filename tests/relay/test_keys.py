"""Keys on the data path: what a request is recorded as, when it ends, and where its secret does not get."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ollama
import pytest
import requests

from tests.support.daemon import COMPUTE, ROOT, wait_for
from tests.support.gateway import gateway_over
from tests.support.keyed import KEYS, Keyed, as_header, keyed_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
STREAM = {"model": "tiny", "prompt": "hi", "options": {"num_predict": 10_000}}
SLOW = {"one": {"tokens": 10_000, "tokens_per_s": 50}}
FIRST, SECOND = "first-key-of-the-operator", "second-key-of-the-operator"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed_gateway(tmp_path_factory.mktemp("keyed"), knobs=SLOW) as keyed:
        keyed.make("reader", "read")
        yield keyed


@contextmanager
def streaming(keyed: Keyed, key: str) -> Iterator[Iterator[bytes]]:
    """The lines of an answer that goes on; the first one has come."""
    url, headers = f"{keyed.gateway.url}/api/generate", as_header(keyed.secrets[key])
    with requests.post(url, json=STREAM, headers=headers, stream=True, timeout=30) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines))["response"]
        yield lines


def history_of(keyed: Keyed, key: str) -> list[dict[str, Any]]:
    answer = keyed.ask("GET", f"{COMPUTE}/requests", params={"key": key})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["requests"])


# --- whose request it is --------------------------------------------------------------------------


def test_a_request_is_recorded_with_its_key_and_the_project_of_the_key(keyed: Keyed) -> None:
    keyed.make("shop-ci", project="shop")
    keyed.make("loose")
    body = {**CHAT, "options": {"num_predict": 2}}
    for key in ("shop-ci", "loose"):
        headers = {"X-Project-ID": "somebody-else"}
        assert keyed.ask("POST", "/api/chat", key=key, json=body, headers=headers).status_code == 200
    (of_shop,) = history_of(keyed, "shop-ci")
    assert (of_shop["key"], of_shop["project_id"]) == ("shop-ci", "shop")
    (of_loose,) = history_of(keyed, "loose")
    assert (of_loose["key"], of_loose["project_id"]) == ("loose", "somebody-else")
    logged = r'"key":"(shop-ci|loose)"'
    wait_for(lambda: set(re.findall(logged, keyed.gateway.log())), lambda found: len(found) == 2)
    command = ["requests", "--key", "shop-ci", "--json", "--url", keyed.gateway.url]
    listed = subprocess.run(
        [sys.executable, "-m", "manager", *command],
        env={**os.environ, "OLLAMA_MANAGER_KEY": keyed.secrets["reader"]},
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert [one["request_id"] for one in json.loads(listed.stdout)["requests"]] == [of_shop["request_id"]]


def test_a_key_that_is_local_only_makes_its_requests_so(keyed: Keyed) -> None:
    keyed.make("homebody", local_only=True)
    body = {**CHAT, "options": {"num_predict": 2}}
    headers = {"X-Local-Only": "false"}
    assert keyed.ask("POST", "/api/chat", key="homebody", json=body, headers=headers).status_code == 200
    assert history_of(keyed, "homebody")[0]["local_only"] is True


# --- revocation -----------------------------------------------------------------------------------


def test_an_open_stream_of_a_revoked_key_goes_on_and_a_new_request_does_not(keyed: Keyed) -> None:
    keyed.make("going")
    with streaming(keyed, "going") as lines:
        answer = keyed.ask("DELETE", f"{KEYS}/going")
        assert answer.json()["cut"] == 0
        assert keyed.ask("POST", "/api/chat", key="going", json=CHAT).status_code == 401
        for _ in range(20):
            assert "error" not in json.loads(next(lines))


def test_the_open_streams_of_a_key_end_where_that_is_asked_for_and_no_others(keyed: Keyed) -> None:
    keyed.make("cut-me")
    keyed.make("leave-me")
    with streaming(keyed, "leave-me") as other, streaming(keyed, "cut-me") as lines:
        events = keyed.ask("GET", f"{COMPUTE}/events", stream=True, key="reader")
        live = keyed.ask("GET", f"{COMPUTE}/live", stream=True, key="reader")
        answer = keyed.ask("DELETE", f"{KEYS}/cut-me", params={"cut": "true"})
        assert answer.json()["cut"] == 1
        assert [json.loads(line) for line in lines][-1] == {"error": "cut off: the key was revoked"}
        for _ in range(20):
            assert "error" not in json.loads(next(other))
        assert keyed.ask("DELETE", f"{KEYS}/reader", params={"cut": "true"}).json()["cut"] == 2
        for endless in (events, live):
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                list(endless.iter_lines())
    keyed.make("reader", "read")
    wait_for(lambda: history_of(keyed, "cut-me"))
    assert history_of(keyed, "cut-me")[0]["outcome"] == "cut"
    assert keyed.gateway.call("GET", "/healthz").status_code == 200


# --- clients that send no headers -----------------------------------------------------------------


def test_the_python_client_of_ollama_works_through_a_key_in_its_address(keyed: Keyed) -> None:
    client = ollama.Client(host=f"{keyed.gateway.url}/key/{keyed.make('pathy', project='p')}")
    assert client.list().models
    options = {"num_predict": 3}
    answer = client.chat("tiny", messages=[{"role": "user", "content": "hi"}], options=options)
    assert answer.message.content
    pieces = list(client.generate("tiny", "hi", stream=True, options=options))
    assert pieces[-1].done
    assert client.embed("minilm", "text").embeddings
    with pytest.raises(ollama.ResponseError, match="needs operator") as caught:
        client.delete("tiny")
    assert caught.value.status_code == 403
    found = wait_for(lambda: history_of(keyed, "pathy"), lambda rows: len(rows) >= 3)
    assert {row["path"] for row in found} >= {"/api/chat", "/api/generate", "/api/embed"}
    assert {row["project_id"] for row in found} == {"p"}
    keyed.ask("DELETE", f"{KEYS}/pathy")
    with pytest.raises(ollama.ResponseError, match="revoked"):
        client.chat("tiny", messages=[{"role": "user", "content": "hi"}])


# --- nothing tells a secret -----------------------------------------------------------------------


def test_no_secret_gets_into_log_metrics_events_history_or_to_a_server(tmp_path: Path) -> None:
    with keyed_gateway(tmp_path / "home", config={"log": {"level": "debug", "format": "json"}}) as keyed:
        gateway, secret = keyed.gateway, keyed.make("talker", "client", "read")
        guess = "om_" + "G" * 43
        base, wrong = f"/key/{secret}", f"/key/{guess}"
        for path in (
            "/api/chat",
            "/v1/chat/completions",
            "/v1/messages",
            "/v1/nope",
            "/nope",
            "/metrics",
            "",
        ):
            for start in (base, wrong, f"{base}{wrong}", base.upper(), f"/x{base}", f"{base}?a={secret}#"):
                for headers in ({}, as_header(secret), {"X-API-Key": guess}, {"Referer": f"http://x{base}/"}):
                    for method in ("POST", "GET"):
                        answer = gateway.call(
                            method, start + path, json={**CHAT, "max_tokens": 3}, headers=headers,
                            allow_redirects=False,
                        )  # fmt: skip
                        assert secret not in answer.text + str(answer.headers)
        gateway.call("POST", f"{base}/api/pull", json={"model": secret})
        rotated = keyed.ask("POST", f"{KEYS}/talker/rotate", json={"overlap_s": 60}).json()["secret"]
        gateway.call("POST", f"/key/{rotated}/api/chat", json=CHAT)
        session = gateway.call(
            "POST", "/sign-in", data={"key": rotated}, headers={"Origin": gateway.url}, allow_redirects=False
        ).cookies[f"ollama_manager_session_{gateway.port}"]
        gateway.call("GET", "/docs", cookies={f"ollama_manager_session_{gateway.port}": session})
        seen = [
            keyed.ask("GET", "/metrics").text,
            keyed.ask("GET", f"{COMPUTE}/requests", params={"limit": 1000}).text,
            keyed.ask("GET", KEYS).text,
            json.dumps(requests.get(f"{gateway.servers['one'].url}/_sim/knobs", timeout=5).json()),
            gateway.servers["one"].log.read_text(),
        ]
        gateway.stop(signal.SIGTERM)
        seen.append(gateway.log())
        files = [file for file in gateway.state_dir.rglob("*") if file.is_file()]
        seen += [file.read_bytes().decode("latin-1") for file in files]
        assert any("talker" in text for text in seen)
        for hidden in (secret, rotated, keyed.secrets["root"], session):
            assert not any(hidden in text for text in seen), hidden[:8]
        assert not any(guess in text for text in seen)
        assert not re.search(r"om_[A-Za-z0-9_-]{43}", "".join(seen))


# --- what survives --------------------------------------------------------------------------------


def test_keys_and_revocations_that_were_answered_survive_a_kill(tmp_path: Path) -> None:
    with keyed_gateway(tmp_path / "home") as keyed:
        gateway = keyed.gateway
        keyed.make(
            "kept", project="p", models=["tiny*"], concurrency=2, rpm=3, usd_per_month=1.5, expires_s=900
        )
        keyed.make("taken")
        old = keyed.secrets["kept"]
        keyed.secrets["kept"] = keyed.ask("POST", f"{KEYS}/kept/rotate", json={}).json()["secret"]
        keyed.ask("DELETE", f"{KEYS}/taken")
        before = keyed.ask("GET", KEYS).json()
        gateway.kill()
        gateway.start(until_ready=False)
        gateway.wait_until_alive()
        after = keyed.ask("GET", KEYS).json()
        used = {"last_used_at": None}
        assert [one | used for one in after["keys"]] == [one | used for one in before["keys"]]
        assert keyed.ask("GET", "/api/version", key="taken").status_code == 401
        for secret in (old, keyed.secrets["kept"]):
            assert gateway.call("GET", "/api/version", headers=as_header(secret)).status_code == 200


def test_a_daemon_without_a_key_left_stays_closed_until_an_operator_opens_it(tmp_path: Path) -> None:
    with gateway_over(tmp_path / "home") as gateway:
        refused = gateway.call("POST", KEYS, json={"name": "first", "scopes": ["client"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_admin_key")
        assert gateway.call("GET", "/api/tags").status_code == 200, "nothing has changed"
        keyed = Keyed(gateway)
        revoked = keyed.ask("DELETE", f"{KEYS}/root").json()
        assert (revoked["required"], revoked["admin_left"]) == (True, False)
        assert gateway.call("GET", "/api/tags").status_code == 401
        gateway.kill()
        gateway.start(until_ready=False)
        gateway.wait_until_alive()
        assert gateway.call("GET", "/api/tags").status_code == 401, "neither does a restart open it"
        file = gateway.home / "key"
        file.write_text(FIRST)
        file.chmod(0o600)
        gateway.configure({**gateway.config, "server": {"key_file": str(file)}})
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGHUP)
        keyed.secrets["file"] = FIRST
        wait_for(lambda: keyed.ask("GET", KEYS, key="file").status_code, lambda status: status == 200)
        forgotten = keyed.ask("DELETE", f"{KEYS}/root", key="file", params={"forget": "true"}).json()
        assert (forgotten["required"], forgotten["admin_left"]) == (True, True)
        gateway.configure({name: value for name, value in gateway.config.items() if name != "server"})
        gateway.process.send_signal(signal.SIGHUP)
        wait_for(lambda: gateway.call("GET", "/api/tags").status_code, lambda status: status == 200)


# --- the operator's files -------------------------------------------------------------------------


def test_the_lines_of_several_key_files_open_and_changes_count_within_a_second(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text(f"{FIRST}\n")
    other.write_text(f"\n{SECOND}\nthird-key-of-the-operator\n")
    for file in (one, other):
        file.chmod(0o600)
    with gateway_over(
        tmp_path / "home", (), config={"server": {"key_file": [str(one), str(other)]}}
    ) as gateway:

        def status(key: str) -> int:
            return gateway.call("GET", "/api/version", headers=as_header(key)).status_code

        assert [status(key) for key in (FIRST, SECOND, "third-key-of-the-operator", "fourth")] == [
            200
        ] * 3 + [401]
        new = tmp_path / "new"
        new.write_text("fourth-key-of-the-operator")
        new.chmod(0o600)
        new.rename(other)
        wait_for(lambda: status("fourth-key-of-the-operator"), lambda found: found == 200, within_s=2)
        assert [status(key) for key in (FIRST, SECOND)] == [200, 401]
        assert "key-of-the-operator" not in gateway.log()


def test_requests_with_remembered_heads_and_new_keys_do_not_mix(keyed: Keyed) -> None:
    """Clients with different keys at once: each request is recorded with the key that it was sent with."""
    names = [f"mix-{number}" for number in range(4)]
    for name in names:
        keyed.make(name, project=name)
    body = {**CHAT, "options": {"num_predict": 1}}

    def ask(name: str) -> None:
        with requests.Session() as session:
            session.headers.update(as_header(keyed.secrets[name]))
            for _ in range(10):
                assert session.post(f"{keyed.gateway.url}/api/chat", json=body, timeout=30).status_code == 200

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        rows = wait_for(lambda name=name: history_of(keyed, name), lambda rows: len(rows) == 10)  # type: ignore[misc]
        assert {(row["key"], row["project_id"]) for row in rows} == {(name, name)}


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_what_a_key_does_not_permit_is_refused_with_its_code(keyed: Keyed, path: str) -> None:
    key = f"narrow{path.replace('/', '-')}"
    keyed.make(key, models=["other*"])
    answer = keyed.ask("POST", path, key=key, json={**CHAT, "max_tokens": 2})
    assert answer.status_code == 403
    assert f"the key {key!r} may use only the models other*, not 'tiny:latest' (forbidden)" in answer.text
