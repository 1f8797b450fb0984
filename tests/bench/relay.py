"""What the gateway costs, beside nginx in front of the same server, in the same run.

The proxy that is measured has one core to itself; the server behind it and the load share the other. What
counts is the ratio: on a busy machine both get slower.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manager.cli.machine import Need, which
from tests.bench.idle import cpu_s, resident_bytes
from tests.bench.rig import MeasurementError
from tests.bench.table import Row, at_most, percentile
from tests.support.daemon import ROOT, Daemon, free_port, wait_for
from tests.tools.console import ToolError
from tests.tools.system import provide

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NGINX = Need("nginx", ("nginx-light",))

_PROXY_CORE, _OTHER_CORE = "0", "1"
_REQUESTS = 20_000
_STREAMS = 500
_LINES = 100
_SINGLE = 4_000
_ROUNDS = 3
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Proxy:
    name: str
    port: int
    pids: tuple[int, ...]

    @property
    def cpu_s(self) -> float:
        return sum(cpu_s(pid) for pid in self.pids)


@dataclass(slots=True)
class Measured:
    """Of one proxy: microseconds and milliseconds as the names say."""

    request_us: float
    line_us: float
    first_p50_ms: float
    first_p99_ms: float
    single_p50_ms: float
    single_p99_ms: float


def relay_cost() -> Iterator[Row]:
    """Requests, streams and latency of gateway and nginx; then the same requests with more instances.

    The gateway has everything on: lanes, breakers, history, budgets, and a key with limits. Both get the same
    requests.
    """
    if (os.cpu_count() or 1) < 2:
        raise MeasurementError("it takes two cores to measure a proxy beside its load")
    try:
        provide([NGINX])
    except ToolError as error:
        raise MeasurementError(str(error)) from error
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ollama-manager-bench-")))
        ports = [free_port() for _ in range(64)]
        stack.enter_context(_canned(ports))
        nginx = stack.enter_context(_nginx(home, ports[0]))
        direct = _latency(ports[0])
        with _gateway(home / "1", ports[:1], slots=1000, has_keys=True) as (gateway, daemon):
            ours, theirs = _measure((gateway, nginx), direct)
            resident = resident_bytes(gateway.pids[0]) / _MIB
            _check(daemon)
        yield from _rows(ours, theirs, resident)
        yield from _many_instances(home, ports)
        yield _with_lanes(home, ports[0])


def _rows(ours: Measured, nginx: Measured, resident_mib: float) -> Iterator[Row]:
    yield _times("CPU of a request, all on", ours.request_us, nginx.request_us, 2.8, "us")
    yield _times("CPU of a streamed line", ours.line_us, nginx.line_us, 1.6, "us")
    yield _times(f"first byte at {_STREAMS} streams, p50", ours.first_p50_ms, nginx.first_p50_ms, 2, "ms")
    yield _times(f"first byte at {_STREAMS} streams, p99", ours.first_p99_ms, nginx.first_p99_ms, 2, "ms")
    yield _limit("added latency, one connection, p50", ours.single_p50_ms, nginx.single_p50_ms, 0.2)
    yield _limit("added latency, one connection, p99", ours.single_p99_ms, nginx.single_p99_ms, 1.0)
    yield at_most(f"resident after {_STREAMS} streams", resident_mib, 115, " MiB")


def _times(what: str, ours: float, nginx: float, limit: float, unit: str) -> Row:
    ratio = ours / max(nginx, 1e-9)
    figure = f"{ratio:.2f} x nginx  ({ours:.1f} and {nginx:.1f} {unit})"
    return Row(what, figure, f"<= {limit:g} x", "ok" if ratio <= limit else "OVER")


def _limit(what: str, ours: float, nginx: float, limit: float) -> Row:
    figure = f"{ours:.3f} ms  (nginx: {nginx:.3f} ms)"
    return Row(what, figure, f"<= {limit:g} ms", "ok" if ours <= limit else "OVER")


def _many_instances(home: Path, ports: list[int]) -> Iterator[Row]:
    """Requests a second through 1, 16 and 64 instances that all have the model."""
    rates: dict[int, float] = {}
    for count in (1, 16, 64):
        with _gateway(home / f"of-{count}", ports[:count]) as (gateway, daemon):
            _load("requests", gateway.port, 64, 2000)
            rates[count] = max(
                _REQUESTS / 2 / float(_load("requests", gateway.port, 64, _REQUESTS // 2)["took_s"])
                for _ in range(_ROUNDS)
            )
            _check(daemon)
    for count in (16, 64):
        share = rates[count] / rates[1]
        figure = f"{rates[count]:.0f} requests/s, {share:.2f} of those with 1"
        yield Row(f"{count} instances", figure, ">= 0.95", "ok" if share >= 0.95 else "OVER")


def _with_lanes(home: Path, port: int) -> Row:
    """The same requests where they count slots that are never full, beside a gateway without slots."""
    with (
        _gateway(home / "without-lanes", [port]) as (without, _),
        _gateway(home / "with-lanes", [port], slots=1000) as (with_lanes, _),
    ):
        spent: dict[Proxy, list[float]] = {without: [], with_lanes: []}
        for proxy, found in [*spent.items()] * (_ROUNDS + 1):
            before = proxy.cpu_s
            _load("requests", proxy.port, 64, _REQUESTS // 4)
            found.append((proxy.cpu_s - before) / (_REQUESTS // 4) * 1e6)
    off, on = min(spent[without][1:]), min(spent[with_lanes][1:])
    beside = f"{on:.1f} and {off:.1f} us"
    return at_most("CPU of a request with lanes, over without", on / off, 1.1, " x", digits=2, beside=beside)


def _measure(proxies: tuple[Proxy, ...], direct: tuple[float, float]) -> list[Measured]:
    """The best of several rounds: whatever else the machine does can only make it worse.

    The proxies take turns, so that a slow minute of the machine is nobody's alone.
    """
    for proxy in proxies:
        _load("requests", proxy.port, 64, 2000)
    rounds = [[_round(proxy) for proxy in proxies] for _ in range(_ROUNDS)]
    return [_best(of_one, direct) for of_one in zip(*rounds, strict=True)]


def _best(rounds: Iterable[Measured], direct: tuple[float, float]) -> Measured:
    figures = [astuple(one) for one in rounds]
    best = Measured(*map(min, zip(*figures, strict=True)))
    best.single_p50_ms -= direct[0]
    best.single_p99_ms -= direct[1]
    return best


def _round(proxy: Proxy) -> Measured:
    """Of one round; latencies are those of the whole way."""
    before = proxy.cpu_s
    _load("requests", proxy.port, 64, _REQUESTS)
    request_us = (proxy.cpu_s - before) / _REQUESTS * 1e6
    before = proxy.cpu_s
    found = _load("streams", proxy.port, _STREAMS, _LINES)
    line_us = (proxy.cpu_s - before) / float(found["lines"]) * 1e6
    first = [float(value) * 1000 for value in found["first_bytes"]]
    return Measured(
        request_us, line_us, percentile(first, 0.5), percentile(first, 0.99), *_latency(proxy.port)
    )


def _latency(port: int) -> tuple[float, float]:
    _load("requests", port, 1, 500)
    found = [float(value) * 1000 for value in _load("requests", port, 1, _SINGLE)["latencies"]]
    return percentile(found, 0.5), percentile(found, 0.99)


def _load(kind: str, port: int, connections: int, amount: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.load", kind, *map(str, (port, connections, amount))]
    result = subprocess.run(
        ["taskset", "-c", _OTHER_CORE, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise MeasurementError(f"the load failed: {result.stderr.strip()[-200:]}")
    found: dict[str, Any] = json.loads(result.stdout)
    if found["bad"]:
        raise MeasurementError(f"{found['bad']} answers were errors")
    return found


def _check(daemon: Daemon) -> None:
    """Everything that is to be on was on: what was measured is what users have."""
    logged = daemon.log().count('"outcome":"ok"')
    counted = sum(
        float(line.rpartition(" ")[2])
        for line in daemon.call("GET", "/metrics", headers=_headers()).text.splitlines()
        if line.startswith("ollama_manager_requests_total{")
    )
    if not 0 < logged <= counted:
        raise MeasurementError(f"{counted:g} requests were counted and {logged} logged")


def _headers() -> dict[str, str]:
    key = os.environ.get("BENCH_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def _canned(ports: list[int]) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.bench.canned", *map(str, ports)]
    with subprocess.Popen(
        ["taskset", "-c", _OTHER_CORE, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.terminate()


@contextmanager
def _gateway(
    home: Path, ports: list[int], *, slots: int | None = None, has_keys: bool = False
) -> Iterator[tuple[Proxy, Daemon]]:
    instances = {
        f"i{number}": {
            "driver": "external",
            "url": f"http://127.0.0.1:{port}",
            "device": "cpu",
            "slots": slots,
        }
        for number, port in enumerate(ports)
    }
    config: dict[str, Any] = {"gpus": "none", "instances": instances, "log": {"format": "json"}}
    if has_keys:
        config["budgets"] = [{"scope": "global", "period": "month", "hard_usd": 1}]
    with Daemon(home, config, engine_url=f"unix://{home}/none.sock") as daemon:
        daemon.start(until_ready=False).wait_until_alive()
        assert daemon.process is not None
        pid = daemon.process.pid
        subprocess.run(["taskset", "-a", "-p", "-c", _PROXY_CORE, str(pid)], check=True, capture_output=True)
        wait_for(lambda: {one["phase"] for one in daemon.get("instances")["instances"]} == {"ready"})
        with _key(daemon) if has_keys else nullcontext():
            yield Proxy("gateway", daemon.port, (pid,)), daemon


@contextmanager
def _key(daemon: Daemon) -> Iterator[None]:
    """Have the load send a key whose every limit is counted and never reached."""
    wanted = {
        "name": "bench",
        "scopes": ["admin"],
        "instances": ["i0"],
        "models": ["*"],
        "concurrency": 10_000,
        "rpm": 1_000_000,
        "tokens_per_day": 10**12,
    }
    created = daemon.call("POST", "/api/v1/keys", json=wanted)
    if created.status_code >= http.client.BAD_REQUEST:
        raise MeasurementError(f"no key was made: {created.text}")
    os.environ["BENCH_KEY"] = created.json()["secret"]
    try:
        yield
    finally:
        del os.environ["BENCH_KEY"]


@contextmanager
def _nginx(home: Path, upstream: int) -> Iterator[Proxy]:
    port = free_port()
    paths = "\n".join(
        f"{name}_temp_path {home}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(
        f"""worker_processes 1; daemon off; pid {home}/nginx.pid; error_log {home}/nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; {paths}
  upstream ollama {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://ollama; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off;
    }}
  }}
}}
""",
        encoding="utf-8",
    )
    program = which("nginx") or "nginx"
    with subprocess.Popen(
        ["taskset", "-c", _PROXY_CORE, program, "-c", str(home / "nginx.conf")], stderr=subprocess.DEVNULL
    ) as master:
        try:
            children = Path(f"/proc/{master.pid}/task/{master.pid}/children")
            workers = wait_for(lambda: children.read_text().split(), within_s=10)
            yield Proxy("nginx", port, tuple(int(worker) for worker in workers))
        finally:
            master.terminate()
