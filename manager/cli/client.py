"""The control API as the command line sees it, through `requests`, which the Docker SDK brings along."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

import requests

from manager import __version__
from manager.cli.failures import FAILED, MISUSED, REFUSED, UNREACHABLE, CommandError, printable
from manager.cli.trust import trust, untrusted
from manager.domain.instance import MANAGED_DRIVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from manager.cli.locate import Endpoint

T = TypeVar("T")

_API = "/api/runtime/compute"
_NOT_FOUND = 404
_CONNECT_S = 5.0
_ANSWER_S = 10.0
# The daemon writes a comment into the event stream every 15 s: a longer silence means that it hangs.
_EVENT_SILENCE_S = 40.0
_LIVE_PIECE_BYTES = 2**16

_EXIT_CODES = {401: MISUSED, 403: MISUSED, 404: MISUSED, 409: REFUSED, 422: MISUSED}

_NEXT_STEPS = {
    "unauthorized": "put a key of the daemon (`keys create`, server.key_file) into $OLLAMA_MANAGER_KEY",
    "host_not_allowed": "name the daemon with --url as server.allowed_hosts does, or add this name there",
    "unknown_instance": "`ollama-manager status` lists the instances",
    "unknown_request": "`ollama-manager requests` lists the last ones",
    "forbidden": "a key with that scope is needed in $OLLAMA_MANAGER_KEY",
    "unknown_key": "`ollama-manager keys list` lists the keys",
    "unknown_run": "`ollama-manager runs list` lists the runs",
    "unknown_benchmark": "`ollama-manager benchmark list` lists the benchmarks",
    "unknown_workload": "`routing.workloads` names your own workloads",
    "nothing_loaded": "name a model with --model",
    "unknown_collection": "`ollama-manager collections list` lists the collections",
    "unknown_version": "`ollama-manager collections versions NAME` lists the versions",
    "version_stale": "`ollama-manager collections backfill NAME` makes the vectors of the new build",
    "backfill_open": "`ollama-manager collections backfill NAME --status` says how far it is",
    "below_threshold": "wait for the backfill, begin one, or give a lower --threshold",
    "run_not_ended": "`ollama-manager runs show ID` says how far it is",
    "max_running_reached": "stop one of them, or raise lifecycle.max_running",
    "image_missing": "`ollama-manager pull` fetches the images of all instances",
    "engine_unavailable": "`ollama-manager doctor` says more",
    "gpu_missing": "`ollama-manager doctor` says more",
    "vram_insufficient": "`ollama-manager doctor` shows who holds the memory",
    "start_timeout": "if it only is slow, raise start_timeout_s",
}


class DaemonUnreachableError(CommandError):
    """Nothing answers at the address, or something that is not this daemon."""

    def __init__(self, message: str, next_step: str | None = None) -> None:
        step = next_step or "start it with `ollama-manager serve`, or name another one with --url"
        super().__init__(message, exit_code=UNREACHABLE, next_step=step)


class RefusalError(CommandError):
    """The daemon said no.

    Attributes:
        status: of HTTP.
        code: the stable one of the API.
        details: what the API says beside it.
        log_tail: what the container said last.
        wait_s: when to try again, None where the daemon does not say.
    """

    def __init__(
        self, status: int, code: str, message: str, *, details: Mapping[str, Any], wait_s: str | None
    ) -> None:
        log_tail = tuple(map(str, details.get("log_tail") or ()))
        step = _NEXT_STEPS.get(code)
        if wait_s is not None and step is None:
            step = f"waiting may help: try again in {wait_s} s"
        super().__init__(
            message if f"({code}" in message else f"{message} ({code})",
            exit_code=_EXIT_CODES.get(status, FAILED),
            next_step=step,
            lines=log_tail,
        )
        self.status = status
        self.code = code
        self.details = details
        self.log_tail = log_tail
        self.wait_s = float(wait_s) if wait_s is not None and wait_s.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Card:
    """One card of an instance; None where it is not known. `host` is None for the daemon's own machine."""

    index: int | None
    name: str | None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """The device of an instance; memory in bytes of all its cards, None where it is not known.

    `uuid`, `index` and `name` are those of its first card.
    """

    kind: str | None
    uuid: str | None
    index: int | None
    name: str | None
    vram_total_bytes: int | None
    vram_used_bytes: int | None
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True, slots=True)
class Why:
    """The reason why an instance is not as one would wish."""

    code: str
    message: str
    log_tail: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    size_bytes: int
    vram_bytes: int


