"""Async runs with their results, and the schedules."""

from __future__ import annotations

import json
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, cast, get_args

from manager.api.runs import RunRequest, owner_of
from manager.api.schedules import schedules
from manager.domain.runs import OPEN, WITH_RESULT, RunStatus
from manager.errors import ManagerError
from manager.web.page import Page
from manager.web.state import BAD, OFF, OK, WARN, WORK
from manager.web.words import unix_s

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.domain.runs import Run
    from manager.web.viewer import Viewer

MOST_LISTED = 100
# Of a result; the API has all of it.
MOST_SHOWN_BYTES = 64 * 1024
_LONGEST_ID = 100
_KINDS = {
    RunStatus.QUEUED: OFF,
    RunStatus.RUNNING: WORK,
    RunStatus.SUCCEEDED: OK,
    RunStatus.FAILED: BAD,
    RunStatus.CANCELLED: OFF,
    RunStatus.INTERRUPTED: WARN,
    RunStatus.EXPIRED: OFF,
}
_PATHS: tuple[str, ...] = get_args(RunRequest.model_fields["path"].annotation)
_MESSAGES = {"model": "MODEL", "messages": [{"role": "user", "content": "Hello"}]}
_PROMPT = {"model": "MODEL", "prompt": "Hello"}
_INPUT = {"model": "MODEL", "input": "Hello"}
_EXAMPLES = {
    "/api/generate": _PROMPT,
    "/api/chat": _MESSAGES,
    "/api/embeddings": _PROMPT,
    "/v1/chat/completions": _MESSAGES,
    "/v1/completions": _PROMPT,
    "/v1/messages": {**_MESSAGES, "max_tokens": 256},
}


async def _context(backend: Backend, viewer: Viewer, request: Request) -> Mapping[str, Any]:
    # A key without either scope has no runs; `GET /api/v1/runs` refuses it.
    may_see = viewer.may("client") or viewer.may("operator")
    run_id = request.query_params.get("id", "").strip()[:_LONGEST_ID]
    if run_id and may_see:
        return {"view": "one", "id": run_id, **await _one(backend, request, run_id)}
    wanted = request.query_params.get("status", "")
    status = RunStatus(wanted) if wanted in set(RunStatus) else None
    runs = await backend.runs.newest(status, MOST_LISTED, owner_of(request)) if may_see else ()
    return {
        "view": "list",
        "may_see": may_see,
        "status": status,
        "statuses": list(RunStatus),
        "runs": [_run(run) for run in runs],
        "most": MOST_LISTED,
        "paths": {
            path: json.dumps(_EXAMPLES.get(path, _INPUT), indent=2, ensure_ascii=False) for path in _PATHS
        },
        "roles": [role.name for role in backend.model_settings.routing.roles.values()],
        "schedules": [_schedule(one) for one in await schedules(backend)] if viewer.may("read") else None,
    }


async def _one(backend: Backend, request: Request, run_id: str) -> dict[str, Any]:
    owner = owner_of(request)
    try:
        run = await backend.runs.find(run_id, owner)
    except ManagerError as error:
        return {"run": None, "missing": error.message}
    found = {"run": _run(run), "body_bytes": run.body_bytes, "executions": run.executions}
    if run.status not in WITH_RESULT or run.result is None:
        return {**found, "result": None, "missing": None}
    try:
        text, is_whole = await _result(backend, run)
    except ManagerError as error:  # it has expired meanwhile
        return {**found, "result": None, "missing": error.message}
    return {**found, "result": {"text": text, "is_whole": is_whole}, "missing": None}


async def _result(backend: Backend, run: Run) -> tuple[str, bool]:
    """Return the beginning of an answer as text, and whether that is all of it."""
    found = bytearray()
    _, pieces = await backend.runs.result(run.id)
    async with aclosing(cast("AsyncGenerator[bytes, None]", pieces)):
        async for piece in pieces:
            found += piece
            if len(found) > MOST_SHOWN_BYTES:
                break
    is_whole = len(found) <= MOST_SHOWN_BYTES
    text = bytes(found[:MOST_SHOWN_BYTES]).decode("utf-8", "replace")
    if is_whole:
        with suppress(ValueError, RecursionError):  # several documents, or none
            text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return text, is_whole


def _run(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "status": run.status.value,
        "kind": _KINDS[run.status],
        "is_open": run.status in OPEN,
        "path": run.path,
        "model": run.model,
        "lane": run.lane,
        "project": run.caller.project,
        "key": run.caller.key,
        "idempotent": run.idempotent,
        "instance": run.instance,
        "request_id": run.request_id,
        "created_at": run.created_at.timestamp(),
        "started_at": unix_s(run.started_at),
        "took_s": (run.ended_at - run.started_at).total_seconds()
        if run.ended_at and run.started_at
        else None,
        "expires_at": unix_s(run.expires_at) if run.status in WITH_RESULT else None,
        "error": run.error,
        "result": run.result,
    }


def _schedule(one: Mapping[str, Any]) -> dict[str, Any]:
    last = one["last"]
    return {
        **one,
        "next": [f"{at:%a} {at.day} {at:%b %H:%M}" for at in one["next"]],
        "last": last and {"at": last["at"].timestamp(), "detail": last["detail"]},
    }


RUNS = Page("runs", "/ui/runs", scope=None, context=_context)
