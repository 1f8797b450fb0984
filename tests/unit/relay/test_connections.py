"""The limit of connections: who has to go for whom."""

from __future__ import annotations

import structlog.testing

from manager.relay.connections import ConnectionLimit, Place


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Client:
    """A connection that is quiet since then, or busy."""

    def __init__(self, limit: ConnectionLimit, quiet_since: float | None) -> None:
        self.since = quiet_since
        self.is_open = True
        self._limit = limit
        limit.opened(self)

    def quiet_since(self) -> float | None:
        return self.since

    def drop(self) -> None:
        self.is_open = False
        self._limit.closed(self)  # as the transport does, a little later


def test_below_the_limit_nothing_is_closed() -> None:
    limit = ConnectionLimit(3, 2, now=Clock())
    clients = [Client(limit, 0.0) for _ in range(3)]
    assert all(client.is_open for client in clients)
    assert {limit.place_of(client) for client in clients} == {Place.ANY}


def test_at_the_limit_the_quietest_make_room() -> None:
    limit = ConnectionLimit(32, 2, now=Clock())
    clients = [Client(limit, float(number)) for number in range(32)]
    newest = Client(limit, None)
    assert [client.is_open for client in clients] == [False] * 3 + [True] * 29
    assert limit.place_of(newest) is Place.ANY
    assert len(limit) == 30


def test_a_busy_or_fresh_connection_is_never_closed_for_another() -> None:
    limit = ConnectionLimit(2, 0, now=Clock())
    busy, fresh = Client(limit, None), Client(limit, 99.5)
    late = Client(limit, None)
    assert (busy.is_open, fresh.is_open, late.is_open) == (True, True, False)
    assert len(limit) == 2


def test_spare_places_are_for_privileged_requests_and_the_last_for_health() -> None:
    limit = ConnectionLimit(2, 4, now=Clock())
    clients = [Client(limit, None) for _ in range(7)]
    assert [client.is_open for client in clients] == [True] * 6 + [False]
    ordinary, first, last = clients[0], clients[2], clients[5]
    assert limit.place_of(ordinary) is Place.ANY
    assert limit.place_of(last) is Place.HEALTH
    for client in clients[4:]:
        limit.closed(client)
    assert limit.place_of(first) is Place.PRIVILEGED
    limit.closed(ordinary)
    limit.closed(clients[1])
    assert limit.place_of(first) is Place.ANY
    assert limit.place_of(clients[3]) is Place.ANY


def test_a_full_reserve_gives_up_the_one_that_sends_nothing() -> None:
    limit = ConnectionLimit(1, 2, now=Clock())
    Client(limit, None)
    older, newer = Client(limit, 99.8), Client(limit, 99.9)
    latest = Client(limit, 100.0)
    assert (older.is_open, newer.is_open, latest.is_open) == (False, True, True)


def test_the_log_says_it_at_once_and_then_rarely_with_what_happened_since() -> None:
    clock = Clock()
    limit = ConnectionLimit(1, 0, now=clock)
    with structlog.testing.capture_logs() as lines:
        Client(limit, None)
        for _ in range(5):
            Client(limit, None)
        assert [(line["event"], line["refused"]) for line in lines] == [("connections_exhausted", 1)]
        clock.now += 11
        Client(limit, None)
        assert [(line["refused"], line["limit"]) for line in lines] == [(1, 1), (5, 1)]


def test_without_a_limit_there_is_room_for_all() -> None:
    limit = ConnectionLimit()
    clients = [Client(limit, 0.0) for _ in range(3000)]
    assert all(client.is_open for client in clients)
