"""`python -m tests.support.swarm_stand_in PORT HOSTS CARDS`: a manager node of a Docker Swarm, and its hosts.

It speaks the part of Docker's API that the driver `swarm` uses, on 127.0.0.1:PORT. Each host has an address
of its own on the loopback device. A service with a replica has a task on the host that its constraint names,
and the task has a server of `tests.bench.canned` on the port that the service publishes there. Answers are as
long as those of Docker: specifications, plugins and certificates stand in them.

`POST /stand-in/lose?host=N` ends the servers of a host, or with `silent=1` has them answer nothing;
`POST /stand-in/down?host=N` has the managers say that it is down; `POST /stand-in/mend?host=N` undoes both.
`GET /stand-in/counts` tells how many calls there were by kind, and how many bytes they got.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import httptools
import orjson
import uvloop

from tests.bench.canned import ON_CARD, CannedServer
from tests.support.swarm import CARD_KIND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LISTEN_S = 0.02
"""From a task's creation to an answer of its server: much less than a container takes."""

_PLUGINS = [
    {"Type": kind, "Name": name}
    for kind, names in {
        "Log": "awslogs fluentd gcplogs gelf journald json-file local none splunk syslog",
        "Network": "bridge host ipvlan macvlan null overlay",
        "Volume": "local",
    }.items()
    for name in names.split()
]
_CERTIFICATE = "-----BEGIN CERTIFICATE-----\n" + "MIIBajCCARCgAwIBAgIU" * 24 + "\n-----END CERTIFICATE-----\n"
_TLS = {
    "TrustRoot": _CERTIFICATE,
    "CertIssuerSubject": "MBMxETAPBgNVBAMTCHN3YXJtLWNh",
    "CertIssuerPublicKey": "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE" * 3,
}
_LINE = b'level=INFO msg="inference compute" id=GPU-0 library=CUDA compute=9.0 name=CUDA0\n'
_LOG = b"\1\0\0\0" + len(_LINE).to_bytes(4, "big") + _LINE
_CONSTRAINT = re.compile(r"node\.(id|hostname)==(.+)")
_OK, _CREATED, _NOT_FOUND, _CONFLICT, _REFUSED = 200, 201, 404, 409, 500
_REASONS = {200: "OK", 201: "Created", 404: "Not Found", 409: "Conflict", 500: "Internal Server Error"}
_MANAGER = "manager000000000000000000"
_INFO = {
    "ServerVersion": "29.0.0",
    "OperatingSystem": "stand-in",
    "Swarm": {"NodeID": _MANAGER, "LocalNodeState": "active", "ControlAvailable": True},
}
_FIXED = {
    "_ping": b'"OK"',
    "swarm": b'{"ID":"swarm"}',
    "info": orjson.dumps(_INFO),
    "version": b'{"Version":"29.0.0","Components":[{"Name":"Engine","Version":"29.0.0"}]}',
    "networks": b"[]",
}


def address_of(host: int) -> str:
    """The address of a host: one of its own on the loopback device."""
    return f"127.0.{1 + host // 200}.{1 + host % 200}"


def card_of(host: int, card: int) -> str:
    return f"GPU-{host:08x}-0000-4000-8000-{card:012x}"


@dataclass
class _Host:
    id: str
    number: int
    cards: tuple[str, ...]
    is_up: bool = True
    answers: bool = True
    json: bytes = b""

    @property
    def hostname(self) -> str:
        return f"host{self.number:02}"


@dataclass
class _Task:
    id: str
    service: _Service
    host: _Host
    created_at: str
    state: str = "preparing"
    wanted: str = "running"
    server: asyncio.Server | None = None
    connections: set[asyncio.BaseTransport] = field(default_factory=set)
    json: bytes = b""

    @property
    def port(self) -> int:
        ports: list[dict[str, Any]] = self.service.spec["EndpointSpec"]["Ports"]
        return int(ports[0]["PublishedPort"])

    @property
    def uses_card(self) -> bool:
        environment: list[str] = self.service.spec["TaskTemplate"]["ContainerSpec"]["Env"]
        return any(one.startswith("NVIDIA_VISIBLE_DEVICES=GPU-") for one in environment)


