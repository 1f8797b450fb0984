"""What a key may do, and when its secrets end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from manager.domain.keys import INCLUDED, Grant, Key, KeyState, Scope, Secret

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def a_grant(*scopes: Scope, expires_at: datetime | None = None) -> Grant:
    return Grant("a", frozenset(scopes), NOW, expires_at=expires_at)


def a_key(*ends: datetime | None, expires_at: datetime | None = None) -> Key:
    secrets = tuple(Secret(bytes([place]), f"om_{place}", NOW, end) for place, end in enumerate(ends))
    return Key(a_grant(Scope.CLIENT, expires_at=expires_at), secrets)


@pytest.mark.parametrize(
    ("scope", "included"),
    [
        (Scope.CLIENT, {Scope.CLIENT}),
        (Scope.READ, {Scope.READ}),
        (Scope.OPERATOR, {Scope.OPERATOR, Scope.READ}),
        (Scope.ADMIN, set(Scope)),
    ],
)
def test_operators_may_read_admins_may_everything_and_the_others_what_they_say(
    scope: Scope, included: set[Scope]
) -> None:
    assert {one for one in Scope if a_grant(scope).may(one)} == included
    assert set(INCLUDED) == set(Scope)


def test_a_key_with_several_scopes_has_all_of_them() -> None:
    grant = a_grant(Scope.CLIENT, Scope.READ)
    assert [one for one in Scope if grant.may(one)] == [Scope.CLIENT, Scope.READ]


def test_a_key_ends_when_it_expires_and_opens_nothing_then() -> None:
    key = a_key(None, expires_at=NOW + HOUR)
    assert (key.state(NOW), key.digests(NOW)) == (KeyState.ACTIVE, (b"\x00",))
    assert (key.state(NOW + HOUR), key.digests(NOW + HOUR)) == (KeyState.EXPIRED, ())
    assert (key.next_end(NOW), key.next_end(NOW + HOUR)) == (NOW + HOUR, None)


def test_a_secret_ends_with_its_overlap_and_the_others_stay() -> None:
    key = a_key(NOW + HOUR, NOW + 2 * HOUR, None)
    assert key.digests(NOW) == (b"\x00", b"\x01", b"\x02")
    assert key.digests(NOW + HOUR) == (b"\x01", b"\x02")
    assert key.next_end(NOW + HOUR) == NOW + 2 * HOUR
    assert key.digests(NOW + 2 * HOUR) == (b"\x02",)
    assert a_key(None).next_end(NOW) is None


def test_a_rotation_ends_the_earlier_secrets_after_the_overlap_and_none_later_than_before() -> None:
    key = a_key(NOW - HOUR, NOW + HOUR, NOW + 9 * HOUR, None)
    new = Secret(b"new", "om_new", NOW)
    rotated = key.rotated(new, NOW, NOW + 2 * HOUR)
    assert [one.ends_at for one in rotated.secrets] == [NOW + HOUR, NOW + 2 * HOUR, NOW + 2 * HOUR, None]
    assert rotated.secrets[-1] is new
    assert key.rotated(new, NOW, NOW).secrets == (new,)


def test_a_revoked_key_has_no_secret_and_keeps_the_time_of_its_first_revocation() -> None:
    revoked = a_key(None).revoked(NOW)
    assert (revoked.state(NOW), revoked.secrets, revoked.digests(NOW)) == (KeyState.REVOKED, (), ())
    assert revoked.revoked(NOW + HOUR).revoked_at == NOW
    assert revoked.next_end(NOW) is None