@dataclass(frozen=True, slots=True)
class Drained:
    """An order that keeps an instance out of service; times as the API has them."""

    since: str
    until: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Lifted:
    """An order that suspends the deny rules of an instance; `until` as the API has it."""

    until: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Breaker:
    """The breaker of an instance: `open` means that no request goes there until `retry_at`."""

    state: str
    failures: int
    retry_at: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class ImageOverride:
    """An upgrade that is in force; `previous` is the image that a roll-back returns to."""

    image: str
    previous: str


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance as a person is shown it; the API's answer has more.

    `node` is the host name of the node of a service of Docker Swarm, None where there is none.
    """

    id: str
    driver: str
    device: Device
    endpoint: str | None
    target: str
    phase: str
    health: str
    reason: Why | None
    in_flight: int
    pinned: bool
    ttl_s: float
    ttl_remaining_s: float | None
    models: tuple[Model, ...]
    drained: Drained | None = None
    image_override: ImageOverride | None = None
    lifted: Lifted | None = None
    breaker: Breaker | None = None  # an older daemon has none
    node: str | None = None

    @property
    def has_container(self) -> bool:
        """Return whether the daemon starts and stops its server."""
        return self.driver in MANAGED_DRIVERS


@dataclass(frozen=True, slots=True)
class Change:
    instance: Instance
    changed: bool


@dataclass(frozen=True, slots=True)
class Swept:
    """The effect of one sweep on one instance: `stopped`, `would_stop`, `kept` or `failed`."""

    id: str
    action: str
    detail: str


@dataclass(frozen=True, slots=True)
class Orphan:
    """A container of the daemon's that belongs to no instance; `remedy` is a command that removes it."""

    name: str
    is_running: bool
    why: str
    remedy: str


@dataclass(frozen=True, slots=True)
class PullLine:
    """One line of a pull; `layer` may also be a tag."""

    status: str
    image: str | None
    layer: str | None
    current_bytes: int | None
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Event:
    id: int
    at: str
    instance: str | None
    kind: str
    reason: str | None
    detail: str