@dataclass
class _Service:
    id: str
    spec: dict[str, Any]
    before: dict[str, Any] | None = None
    version: int = 1
    created_at: str = ""
    tasks: list[_Task] = field(default_factory=list)
    json: bytes = b""

    @property
    def name(self) -> str:
        return str(self.spec["Name"])

    @property
    def replicas(self) -> int:
        return int(self.spec["Mode"]["Replicated"]["Replicas"])


class StandIn:
    """The managers' state, and the servers of the tasks.

    Args:
        hosts: how many there are, beside the manager node.
        cards: how many each of them has.
    """

    def __init__(self, hosts: int, cards: int) -> None:
        self._index = 1
        self.counts: Counter[str] = Counter()
        self._services: dict[str, _Service] = {}
        self._names: dict[str, _Service] = {}
        self._working: set[asyncio.Task[None]] = set()
        self.hosts = [
            _Host(
                f"n{number:024d}",
                number,
                tuple(card_of(number, card) for card in range(cards)),
            )
            for number in range(hosts)
        ]
        self._by_name = {name: host for host in self.hosts for name in (host.id, host.hostname)}
        self._manager = _node_json(_MANAGER, "manager", "127.0.200.1", (), is_up=True, is_manager=True)
        for host in self.hosts:
            self._describe(host)

    # --- the API ---

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes]:
        """The status and the JSON document of one answer."""
        parts = path.strip("/").split("/")
        if method == "GET":
            return self._told(parts, query)
        match parts:
            case ["services", "create"]:
                return self._create(orjson.loads(body))
            case ["services", name, "update"]:
                return self._update(name, int(query["version"][0]), orjson.loads(body))
            case ["stand-in", what]:
                return self._change(what, query)
        return _missing(path)

    def _told(self, parts: list[str], query: dict[str, list[str]]) -> tuple[int, bytes]:
        found: bytes | None = None
        match parts:
            case [kind] if kind in _FIXED:
                found = _FIXED[kind]
            case ["nodes"]:
                found = _array(self._nodes_of(query))
            case ["services"]:
                found = _array(one.json for one in self._services_of(query))
            case ["tasks"]:
                found = _array(one.json for one in self._tasks_of(query))
            case ["services", name] if (service := self._service(name)) is not None:
                found = service.json
            case ["tasks", _, "logs"]:
                found = _LOG
            case ["containers", "json"]:
                found = b"[]"
            case ["containers", name, "json"]:
                return _NOT_FOUND, _said(f"No such container: {name}")
            case ["stand-in", "counts"]:
                found = orjson.dumps(self.counts)
        return _missing("/".join(parts)) if found is None else (_OK, found)

    def _service(self, name: str) -> _Service | None:
        return self._services.get(name) or self._names.get(name)

    def _nodes_of(self, query: dict[str, list[str]]) -> list[bytes]:
        ids = _filters(query).get("id")
        if ids is None:
            return [self._manager, *(host.json for host in self.hosts)]
        return [self._by_name[one].json for one in ids if one in self._by_name]

    def _services_of(self, query: dict[str, list[str]]) -> Iterator[_Service]:
        labels = _filters(query).get("label", [])
        for one in self._services.values():
            if _has(one.spec["Labels"], labels):
                yield one

    def _tasks_of(self, query: dict[str, list[str]]) -> Iterator[_Task]:
        filters = _filters(query)
        states = filters.get("desired-state")
        names = filters.get("service")
        services: Iterable[_Service | None] = (
            self._services_of(query) if names is None else map(self._service, names)
        )
        for service in services:
            for task in service.tasks if service is not None else ():
                if states is None or task.wanted in states:
                    yield task

    def _create(self, spec: dict[str, Any]) -> tuple[int, bytes]:
        if spec["Name"] in self._names:
            return _CONFLICT, _said(f"name conflicts with an existing object: {spec['Name']}")
        service = _Service(_new_id(), spec, created_at=_now())
        self._services[service.id] = self._names[service.name] = service
        self._follow(service)
        return _CREATED, orjson.dumps({"ID": service.id})

    def _update(self, name: str, version: int, spec: dict[str, Any]) -> tuple[int, bytes]:
        service = self._service(name)
        if service is None:
            return _missing(name)
        if version != service.version:
            return _REFUSED, _said("rpc error: code = Unknown desc = update out of sequence")
        service.before, service.spec = service.spec, spec
        self._follow(service)
        return _OK, b'{"Warnings":null}'

    def _follow(self, service: _Service) -> None:
        """Do what a specification says: begin a task, or end those that there are."""
        self._index += 1
        service.version = self._index
        service.json = _service_json(service)
        if service.replicas == 0:
            for task in service.tasks:
                if task.wanted == "running":
                    self._end(task)
        elif not any(one.wanted == "running" for one in service.tasks):
            task = _Task(_new_id(), service, self._host_of(service), _now())
            service.tasks = [*service.tasks[-4:], task]  # as many as Swarm keeps
            self._note(task)
            self._later(self._begin(task))

    def _host_of(self, service: _Service) -> _Host:
        constraints = service.spec["TaskTemplate"]["Placement"]["Constraints"]
        found = (_CONSTRAINT.fullmatch(one) for one in constraints)
        return next(self._by_name[match[2]] for match in found if match)

    async def _begin(self, task: _Task) -> None:
        await asyncio.sleep(LISTEN_S)  # a container takes its time, whoever waits for it
        if task.wanted != "running":
            return
        task.server = await asyncio.get_running_loop().create_server(
            lambda: _Reached(task), address_of(task.host.number), task.port, backlog=2048
        )
        task.state = "running"
        self._note(task)

    def _end(self, task: _Task) -> None:
        task.wanted = task.state = "shutdown"
        _close(task)
        self._note(task)

    def _change(self, what: str, query: dict[str, list[str]]) -> tuple[int, bytes]:
        host = self.hosts[int(query["host"][0])]
        if what != "lose":
            host.is_up = what == "mend"
        tasks = [one for service in self._services.values() for one in service.tasks if one.host is host]
        running = [one for one in tasks if one.wanted == "running"]
        if what == "lose":
            host.answers = False
            if "silent" not in query:
                for one in running:
                    _close(one)
        elif what == "mend":
            host.answers = True
            for one in running:
                _close(one)
                self._later(self._begin(one))
        self._describe(host)
        return _OK, b"{}"

    # --- what is told ---

    def _describe(self, host: _Host) -> None:
        host.json = _node_json(
            host.id, host.hostname, address_of(host.number), host.cards, is_up=host.is_up, is_manager=False
        )

    def _note(self, task: _Task) -> None:
        task.json = _task_json(task)

    def _later(self, work: Any) -> None:
        running = asyncio.ensure_future(work)
        self._working.add(running)
        running.add_done_callback(self._working.discard)

    def close(self) -> None:
        for service in self._services.values():
            for task in service.tasks:
                _close(task)


