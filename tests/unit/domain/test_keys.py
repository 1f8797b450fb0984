"""What a key may do."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from manager.domain.keys import Grant, Scope

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("scope", Scope)
def test_an_admin_key_has_every_scope_and_any_other_key_its_own(scope: Scope) -> None:
    assert Grant("a", frozenset({Scope.ADMIN}), NOW).may(scope)
    client = Grant("c", frozenset({Scope.CLIENT}), NOW)
    assert client.may(scope) is (scope is Scope.CLIENT)
