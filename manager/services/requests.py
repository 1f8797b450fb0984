"""Begins the record of each request."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from random import getrandbits
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.record import RequestRecord, never
from manager.wire.caller import flag_of, shown
from manager.wire.head import forwarded
from manager.wire.trace import is_sampled, read_traceparent, traceparent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from manager.domain.keys import Grant
    from manager.domain.roles import RequestKind
    from manager.wire.caller import HeaderNames
    from manager.wire.head import Header


class Origin(NamedTuple):
    """The client of a request, by its head. `trace` is trace id, span id and flags.

    `fault` is why the request cannot be served, for the client; None where it can. `key` is the name of the
    key, None where none is needed.
    """

    instance: str | None
    lane: str | None
    project: str
    intent: str | None
    local_only: bool
    trace: tuple[str, str, str] | None
    fault: str | None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """A request beside the relay: its record, its pin, the headers for the server, the fault of `Origin`."""

    record: RequestRecord
    instance: str | None
    headers: Sequence[Header]
    fault: str | None


class Requests:
    """Begins records. Ids are random for each daemon, with a counter behind: cheap, and hard to guess.

    Args:
        names: of the headers in which clients say where they belong and want to go.
        default_project: of clients that name none.
        samples: whether a trace that begins here is sampled.
        used: takes the name of the key of each request.
    """

    def __init__(
        self,
        names: HeaderNames,
        *,
        default_project: str,
        samples: Callable[[str], bool] = never,
        used: set[str] | None = None,
    ) -> None:
        self.names = names
        self.default_project = default_project
        self._samples = samples
        self._used = set() if used is None else used
        self._prefix = os.urandom(6).hex()
        self._span_prefix = os.urandom(4).hex()
        self._numbers = itertools.count(1)

    def origin(self, headers: list[Header], grant: Grant | None = None) -> Origin:
        """Read the head of a request; names in lower case.

        A header grants nothing that the key does not: the project of a key replaces the one that is named.
        """
        given = dict(headers)
        names = self.names
        local_only, fault = False, None
        if names.local_only in given:
            values = [value for name, value in headers if name == names.local_only]
            local_only, fault = flag_of(names.local_only, values)
        key, project, is_local = (None, None, False)
        if grant is not None:
            key, project, is_local = grant.name, grant.project, grant.is_local
        return Origin(
            instance=shown(given.get(names.instance)),
            lane=shown(given.get(names.lane)),
            project=project or shown(given.get(names.project)) or self.default_project,
            intent=shown(given.get(names.intent)),
            local_only=local_only or is_local,
            trace=read_traceparent(given.get(b"traceparent")),
            fault=fault,
            key=key,
        )

    def record(self, path: str, kind: RequestKind | None, origin: Origin) -> RequestRecord:
        """Begin the record of a request.

        Args:
            path: the route, as it is logged.
            kind: None for requests that manage models.
            origin: its client.
        """
        number = next(self._numbers)
        trace = origin.trace
        trace_id = trace[0] if trace else f"{getrandbits(128):032x}"
        record = RequestRecord.begun(
            ts=datetime.now(UTC),
            request_id=f"{self._prefix}{number:08x}",
            trace_id=trace_id,
            span_id=f"{self._span_prefix}{number:08x}",
            parent_span_id=trace[1] if trace else None,
            project_id=origin.project,
            path=path,
            sampled=is_sampled(trace[2]) if trace else self._samples(trace_id),
            kind=kind,
            lane=origin.lane,
            intent=origin.intent,
        )
        if origin.local_only:
            record.local_only = True
        if origin.key is not None:
            record.key = origin.key
            self._used.add(origin.key)
        return record

    def begin(
        self, path: str, kind: RequestKind | None, headers: list[Header], grant: Grant | None = None
    ) -> Begun:
        """Begin a request that does not go through the relay; arguments as for `record` and `origin`."""
        origin = self.origin(headers, grant)
        record = self.record(path, kind, origin)
        lines = forwarded(headers, self.names.all)
        pairs = [(name, value) for name, _, value in (line[:-2].partition(b": ") for line in lines)]
        pairs += [
            (b"x-request-id", record.request_id.encode()),
            (b"traceparent", traceparent(record.trace_id, record.span_id, sampled=record.sampled)),
        ]
        return Begun(record, origin.instance, pairs, origin.fault)
