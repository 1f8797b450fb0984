"""The claims of a daemon: its state directory, its manager id, and the containers that belong to it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from manager.adapters.locks import StateDirLock
from manager.adapters.owner import ManagerIdLock, keep_manager_id, take_over
from manager.domain.ownership import foreign, left_behind, owner_of
from manager.errors import EngineError, ForeignOwnerError, ManagerIdChangedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.adapters.docker_engine import DockerEngine
    from manager.domain.instance import ContainerFacts
    from manager.domain.ownership import Owner
    from manager.settings import Settings

_log = structlog.get_logger("daemon")

# How long a start waits for the engine in order to see whose the containers are.
_OWNER_CHECK_S = 2.0


def id_lock_of(settings: Settings) -> ManagerIdLock:
    """Return the claim to the manager id; daemons that share a database share the id."""
    directory = None if settings.state.url is None else settings.state.dir
    return ManagerIdLock(settings.manager_id, settings.engine.url, directory)


@contextlib.contextmanager
def claims(settings: Settings, *, within_s: float) -> Iterator[tuple[StateDirLock, ManagerIdLock]]:
    """Hold the state directory, and the manager id on the engine.

    Raises:
        StateDirHeldError, ManagerIdHeldError: another daemon holds one of them.
    """
    with contextlib.ExitStack() as stack:
        state_lock = StateDirLock(settings.state.dir, settings.manager_id)
        state_lock.acquire(within_s=within_s)
        stack.callback(state_lock.release)
        id_lock = id_lock_of(settings)
        id_lock.acquire()
        stack.callback(id_lock.release)
        yield state_lock, id_lock


async def settled_owner(engine: DockerEngine, settings: Settings, owner: Owner, *, takes_over: bool) -> Owner:
    """Return the owner, once no container of the manager id belongs to another one, and none is left behind.

    An engine that is away is no obstacle: containers of another owner are never adopted. The former manager
    id is kept until the engine was asked for its containers.
    """
    try:
        async with asyncio.timeout(settings.engine.timeout_s if takes_over else _OWNER_CHECK_S):
            listed = await engine.list_containers(settings.manager_id)
            await _refuse_left_behind(engine, settings, owner)
    except (TimeoutError, EngineError):
        if takes_over:
            raise
        return owner
    if not takes_over:
        _refuse_foreign(settings, owner, listed)
    owner = keep_manager_id(settings.state.dir, owner, settings.manager_id)
    if not takes_over:
        return owner
    ids = frozenset(filter(None, map(owner_of, foreign(owner, listed))))
    _log.warning("taken_over", owners=sorted(ids))
    return take_over(settings.state.dir, owner, ids) if ids else owner


async def refuse_foreign_later(engine: DockerEngine, settings: Settings, owner: Owner) -> None:
    """Look at the owners once the engine answers: it may have been away when the daemon started."""
    while True:
        await asyncio.sleep(settings.lifecycle.probe_interval_s)
        with contextlib.suppress(EngineError):
            _refuse_foreign(settings, owner, await engine.list_containers(settings.manager_id))
            await _refuse_left_behind(engine, settings, owner)
            await asyncio.to_thread(keep_manager_id, settings.state.dir, owner, settings.manager_id)
            return


def _refuse_foreign(settings: Settings, owner: Owner, listed: tuple[ContainerFacts, ...]) -> None:
    strangers = foreign(owner, listed)
    if strangers:
        raise ForeignOwnerError(
            f"containers with manager_id {settings.manager_id!r} belong to another state directory than "
            f"{settings.state.dir}: {', '.join(facts.name for facts in strangers)}"
        )


async def _refuse_left_behind(engine: DockerEngine, settings: Settings, owner: Owner) -> None:
    former = owner.manager_id
    if former is None or former == settings.manager_id:
        return
    wrong = left_behind(owner, settings.manager_id, await engine.list_containers(former))
    if wrong is not None:
        message, remedy = wrong
        raise ManagerIdChangedError(message, details={"remedy": remedy})