class Daemon:
    """One daemon. Every method raises DaemonUnreachableError or RefusalError; use one object a thread."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._session = requests.Session()
        # Neither a proxy nor a .netrc: both are for the outside, and .netrc would replace our key.
        self._session.trust_env = False
        self._session.headers["User-Agent"] = f"ollama-manager/{__version__}"
        if endpoint.url.startswith("https://"):
            trust(self._session, endpoint)
        if endpoint.key is not None:
            self._session.headers["Authorization"] = f"Bearer {endpoint.key}"

    def status_document(self) -> dict[str, Any]:
        """Return the API's list of instances, with the orphans where the daemon lists them."""
        with self._answer("GET", f"{_API}/instances") as answer:
            document = _document(answer)
        with self._answer("GET", f"{_API}/orphans", also=_NOT_FOUND) as answer:
            if answer.status_code != _NOT_FOUND:  # an older daemon has no such list
                document["orphans"] = self._read(lambda body: body["orphans"], _document(answer))
        return document

    def instance(self, instance_id: str) -> Instance:
        with self._answer("GET", f"{_API}/instances/{_quoted(instance_id)}") as answer:
            return self._read(_instance, _document(answer))

    def read_instances(self, document: dict[str, Any]) -> tuple[Instance, ...]:
        return self._read(lambda body: tuple(map(_instance, body["instances"])), document)

    def read_orphans(self, document: dict[str, Any]) -> tuple[Orphan, ...]:
        return self._read(lambda body: tuple(map(_orphan, body.get("orphans", ()))), document)

    def start(self, instance_id: str) -> Change:
        """Returns when the instance is ready, however long that takes."""
        return self._change(instance_id, "start")

    def stop(self, instance_id: str, *, force: bool) -> Change:
        return self._change(instance_id, "stop?force=true" if force else "stop")

    def load(self, instance_id: str, model: str, keep_alive: str | float | None) -> Change:
        """Returns when the model is in memory, however long that takes."""
        body = {"model": model} if keep_alive is None else {"model": model, "keep_alive": keep_alive}
        return self._change(instance_id, "load", body)

    def unload(self, instance_id: str, model: str) -> Change:
        return self._change(instance_id, "unload", {"model": model})

    def lift(self, instance_id: str, until: str, reason: str | None) -> Change:
        return self._change(instance_id, "lift", {"until": until, "reason": reason})

    def end_lift(self, instance_id: str) -> Change:
        return self._change(instance_id, "lift", method="DELETE")

    def drain(self, instance_id: str, *, reason: str | None, until: str | None, stop: bool) -> Change:
        """Returns when the open requests have ended and the container is stopped, if it is to be."""
        return self._change(instance_id, "drain", {"reason": reason, "until": until, "stop": stop})

    def resume(self, instance_id: str) -> Change:
        return self._change(instance_id, "resume")

    def restart(self, instance_id: str) -> Change:
        """Returns when the instance is ready with a new container, however long that takes."""
        return self._change(instance_id, "restart")

    def upgrade(self, instance_id: str, image: str) -> Change:
        return self._change(instance_id, "upgrade", {"image": image})

    def rollback(self, instance_id: str) -> Change:
        return self._change(instance_id, "rollback")

    def reset_breaker(self, instance_id: str) -> Instance:
        with self._answer("POST", f"{_API}/instances/{_quoted(instance_id)}/breaker/reset") as answer:
            return self._read(_instance, _document(answer))

    def reap(self, *, dry_run: bool) -> tuple[Swept, ...]:
        path = f"{_API}/reap?dry_run=true" if dry_run else f"{_API}/reap"
        with self._answer("POST", path, silence_s=None) as answer:
            return self._read(_sweep, _document(answer))

    def why_not_ready(self) -> tuple[str, ...]:
        with self._answer("GET", "/readyz", also=503) as answer:
            return self._read(lambda body: tuple(map(str, body["reasons"])), _document(answer))

    def lost_cards(self) -> tuple[str, ...]:
        """The reasons why lost cards cannot be used."""
        with self._answer("GET", f"{_API}/gpus") as answer:
            return self._read(
                lambda body: tuple(str(it["lost"]) for it in body["gpus"] if it.get("lost")),
                _document(answer),
            )

    def pull(self, image: str | None) -> Iterator[PullLine]:
        """Progress until the image, or every image of the configured instances, is there."""
        body = {} if image is None else {"image": image}
        with ExitStack() as stack:
            try:
                answer = stack.enter_context(
                    self._answer("POST", f"{_API}/pull", body=body, silence_s=None, stream=True)
                )
            except RefusalError as error:
                raise _pull_refusal(error) from error
            for line in answer.iter_lines():
                entry = _parsed(line)
                if "error" in entry:
                    raise _pull_refusal(_refusal(FAILED, entry, None))
                yield self._read(_pull_line, entry)

    def effective_models(self) -> dict[str, Any]:
        """All values of roles, each with its source."""
        with self._answer("GET", "/api/settings/models/effective") as answer:
            return _document(answer)

    def ask(self, method: str, path: str, body: object = None, *, is_long: bool = False) -> dict[str, Any]:
        """Return the JSON answer to one request; one that `is_long` may take however long it takes."""
        with self._answer(method, path, body=body, silence_s=None if is_long else _ANSWER_S) as answer:
            return _document(answer)

    def listed(self, path: str) -> list[dict[str, Any]]:
        """Return the JSON answer to a GET, which is a list."""
        with self._answer("GET", path) as answer:
            return self._read(_list, {"answer": _value(answer.content)})

    @contextmanager
    def fetch(self, path: str, *, also: int) -> Iterator[requests.Response]:
        """Read an answer in pieces; one with the status `also` is no refusal."""
        with self._answer("GET", path, stream=True, also=also) as answer:
            yield answer

    def read(self, read: Callable[[dict[str, Any]], T], document: dict[str, Any]) -> T:
        """Return what `read` makes of an answer.

        Raises:
            DaemonUnreachableError: it is no answer of a daemon of this version.
        """
        return self._read(read, document)

    def instance_document(self, instance_id: str) -> dict[str, Any]:
        """Return the API's answer about one instance."""
        return self.ask("GET", f"{_API}/instances/{_quoted(instance_id)}")

    def logs(self, instance_id: str, tail: int, *, follow: bool) -> Iterator[bytes]:
        """The last lines of an instance's container; with `follow` what it writes until it ends."""
        path = f"{_API}/instances/{_quoted(instance_id)}/logs?tail={tail}"
        with self._answer(
            "GET",
            f"{path}&follow=true" if follow else path,
            silence_s=None if follow else _ANSWER_S,
            stream=True,
        ) as answer:
            yield from answer.iter_content(None)

    def events(
        self, after_id: int | None = None, *, last: int = 0, follow: bool = True
    ) -> Iterator[Event | None]:
        """Events as they happen; None once the stream stands, and for every sign of life.

        Args:
            after_id: begin after that one; None: see `last`.
            last: begin with that many of those there are.
            follow: go on after those there are.
        """
        query = "&".join([*([f"last={last}"] if last else []), *([] if follow else ["follow=false"])])
        path = f"{_API}/events?{query}" if query else f"{_API}/events"
        headers = {} if after_id is None else {"Last-Event-ID": str(after_id)}
        with self._answer("GET", path, silence_s=_EVENT_SILENCE_S, stream=True, headers=headers) as answer:
            for line in answer.iter_lines():
                if line.startswith(b":"):
                    yield None
                elif line.startswith(b"data:"):
                    yield self._read(_event, _parsed(line.removeprefix(b"data:")))

    def live(self) -> Iterator[dict[str, Any] | None]:
        """Frames of the live channel: all sections, then changed ones; None for every sign of life."""
        with self._answer("GET", f"{_API}/live", silence_s=_EVENT_SILENCE_S, stream=True) as answer:
            # Frames are long: the default pieces of 512 bytes would take most of the time.
            for line in answer.iter_lines(_LIVE_PIECE_BYTES):
                if line.startswith(b":"):
                    yield None
                elif line.startswith(b"data:"):
                    yield _parsed(line.removeprefix(b"data:"))

    def last_requests(self, **query: str | int | None) -> dict[str, Any]:
        """Return the API's list of requests; parameters that are None are left out."""
        return self._get("requests", query)

    def request(self, request_id: str) -> dict[str, Any]:
        """Return one request with its decision."""
        return self._get(f"requests/{_quoted(request_id)}", {})

    def cancel_request(self, request_id: str) -> None:
        """Cancel an open request."""
        with self._answer("DELETE", f"{_API}/requests/{_quoted(request_id)}"):
            pass

    def explain(self, **query: str | None) -> dict[str, Any]:
        """Return where a request would go."""
        return self._get("explain", query)

    def _get(self, path: str, query: Mapping[str, str | int | None]) -> dict[str, Any]:
        given = urlencode({name: value for name, value in query.items() if value is not None})
        with self._answer("GET", f"{_API}/{path}?{given}" if given else f"{_API}/{path}") as answer:
            return _document(answer)

    def _change(self, instance_id: str, verb: str, body: object = None, *, method: str = "POST") -> Change:
        path = f"{_API}/instances/{_quoted(instance_id)}/{verb}"
        with self._answer(method, path, body=body, silence_s=None) as answer:
            return self._read(_change, _document(answer))

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        silence_s: float | None = _ANSWER_S,
        stream: bool = False,
        also: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[requests.Response]:
        """A good answer, or one with the status `also`; transport errors are translated."""
        try:
            with self._session.request(
                method,
                self.endpoint.url + path,
                json=body,
                headers=headers,
                timeout=(_CONNECT_S, silence_s),
                stream=stream,
                allow_redirects=False,
            ) as answer:
                if answer.status_code != also and not answer.ok:
                    raise _refusal(answer.status_code, _document(answer), answer.headers.get("Retry-After"))
                yield answer
        except _Strange as error:
            raise self._stranger() from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise DaemonUnreachableError(
                f"the connection to the daemon at {self.endpoint.url} broke off in the middle of an answer",
                "it may have ended: `ollama-manager status` says if it runs",
            ) from error
        except requests.Timeout as error:
            raise DaemonUnreachableError(
                f"the daemon at {self.endpoint.url} does not answer in time",
                "it may be overloaded or suspended; look at its process and its log",
            ) from error
        except (requests.RequestException, OSError) as error:
            why, step = untrusted(error) or (_cause(error), None)
            raise DaemonUnreachableError(
                f"the daemon at {self.endpoint.url} cannot be reached ({why})", step
            ) from error

    def _read(self, read: Callable[[dict[str, Any]], T], body: dict[str, Any]) -> T:
        try:
            return read(body)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._stranger() from error

    def _stranger(self) -> DaemonUnreachableError:
        return DaemonUnreachableError(
            f"what answers at {self.endpoint.url} is not an ollama-manager of this version",
            "check --url, $OLLAMA_MANAGER_URL and server.port",
        )


