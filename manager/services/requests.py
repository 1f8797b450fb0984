"""The records of requests that do not go through the relay: begun here, ended in the gateway."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from random import getrandbits
from typing import TYPE_CHECKING

from manager.services.traffic import RequestRecord, never
from manager.wire.caller import shown
from manager.wire.head import forwarded
from manager.wire.trace import is_sampled, read_traceparent, traceparent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from manager.wire.caller import HeaderNames
    from manager.wire.head import Header


@dataclass(frozen=True, slots=True)
class Begun:
    """A request that has come: its record, the instance it is pinned to, and what a server is to see."""

    record: RequestRecord
    instance: str | None
    headers: Sequence[Header]


class Requests:
    """Begins records.

    Args:
        names: under which headers callers say where they belong and want to go.
        default_project: where requests belong that do not say.
        samples: whether a trace that begins here is sampled.
    """

    def __init__(
        self, names: HeaderNames, *, default_project: str, samples: Callable[[str], bool] = never
    ) -> None:
        self._names = names
        self._default_project = default_project
        self._samples = samples
        # Ids that nobody can guess from another daemon's, at the price of a counter.
        self._prefix = os.urandom(6).hex()
        self._span_prefix = os.urandom(4).hex()
        self._numbers = itertools.count(1)

    def begin(self, path: str, headers: list[Header]) -> Begun:
        """Begin a record.

        Args:
            path: the route, as it is logged.
            headers: names in lower case.
        """
        given = dict(headers)
        names = self._names
        number = next(self._numbers)
        trace = read_traceparent(given.get(b"traceparent"))
        trace_id = trace[0] if trace else f"{getrandbits(128):032x}"
        record = RequestRecord(
            ts=datetime.now(UTC),
            request_id=f"{self._prefix}{number:08x}",
            trace_id=trace_id,
            span_id=f"{self._span_prefix}{number:08x}",
            parent_span_id=trace[1] if trace else None,
            project_id=shown(given.get(names.project)) or self._default_project,
            path=path,
            sampled=is_sampled(trace[2]) if trace else self._samples(trace_id),
            lane=shown(given.get(names.lane)),
            intent=shown(given.get(names.intent)),
        )
        lines = forwarded(headers, names.all)
        pairs = [(name, value) for name, _, value in (line[:-2].partition(b": ") for line in lines)]
        pairs += [
            (b"x-request-id", record.request_id.encode()),
            (b"traceparent", traceparent(record.trace_id, record.span_id, sampled=record.sampled)),
        ]
        return Begun(record, shown(given.get(names.instance)), pairs)
