"""`/api/v1/keys`: makes, lists, rotates and revokes keys."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.granted import CUT
from manager.api.schemas import Time  # noqa: TC001  (pydantic reads annotations at run time)
from manager.domain.keys import Grant, Key, KeyState, Permit, Scope
from manager.domain.money import in_usd, micro_usd
from manager.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from manager.api.backend import Backend
    from manager.services.accounts.keyring import MadeKey

PATH = "/api/v1/keys"
_DAY_S = 86_400
_YEAR_S = 366 * _DAY_S
# The answer has a secret: nothing on the way may keep it.
_NO_STORE = {"Cache-Control": "no-store"}


def _once(values: list[str] | None) -> list[str] | None:
    if values is not None and len(set(values)) < len(values):
        raise ValueError("expected each entry once")
    return values


def _whole_micro_usd(usd: float | None) -> float | None:
    if usd is not None and in_usd(micro_usd(usd)) != usd:
        raise ValueError("expected at most six decimals")
    return usd


_Text = Annotated[str, Field(min_length=1, max_length=256)]
_Names = Annotated[
    list[_Text],
    Field(min_length=1, max_length=100, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_once),
]
_Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyRequest(_Body):
    """A new key. What is left out or null is not limited.

    `roles` are names of roles, `models` patterns such as `qwen3:*`, `instances` ids. `expires_s` is the life
    of the key in seconds.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4)]
    project: Annotated[str, Field(pattern=r"^[!-~](?:[ -~]{0,254}[!-~])?$")] | None = None
    roles: _Names | None = None
    models: _Names | None = None
    instances: _Names | None = None
    concurrency: _Count | None = None
    rpm: _Count | None = None
    tokens_per_day: Annotated[int, Field(strict=True, ge=1, le=10**15)] | None = None
    usd_per_month: (
        Annotated[
            float, Field(strict=True, ge=0, le=10**9, allow_inf_nan=False), AfterValidator(_whole_micro_usd)
        ]
        | None
    ) = None
    local_only: StrictBool = False
    expires_s: Annotated[float, Field(strict=True, ge=1, le=100 * _YEAR_S)] | None = None


class RotateRequest(_Body):
    """`overlap_s`: how long the earlier secret is in force beside the new one."""

    overlap_s: Annotated[float, Field(strict=True, ge=0, le=_YEAR_S)] = _DAY_S


class SecretBody(_Body):
    """One secret of a key, by its first characters; `ends_at` is null for the newest one."""

    prefix: str
    created_at: Time
    ends_at: Time | None


class KeyBody(_Body):
    """One key. `last_used_at` is a minute late at most after a restart, half a second otherwise."""

    name: str
    state: KeyState
    scopes: list[Scope]
    project: str | None
    roles: list[str] | None
    models: list[str] | None
    instances: list[str] | None
    concurrency: int | None
    rpm: int | None
    tokens_per_day: int | None
    usd_per_month: float | None
    local_only: bool
    created_at: Time
    expires_at: Time | None
    revoked_at: Time | None
    last_used_at: Time | None
    secrets: list[SecretBody]


class MadeKeyBody(KeyBody):
    """A key with its new secret, which is shown this once."""

    secret: str


class KeysBody(_Body):
    """The keys of the registry, by name; those of `server.key_file` are not among them.

    `required` is whether a request needs a key.
    """

    keys: list[KeyBody]
    count: int
    required: bool


class RevokedKeyBody(_Body):
    """A key that opens nothing any more.

    `cut` is how many open requests were ended. `required` is whether a request needs a key, `admin_left`
    whether one is in force that can manage keys.
    """

    key: KeyBody
    cut: int
    required: bool
    admin_left: bool


class RevokeQuery(BaseModel):
    """`cut`: end the open requests of the key too. `forget`: remove its name from the registry."""

    model_config = ConfigDict(extra="forbid")

    cut: bool = False
    forget: bool = False