class _Strange(Exception):  # noqa: N818  (never leaves this file)
    """An answer that this daemon would not give."""


def _document(answer: requests.Response) -> dict[str, Any]:
    return _parsed(answer.content)


def _value(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _Strange from error


def _parsed(text: bytes) -> dict[str, Any]:
    body = _value(text)
    if not isinstance(body, dict):
        raise _Strange
    return body


def _list(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = document["answer"]
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise TypeError("a list of objects is expected")
    return found


def _refusal(status: int, body: dict[str, Any], wait_s: str | None) -> RefusalError:
    error = body.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("code"), str):
        raise _Strange
    details = error.get("details")
    return RefusalError(
        status,
        error["code"],
        printable(str(error.get("message", ""))),
        details=details if isinstance(details, dict) else {},
        wait_s=wait_s,
    )


def _pull_refusal(error: RefusalError) -> RefusalError:
    """The usual advice for a missing image is to pull it, which has just failed."""
    if error.code == "image_missing":
        error.next_step = "`docker pull` says more"
    return error


def _instance(body: dict[str, Any]) -> Instance:
    device, reason = body["device"], body["reason"]
    return Instance(
        id=str(body["id"]),
        driver=str(body["driver"]),
        device=Device(
            kind=device["kind"],
            uuid=device["uuid"],
            index=device["index"],
            name=device["name"],
            vram_total_bytes=device["vram_total_bytes"],
            vram_used_bytes=device["vram_used_bytes"],
            cards=tuple(
                [
                    Card(index=one["index"], name=one["name"], host=one.get("host"))
                    for one in device.get("cards", ())
                ]
            ),
        ),
        endpoint=body["endpoint"],
        target=str(body["target"]),
        phase=str(body["phase"]),
        health=str(body["health"]),
        reason=reason
        and Why(
            code=str(reason["code"]),
            message=str(reason["message"]),
            log_tail=tuple(map(str, reason["log_tail"])),
        ),
        in_flight=int(body["in_flight"]),
        pinned=bool(body["pinned"]),
        ttl_s=float(body["ttl_s"]),
        ttl_remaining_s=body["ttl_remaining_s"],
        models=tuple(Model(m["name"], m["size_bytes"], m["vram_bytes"]) for m in body["models"]),
        # An older daemon has none of these.
        drained=(out := body.get("drained")) and Drained(out["since"], out["until"], out["reason"]),
        image_override=(new := body.get("image_override")) and ImageOverride(new["image"], new["previous"]),
        lifted=(lift := body.get("lifted")) and Lifted(lift["until"], lift["reason"]),
        breaker=_breaker(body.get("breaker")),
        node=body.get("node"),
    )


def _breaker(body: dict[str, Any] | None) -> Breaker | None:
    if body is None:
        return None
    return Breaker(
        state=str(body["state"]),
        failures=int(body["failures"]),
        retry_at=body["retry_at"],
        reason=body["reason"],
    )


def _orphan(body: dict[str, Any]) -> Orphan:
    return Orphan(
        name=str(body["name"]),
        is_running=bool(body["running"]),
        why=str(body["why"]),
        remedy=str(body["remedy"]),
    )


def _change(body: dict[str, Any]) -> Change:
    return Change(_instance(body["instance"]), bool(body["changed"]))


def _sweep(body: dict[str, Any]) -> tuple[Swept, ...]:
    return tuple(Swept(one["id"], one["action"], one["detail"]) for one in body["instances"])


def _pull_line(body: dict[str, Any]) -> PullLine:
    return PullLine(
        status=str(body["status"]),
        image=body.get("image"),
        layer=body.get("layer"),
        current_bytes=body.get("current_bytes"),
        total_bytes=body.get("total_bytes"),
    )


def _event(body: dict[str, Any]) -> Event:
    return Event(
        id=body["id"],
        at=body["at"],
        instance=body["instance"],
        kind=body["kind"],
        reason=body["reason"],
        detail=body["detail"],
    )


def _quoted(instance_id: str) -> str:
    return quote(instance_id, safe="")


def _cause(error: BaseException) -> str:
    """The part of an error that people can act on: a refused connection is wrapped four times."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        inner = getattr(cause, "reason", None) or next(iter(cause.args), None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__ or cause.__context__
    plain = next((one for one in reversed(seen) if isinstance(one, OSError) and one.strerror), None)
    return str(plain.strerror) if plain is not None else type(seen[-1]).__name__