class _Reached(CannedServer):
    """The server of a task: it answers nothing while its host is lost."""

    def __init__(self, task: _Task) -> None:
        super().__init__()
        self._task = task
        if task.uses_card:
            self.answers = ON_CARD
        self._own: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._own = transport
        self._task.connections.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._own is not None:
            self._task.connections.discard(self._own)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._task.host.answers:
            super().data_received(data)


class _Conversation(asyncio.Protocol):
    """One connection to the API."""

    def __init__(self, answer: Callable[[str, str, bytes], tuple[int, bytes] | None]) -> None:
        self._answer = answer
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        found = self._answer(self._parser.get_method().decode(), self._url.decode(), self._body)
        if found is None:  # events, of which there are none
            head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            self._transport.write(head.encode())
            return
        status, content = found
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self._transport.write(head.encode() + content)


class StandInApi:
    """Answers for a `StandIn`, and counts the calls."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def __call__(self) -> _Conversation:
        return _Conversation(self._answer)

    def _answer(self, method: str, url: str, body: bytes) -> tuple[int, bytes] | None:
        parts = urlsplit(url)
        path = re.sub(r"^/v\d+\.\d+/", "/", unquote(parts.path))
        if path == "/events":
            return None
        status, content = self._stand_in.answer(method, path, parse_qs(parts.query), body)
        kind = path.split("/")[1]
        if kind != "stand-in":
            self._stand_in.counts[f"{method} {kind}"] += 1
            self._stand_in.counts["bytes"] += len(content)
        return status, content


def _close(task: _Task) -> None:
    if task.server is not None:
        task.server.close()
        task.server = None
    for one in list(task.connections):
        cast("asyncio.Transport", one).abort()


def _array(entries: Iterable[bytes]) -> bytes:
    return b"[" + b",".join(entries) + b"]"


def _filters(query: dict[str, list[str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = orjson.loads(query["filters"][0]) if "filters" in query else {}
    return found


def _has(labels: dict[str, str], wanted: Iterable[str]) -> bool:
    pairs = (one.partition("=") for one in wanted)
    return all(labels.get(key) == value for key, _, value in pairs)


def _missing(what: str) -> tuple[int, bytes]:
    return _NOT_FOUND, _said(f"{what} not found")


def _said(message: str) -> bytes:
    return orjson.dumps({"message": message})


def _new_id() -> str:
    return secrets.token_hex(13)[:25]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "000Z")


def _node_json(
    id_: str, hostname: str, address: str, cards: Iterable[str], *, is_up: bool, is_manager: bool
) -> bytes:
    node: dict[str, Any] = {
        "ID": id_,
        "Version": {"Index": 9},
        "CreatedAt": "2026-01-01T00:00:00.000000000Z",
        "UpdatedAt": "2026-01-01T00:00:00.000000000Z",
        "Spec": {"Labels": {}, "Role": "manager" if is_manager else "worker", "Availability": "active"},
        "Description": {
            "Hostname": hostname,
            "Platform": {"Architecture": "x86_64", "OS": "linux"},
            "Resources": {
                "NanoCPUs": 64 * 10**9,
                "MemoryBytes": 512 * 2**30,
                "GenericResources": [
                    {"NamedResourceSpec": {"Kind": CARD_KIND, "Value": card}} for card in cards
                ],
            },
            "Engine": {"EngineVersion": "29.0.0", "Plugins": _PLUGINS},
            "TLSInfo": _TLS,
        },
        "Status": {"State": "ready" if is_up else "down", "Addr": address},
    }
    if is_manager:
        node["ManagerStatus"] = {"Leader": True, "Reachability": "reachable", "Addr": f"{address}:2377"}
    return orjson.dumps(node)


def _service_json(service: _Service) -> bytes:
    return orjson.dumps(
        {
            "ID": service.id,
            "Version": {"Index": service.version},
            "CreatedAt": service.created_at,
            "UpdatedAt": _now(),
            "Spec": service.spec,
            **({} if service.before is None else {"PreviousSpec": service.before}),
            "Endpoint": {"Spec": service.spec["EndpointSpec"]},
        }
    )


def _task_json(task: _Task) -> bytes:
    spec = task.service.spec
    status: dict[str, Any] = {
        "Timestamp": _now(),
        "State": task.state,
        "Message": task.state,
        "ContainerStatus": {"ContainerID": secrets.token_hex(32), "PID": 4242, "ExitCode": 0},
        "PortStatus": {"Ports": spec["EndpointSpec"].get("Ports", [])},
    }
    return orjson.dumps(
        {
            "ID": task.id,
            "Version": {"Index": task.service.version},
            "CreatedAt": task.created_at,
            "UpdatedAt": _now(),
            "Labels": {},
            "Spec": task.service.spec["TaskTemplate"],
            "ServiceID": task.service.id,
            "Slot": 1,
            "NodeID": task.host.id,
            "Status": status,
            "DesiredState": task.wanted,
            **(
                {"GenericResources": [{"NamedResourceSpec": {"Kind": CARD_KIND, "Value": "GPU"}}]}
                if task.uses_card
                else {}
            ),
            "Volumes": None,
        }
    )


async def _serve(port: int, hosts: int, cards: int) -> None:
    stand_in = StandIn(hosts, cards)
    server = await asyncio.get_running_loop().create_server(StandInApi(stand_in), "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(*map(int, sys.argv[1:])))
