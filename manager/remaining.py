"""Open requests of a replaced daemon: it ends them, and shares slots, leases and the list with the new one.

Both daemons have one end of a stream socket, which moves beside the listener (`manager.handover`). Each
message is a line of JSON, an object of one name and its values:

    old: holds [slot, lane, instance, age_s]        a request uses a slot
         asks [slot, lane, project, instances, age_s, is_run]   a request waits for one
         back slot                                  it has ended, or waits no longer
         leases {instance: count}                   all open leases, whenever they have changed
         known                                      all of the above was sent once
         answer [number, value], end [number, value]
    new: hello                                      it has this code
         given [slot, instance], refused slot
         listed [number, filters], shown [number, id], cancel [number, id]

The new daemon gives all slots, so that there are never more in use than exist. An end of the stream gives
everything back: the new daemon forgets what the old one has used, and the old one gives its slots again.
A new daemon of a version without this says no hello: the old one gives its slots again, as the new one does.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from manager.domain.history import Filters
from manager.errors import UnknownInstanceError
from manager.services.lanes.slots import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from manager.domain.lanes import Waiter
    from manager.services.instances.leases import Lease
    from manager.services.lanes.slots import Slots
    from manager.services.open_requests import OpenRequests

_log = structlog.get_logger("handover")

# The longest line is one request with all its attempts and passed-over candidates: about 0.8 MiB.
_MOST_LINE = 2**21
# The old daemon has all it has to tell in memory, and the new one a loop that has just begun.
_KNOWN_WITHIN_S = 5.0
_HELLO_WITHIN_S = 2.0
_ANSWERS_WITHIN_S = 2.0
# Questions without an answer, beyond which nothing more is asked.
_MOST_ASKED = 64
# The new daemon learns of a lease so much later.
_LEASES_EVERY_S = 0.05


class _Line:
    """One end of the stream. What is sent before `run` waits for it.

    `send` does not wait: the messages of slots are bounded by the requests of the old daemon, and the
    questions of the new one by `_MOST_ASKED`.
    """

    def __init__(self, end: socket.socket | None) -> None:
        self._end = end
        self._early: list[bytes] = []
        self._writer: asyncio.StreamWriter | None = None
        self.is_open = end is not None

    def send(self, **message: Any) -> None:
        line = orjson.dumps(message, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)
        if self._writer is None:
            self._early.append(line)
        elif self.is_open:
            self._writer.write(line)

    async def room(self) -> None:
        """Wait until the other end has read most of what was sent."""
        if self._writer is not None:
            await self._writer.drain()

    async def run(self, take: Callable[[str, Any], None]) -> None:
        """Call `take` with each message, until the other end closes or `close` is called."""
        try:
            if not self.is_open:
                return
            reader, writer = await asyncio.open_unix_connection(sock=self._end, limit=_MOST_LINE)
            self._writer = writer
            writer.writelines(self._early)
            self._early.clear()
            while self.is_open and (line := await reader.readline()):
                ((name, value),) = orjson.loads(line).items()
                take(name, value)
        except OSError:
            pass  # the other end has closed
        except ValueError as error:  # a defect, and the other daemon ends as if it were gone
            _log.error("handover_misunderstood", exc_info=error)
        finally:
            self.close()

    def close(self) -> None:
        self.is_open = False
        if self._writer is not None:
            self._writer.close()
        elif self._end is not None:
            self._end.close()


class Remaining:
    """The open requests of a daemon that is being replaced: the old one's side. Lives on the event loop.

    Args:
        slots: of this daemon.
        open_requests: of this daemon.
        in_flight: its open leases by instance, read live.
    """

    def __init__(self, slots: Slots, open_requests: OpenRequests, in_flight: Mapping[str, int]) -> None:
        self._slots = slots
        self._open_requests = open_requests
        self._in_flight = in_flight
        self._line: _Line | None = None
        self._number = 0
        self._numbers: dict[Waiter, int] = {}
        self._asked: dict[int, tuple[Waiter, str]] = {}
        self._leases: dict[str, int] = {}
        self._heard = asyncio.Event()
        self._questions: asyncio.Queue[tuple[str, int, Any]] = asyncio.Queue(_MOST_ASKED)
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> socket.socket:
        """Let the daemon with the returned end of the stream give all slots from now on."""
        self.close()
        here, there = socket.socketpair()
        self._line = line = _Line(here)
        self._heard.clear()
        self._leases.clear()
        self._questions = asyncio.Queue(_MOST_ASKED)
        self._slots.leave_to(
            self,
            [(one.place, one.record.project_id) for _, one in self._open_requests if one.place is not None],
        )
        self._tell_leases(line)
        line.send(known=None)
        self._task = asyncio.ensure_future(self._run(line))
        return there

    def begin_here(self) -> Elsewhere:
        """As `begin`, for another daemon of this process."""
        return Elsewhere(self.begin())

    async def confirmed(self) -> None:
        """Wait for the hello of a daemon that serves; give the slots here again where none comes."""
        try:
            async with asyncio.timeout(_HELLO_WITHIN_S):
                await self._heard.wait()
        except TimeoutError:
            self.close()

    def close(self) -> None:
        """Give the slots here again; the other daemon gives those back that are still in use."""
        line, self._line = self._line, None
        if line is None:
            return
        line.close()
        self._numbers.clear()
        asked, self._asked = self._asked, {}
        self._slots.give_again(asked.values())

    # --- what `Slots` calls ---

    def holds(self, waiter: Waiter) -> None:
        if self._line is not None:
            age_s = monotonic() - waiter.since
            self._line.send(holds=[self._numbered(waiter), waiter.lane, waiter.instance, age_s])

    def asks(self, waiter: Waiter, project: str) -> None:
        if self._line is not None:
            number, age_s = self._numbered(waiter), monotonic() - waiter.since
            self._asked[number] = waiter, project
            self._line.send(asks=[number, waiter.lane, project, waiter.instances, age_s, waiter.is_run])

    def gave_back(self, waiter: Waiter) -> None:
        number = self._numbers.pop(waiter, None)
        if number is not None and self._line is not None:
            self._asked.pop(number, None)
            self._line.send(back=number)

    # --- helpers ---

    def _numbered(self, waiter: Waiter) -> int:
        self._number += 1
        self._numbers[waiter] = self._number
        return self._number

    async def _run(self, line: _Line) -> None:
        besides = [asyncio.ensure_future(work(line)) for work in (self._watch_leases, self._answer)]
        try:
            await line.run(self._take)
        finally:
            for task in besides:
                task.cancel()
            if line is self._line:
                self.close()

    def _take(self, name: str, value: Any) -> None:
        if name == "hello":
            self._heard.set()
        elif name == "given":
            number, instance = value
            waiter, _ = self._asked.pop(number, (None, ""))
            if waiter is not None:
                self._slots.given(waiter, instance)
        elif name == "refused":
            waiter, _ = self._asked.pop(value, (None, ""))
            if waiter is not None:
                del self._numbers[waiter]
                self._slots.refused(waiter)
        elif not self._questions.full():
            self._questions.put_nowait((name, *value))

    async def _answer(self, line: _Line) -> None:
        """Answer one question after the other, as fast as the answers are read."""
        with suppress(OSError):  # the other end has closed
            while True:
                name, number, what = await self._questions.get()
                if name == "listed":
                    for one in self._open_requests.listed_here(Filters(**what)):
                        line.send(answer=[number, one])
                        await line.room()
                    line.send(end=[number, None])
                elif name == "shown":
                    line.send(end=[number, self._open_requests.shown_here(what)])
                elif name == "cancel":
                    line.send(end=[number, self._open_requests.cancel_here(what)])

    async def _watch_leases(self, line: _Line) -> None:
        while True:
            await asyncio.sleep(_LEASES_EVERY_S)
            self._tell_leases(line)

    def _tell_leases(self, line: _Line) -> None:
        leases = {id_: count for id_, count in self._in_flight.items() if count}
        if leases != self._leases:
            self._leases = leases
            line.send(leases=leases)


class Elsewhere:
    """The open requests of the daemon that this one replaces: the new one's side. Lives on the event loop.

    Implements `services.open_requests.RequestsElsewhere`.

    Args:
        line: the end of the stream; None where no daemon is replaced, or one of a version without it.
    """

    _slots: Slots
    _lease: Callable[[str], Lease]

    def __init__(self, line: socket.socket | None = None) -> None:
        self._line = _Line(line)
        self._places: dict[int, Place] = {}
        self._waiting: dict[int, asyncio.Task[None]] = {}
        self._leases: dict[str, list[Lease]] = {}
        self._known = asyncio.Event()
        self._number = 0
        self._asked: dict[int, tuple[list[dict[str, Any]], asyncio.Future[Any]]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Return whether the other daemon still ends requests, as far as it tells."""
        return self._line.is_open

    async def begin(self, slots: Slots, lease: Callable[[str], Lease]) -> None:
        """Take over what the other daemon uses, before this one serves.

        Args:
            slots: of this daemon; it gives those of both.
            lease: counts a lease of an instance.
        """
        if not self.is_open:
            return
        self._slots, self._lease = slots, lease
        slots.refresh()
        self._line.send(hello=None)
        self._task = asyncio.ensure_future(self._run())
        try:
            async with asyncio.timeout(_KNOWN_WITHIN_S):
                await self._known.wait()
        except TimeoutError:
            _log.warning("slots_unknown", hint="the replaced daemon does not tell what its requests use")

    def close(self) -> None:
        """Hear no more from the other daemon."""
        self._line.close()

    async def listed(self, filters: Filters) -> list[dict[str, Any]]:
        """See `RequestsElsewhere`."""
        found: list[dict[str, Any]] = []
        await self._ask("listed", filters._asdict(), found)
        return found

    async def shown(self, request_id: str) -> dict[str, Any] | None:
        """See `RequestsElsewhere`."""
        found: dict[str, Any] | None = await self._ask("shown", request_id, [])
        return found

    async def cancel(self, request_id: str) -> bool:
        """See `RequestsElsewhere`."""
        return bool(await self._ask("cancel", request_id, []))

    # --- helpers ---

    async def _ask(self, what: str, value: Any, found: list[dict[str, Any]]) -> Any:
        if not self._line.is_open or len(self._asked) >= _MOST_ASKED:
            return None
        self._number += 1
        number, answer = self._number, asyncio.get_running_loop().create_future()
        self._asked[number] = found, answer
        self._line.send(**{what: [number, value]})
        try:
            async with asyncio.timeout(_ANSWERS_WITHIN_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._asked[number]

    async def _run(self) -> None:
        try:
            await self._line.run(self._take)
        finally:
            self._end()

    def _end(self) -> None:
        """Give everything back."""
        self._known.set()
        for task in self._waiting.values():
            task.cancel()
        for place in self._places.values():
            place.give_back()
        self._places.clear()
        self._take_leases({})
        for _, answer in self._asked.values():
            if not answer.done():
                answer.set_result(None)

    def _take(self, name: str, value: Any) -> None:
        if name == "holds":
            number, lane, instance, age_s = value
            self._places[number] = self._slots.hold(lane, instance, monotonic() - age_s)
        elif name == "asks":
            self._enter(value)
        elif name == "back":
            self._give_back(value)
        elif name == "leases":
            self._take_leases(value)
        elif name == "known":
            self._known.set()
        else:
            self._take_answer(name, *value)

    def _enter(self, values: list[Any]) -> None:
        number, lane, project, instances, age_s, is_run = values
        wanted = tuple(instances)
        since = monotonic() - age_s
        entry = self._slots.enter(lane, project, wanted, lambda: wanted, since=since, is_run=is_run)
        if not isinstance(entry, Place):
            self._line.send(refused=number)
            return
        self._places[number] = entry
        if entry.instance is not None:
            self._line.send(given=[number, entry.instance])
        else:
            task = self._waiting[number] = asyncio.ensure_future(self._settle(number, entry))
            task.add_done_callback(lambda _: self._waiting.pop(number))

    async def _settle(self, number: int, place: Place) -> None:
        """Wait for a slot; the other daemon gives up when the time of the request is over."""
        await place.settled(within_s=None)
        if place.instance is not None:
            self._line.send(given=[number, place.instance])
        else:
            self._places.pop(number).give_back()
            self._line.send(refused=number)

    def _take_leases(self, counts: Mapping[str, int]) -> None:
        for id_ in {*counts, *self._leases}:
            held, count = self._leases.setdefault(id_, []), counts.get(id_, 0)
            with suppress(UnknownInstanceError):  # the configuration has it no longer
                while len(held) < count:
                    held.append(self._lease(id_))
            while len(held) > count:
                held.pop().release()

    def _give_back(self, number: int) -> None:
        place = self._places.pop(number, None)
        if place is not None:
            place.give_back()
        if number in self._waiting:
            self._waiting[number].cancel()

    def _take_answer(self, name: str, number: int, value: Any) -> None:
        if number not in self._asked:
            return  # the time for it is over
        found, answer = self._asked[number]
        if name == "answer":
            found.append(value)
        elif not answer.done():
            answer.set_result(value)
