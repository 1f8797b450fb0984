"""Keys: lists, makes, rotates and revokes them. Secrets are in answers of the API, never in a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.api.keys import key_body
from manager.domain.keys import LIMIT_NAMES, KeyState, Scope
from manager.services.accounts.keyring import FILE_KEY
from manager.web.page import Page
from manager.web.state import BAD, OFF, OK, State
from manager.web.words import unix_s

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.domain.keys import Key
    from manager.services.accounts.keyring import Keyring
    from manager.web.viewer import Viewer

# Keys of one kind that are listed; the search finds the others.
MOST_LISTED = 100
_STATES = {
    KeyState.ACTIVE: State(OK, "key_active"),
    KeyState.EXPIRED: State(OFF, "key_expired"),
    KeyState.REVOKED: State(BAD, "key_revoked"),
}


async def _context(backend: Backend, viewer: Viewer, request: Request) -> Mapping[str, Any]:
    keyring = backend.keyring
    keys = keyring.all()
    search = request.query_params.get("search", "").strip()[:100]
    found = [key for key in keys if search.casefold() in f"{key.grant.name} {key.grant.project}".casefold()]
    managers = _managers(keyring, keys)
    has_file = keyring.grant(FILE_KEY) is not None
    shown = [_shown(backend, key, viewer, managers=managers, has_file=has_file) for key in found]
    active = [one for one in shown if one["is_active"]]
    ended = [one for one in shown if not one["is_active"]]
    return {
        "keys": active[:MOST_LISTED],
        "more": max(0, len(active) - MOST_LISTED),
        "ended": ended[:MOST_LISTED],
        "more_ended": max(0, len(ended) - MOST_LISTED),
        "count": len(keys),
        "search": search,
        "is_required": keyring.are_required,
        "has_admin": keyring.has_admin(),
        "has_file": has_file,
        "scopes": list(Scope),
        "roles": sorted(backend.model_settings.routing.roles),
        "instances": [one.id for one in backend.fleet.instances()],
    }


def _managers(keyring: Keyring, keys: list[Key]) -> frozenset[str]:
    """Return the names of the keys of the registry that can manage keys now."""
    return frozenset(
        key.grant.name
        for key in keys
        if Scope.ADMIN in key.grant.scopes and keyring.state(key) is KeyState.ACTIVE
    )


def _shown(
    backend: Backend, key: Key, viewer: Viewer, *, managers: frozenset[str], has_file: bool
) -> dict[str, Any]:
    """Return the values of the API with moments in Unix seconds, and what follows from ending the key."""
    body = key_body(backend, key)
    state = _STATES[body.state]
    return {
        **body.model_dump(include=set(_PLAIN)),
        "kind": state.kind,
        "word": state.word,
        "is_active": body.state is KeyState.ACTIVE,
        "is_mine": body.name == viewer.name,
        "is_last_manager": managers == {body.name} and not has_file,
        "prefixes": [
            {"prefix": one.prefix, "ends_at": unix_s(one.ends_at)} for one in reversed(body.secrets)
        ],
        **{name: unix_s(getattr(body, name)) for name in _MOMENTS},
    }


_PLAIN = (
    "name",
    "scopes",
    "project",
    *LIMIT_NAMES,
)
_MOMENTS = ("created_at", "expires_at", "revoked_at", "last_used_at")


KEYS = Page("keys", "/ui/keys", scope="admin", context=_context)
