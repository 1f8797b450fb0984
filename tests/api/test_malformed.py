"""Whatever bytes come, the daemon lives on, and no client sees its insides."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.api.raw_http import request, say
from tests.support.daemon import COMPUTE

if TYPE_CHECKING:
    from tests.api.conftest import Api
    from tests.api.raw_http import Answer

LIST = f"{COMPUTE}/instances"
PATCH = request(f"{LIST}/cpu", "Content-Type: application/json", "Transfer-Encoding: chunked", method="PATCH")

MALFORMED = {
    "nothing": b"",
    "a line break": b"\r\n",
    "many line breaks": b"\r\n" * 50_000,
    "zeros": b"\0" * 4096,
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"\x11" * 200,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "no version": b"GET /healthz\r\nHost: localhost\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n",
    "HTTP/9.9": b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "spaces in the path": b"GET /health z HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe\x80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "broken escapes in the path": request(f"{LIST}/%ff%fe%zz%"),
    "a zero in the path": request(f"{LIST}/%00"),
    "a lone surrogate in the path": request(f"{LIST}/%ed%a0%80"),
    "bytes in the query": b"GET " + LIST.encode() + b"?\xff=\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "broken escapes in the query": request(f"{LIST}/cpu/logs?tail=%ff&%zz=%"),
    "an absolute URL": request("http://evil.example/healthz"),
    "an absolute URL that is none": request("http://[::/healthz"),
    "an authority": request("evil.example:80", method="CONNECT"),
    "a star": request("*", method="OPTIONS"),
    "an unknown method": request("/healthz", method="BREW"),
    "a long method": request("/healthz", method="A" * 100_000),
    "a lower-case method": request("/healthz", method="get"),
    "a long path": request("/" + "a" * 300_000),
    "a long query": request(f"{LIST}?x=" + "a" * 300_000),
    "many parameters": request(f"{LIST}?" + "&".join(f"a{n}=1" for n in range(20_000))),
    "a huge header": request("/healthz", "X: " + "a" * 1_000_000),
    "a huge name of a header": request("/healthz", "X" * 1_000_000 + ": a"),
    "many headers": request("/healthz", *(f"X-{n}: a" for n in range(50_000))),
    "a header without a colon": request("/healthz", "nothing"),
    "a header without a name": request("/healthz", ": a"),
    "a space before the colon": request("/healthz", "X : a"),
    "a folded header": request("/healthz", "X: a", " b"),
    "a zero in a header": request("/healthz", "X: a\0b"),
    "a bare line feed": b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    "a bare carriage return": b"GET /healthz HTTP/1.1\rHost: localhost\r\r",
    "an upgrade": request("/healthz", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"),
    "an upgrade to HTTP/2": request("/healthz", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"),
    "an unknown transfer encoding": request("/healthz", "Transfer-Encoding: gzip"),
    "an unknown expectation": request("/healthz", "Expect: nothing"),
    "a chunk size that is none": PATCH + b"zz\r\n{}\r\n0\r\n\r\n",
    "a negative chunk size": PATCH + b"-2\r\n{}\r\n0\r\n\r\n",
    "a huge chunk size": PATCH + b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than it says": PATCH + b"1\r\n{}\r\n0\r\n\r\n",
    "a chunk that ends early": PATCH + b"5\r\n{}",
    "a chunk extension": PATCH + b"2;" + b"a" * 200_000 + b"\r\n{}\r\n0\r\n\r\n",
    "trailers": PATCH + b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
    "no end of the chunks": PATCH + b"2\r\n{}\r\n",
    "a body of zeros": PATCH + b"4\r\n\0\0\0\0\r\n0\r\n\r\n",
    "two requests, the second broken": request("/healthz") + b"\xff\xfe\r\n\r\n",
}


def check(api: Api, answer: Answer) -> None:
    """No insides in the answer, no defect in the log, and the daemon goes on."""
    assert b"Traceback" not in answer.body
    assert b"site-packages" not in answer.body
    assert answer.status < 500
    assert api.daemon.process is not None
    assert api.daemon.process.poll() is None
    assert api.daemon.call("GET", "/healthz", timeout_s=20).json() == {"status": "ok"}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused_and_nothing_else_happens(api: Api, name: str) -> None:
    check(api, say(api.daemon.port, MALFORMED[name]))
    assert "Traceback" not in api.daemon.log()


def test_requests_that_are_changed_at_random_do_no_harm(api: Api) -> None:
    chance = random.Random(7)  # the same changes each time: a failure can be looked at
    whole = [
        request(LIST),
        PATCH + b"2\r\n{}\r\n0\r\n\r\n",
        request(f"{LIST}/cpu/logs?tail=5", "Last-Event-ID: 5", "Origin: http://localhost"),
    ]
    for _ in range(300):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    data[at:at] = chance.randbytes(chance.randint(1, 20))
                case 2:
                    del data[at : at + chance.randint(1, 20)]
                case _:
                    data[at:at] = data[: chance.randint(1, len(data))]
            data = data or bytearray(b"G")
        answer = say(api.daemon.port, bytes(data))
        assert answer.status < 500, bytes(data)
        assert b"Traceback" not in answer.body
    check(api, say(api.daemon.port, request("/healthz")))
    assert "Traceback" not in api.daemon.log()


def test_a_client_that_sends_slowly_or_goes_away_holds_nobody_up(api: Api) -> None:
    for _ in range(50):
        say(api.daemon.port, request(f"{COMPUTE}/events"), end=False, limit_s=0.01)
        say(api.daemon.port, b"GET /heal", end=False, limit_s=0.01)
    check(api, say(api.daemon.port, request("/healthz")))
    assert "Traceback" not in api.daemon.log()