def keys_router(backend: Backend, cut_streams: Callable[[str], int]) -> APIRouter:
    """Return the routes.

    Args:
        backend: the running daemon.
        cut_streams: ends the open requests of a key to the control API; returns how many.
    """
    router = APIRouter(prefix=PATH, tags=["keys"])
    keyring = backend.keyring

    @router.post("", status_code=201, response_model=MadeKeyBody, responses=refusals(409, 503))
    async def create_key(wanted: KeyRequest, _query: Annotated[NoQuery, Query()]) -> Response:
        """Make a key. Its secret is in this answer and nowhere else: what is stored is a hash."""
        _refuse_unknown(backend, wanted)
        return _made(backend, await keyring.create(_grant(backend, wanted)), 201)

    @router.get("", response_model=KeysBody, responses=refusals())
    async def list_keys(_query: Annotated[NoQuery, Query()]) -> Response:
        """All keys by name, those that have ended too."""
        found = [key_body(backend, key) for key in keyring.all()]
        return _json(KeysBody(keys=found, count=len(found), required=keyring.are_required))

    @router.post("/{name}/rotate", response_model=MadeKeyBody, responses=refusals(404, 409, 503))
    async def rotate_key(name: str, wanted: RotateRequest, _query: Annotated[NoQuery, Query()]) -> Response:
        """Make a new secret for a key; the earlier one ends after the overlap."""
        return _made(backend, await keyring.rotate(name, wanted.overlap_s), 200)

    @router.delete("/{name}", response_model=RevokedKeyBody, responses=refusals(404, 503))
    async def revoke_key(name: str, query: Annotated[RevokeQuery, Query()]) -> Response:
        """Revoke a key at once. Its open requests go on, unless `cut` ends them."""
        key = await keyring.revoke(name, forgets=query.forget)
        count = 0
        if query.cut:
            count = cut_streams(name) + await backend.passing.passages.open_requests.cut(name, CUT)
        return _json(
            RevokedKeyBody(
                key=key_body(backend, key),
                cut=count,
                required=keyring.are_required,
                admin_left=keyring.has_admin(),
            )
        )

    return router


def _refuse_unknown(backend: Backend, wanted: KeyRequest) -> None:
    roles = backend.model_settings.routing.roles
    instances = [instance.id for instance in backend.fleet.instances()]
    problems = [
        *_unknown("roles", wanted.roles, roles),
        *_unknown("instances", wanted.instances, instances),
    ]
    if problems:
        message = "; ".join(f"{one['field']}: {one['message']}" for one in problems)
        raise InvalidRequestError(message, details={"fields": problems})


def _unknown(field: str, names: list[str] | None, known: Collection[str]) -> list[dict[str, str]]:
    allowed = ", ".join(known) or "none"
    return [
        {"field": f"body.{field}.{place}", "message": f"{name!r}; allowed: {allowed}"}
        for place, name in enumerate(names or ())
        if name not in known
    ]


def _grant(backend: Backend, wanted: KeyRequest) -> Grant:
    now = backend.keyring.now()
    usd = wanted.usd_per_month
    permit = Permit(
        wanted.name,
        roles=None if wanted.roles is None else frozenset(wanted.roles),
        models=None if wanted.models is None else tuple(wanted.models),
        instances=None if wanted.instances is None else frozenset(wanted.instances),
    )
    return Grant(
        name=wanted.name,
        scopes=frozenset(wanted.scopes),
        created_at=now,
        permit=None if permit == Permit(wanted.name) else permit,
        project=wanted.project,
        concurrency=wanted.concurrency,
        rpm=wanted.rpm,
        tokens_per_day=wanted.tokens_per_day,
        micro_usd_per_month=None if usd is None else micro_usd(usd),
        expires_at=None if wanted.expires_s is None else now + timedelta(seconds=wanted.expires_s),
        is_local=wanted.local_only,
    )


def key_body(backend: Backend, key: Key) -> KeyBody:
    """Return a key as the API describes it."""
    grant = key.grant
    permit = grant.permit or Permit(grant.name)
    micro = grant.micro_usd_per_month
    return KeyBody(
        name=grant.name,
        state=backend.keyring.state(key),
        scopes=sorted(grant.scopes),
        project=grant.project,
        roles=None if permit.roles is None else sorted(permit.roles),
        models=None if permit.models is None else list(permit.models),
        instances=None if permit.instances is None else sorted(permit.instances),
        concurrency=grant.concurrency,
        rpm=grant.rpm,
        tokens_per_day=grant.tokens_per_day,
        usd_per_month=None if micro is None else in_usd(micro),
        local_only=grant.is_local,
        created_at=grant.created_at,
        expires_at=grant.expires_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
        secrets=[
            SecretBody(prefix=one.prefix, created_at=one.created_at, ends_at=one.ends_at)
            for one in key.secrets
        ],
    )


def _made(backend: Backend, made: MadeKey, status: int) -> Response:
    body = MadeKeyBody(**key_body(backend, made.key).model_dump(), secret=made.secret)
    return _json(body, status=status, headers=_NO_STORE)


def _json(body: BaseModel, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(), status, headers, "application/json")
