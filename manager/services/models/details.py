"""Context lengths and capabilities of models, asked for where lists of models do not say them."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from manager.domain.instance import Health
from manager.errors import ManagerError
from manager.services.models.model_lists import volume_of
from manager.wire.details import lacks_details
from manager.wire.ollama import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.models.model_lists import ModelLists

# A model that a server would not describe is not asked about again before this.
_RETRY_S = 60.0
# Models beyond so many are listed without details.
_MOST_ASKED = 4096


class ModelDetails:
    """Owns the questions about models: each digest is asked about once, at one instance that runs.

    Of an instance one question is open at a time. Nothing is started. The answers are kept with the lists.
    `run` must go on while they are asked for.

    Args:
        fleet: the instances.
        lists: have the models of each volume, and take the answers.
        now: seconds on a monotonic clock.
    """

    def __init__(self, fleet: Fleet, lists: ModelLists, *, now: Callable[[], float]) -> None:
        self._fleet = fleet
        self._lists = lists
        self._now = now
        self._wanted = asyncio.Event()
        self._asking: set[str] = set()  # instances
        self._asked_at: dict[str, float] = {}  # by digest
        # The list of each volume in which nothing is missing that could be asked for.
        self._complete: dict[str, Mapping[str, Any]] = {}
        self._rest = asyncio.Event()

    async def look(self, *, within_s: float) -> None:
        """Have details that are missing asked for, and wait for the answers at most `within_s`."""
        self._forget_gone()
        if not self._asking and all(self._next(one) is None for one in self._fleet.instances()):
            return
        self._rest.clear()
        self._wanted.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._rest.wait()

    async def run(self) -> None:
        """Ask what is wanted, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                for instance in self._fleet.instances():
                    if instance.id not in self._asking and self._next(instance) is not None:
                        self._asking.add(instance.id)
                        tasks.create_task(self._ask_all(instance), name=f"details from {instance.id}")
                self._settle()

    # --- helpers ---

    async def _ask_all(self, instance: Instance) -> None:
        try:
            while (found := self._next(instance)) is not None:
                await self._ask(instance, *found)
        finally:
            self._asking.discard(instance.id)
            self._settle()

    async def _ask(self, instance: Instance, name: str, digest: str) -> None:
        self._asked_at[digest] = self._now()
        with suppress(ManagerError):  # it is asked again, later
            details = await instance.show(name)
            if details is not None:
                self._asked_at[digest] = math.inf
                self._lists.learn(digest, details)

    def _next(self, instance: Instance) -> tuple[str, str] | None:
        """Return name and digest of a model that an instance is to be asked about."""
        volume = volume_of(instance.spec)
        entries = self._lists.entries(volume)
        if self._complete.get(volume) is entries or instance.usable_endpoint() is None:
            return None
        if instance.health is Health.UNHEALTHY:
            return None
        since, waits = self._now() - _RETRY_S, False
        for entry in entries.values():
            digest = entry.get("digest")
            if not isinstance(digest, str) or not digest or not lacks_details(entry):
                continue
            at = self._asked_at.get(digest)
            if at is None:
                if len(self._asked_at) < _MOST_ASKED:
                    return name_of(entry), digest
            elif at < since:
                return name_of(entry), digest
            else:
                waits = waits or at < math.inf
        if not waits:
            self._complete[volume] = entries
        return None

    def _forget_gone(self) -> None:
        """Forget the models that no list names any more, once the bound is reached."""
        if len(self._asked_at) >= _MOST_ASKED:
            volumes = {volume_of(one.spec) for one in self._fleet.instances()}
            named = {entry.get("digest") for one in volumes for entry in self._lists.entries(one).values()}
            self._asked_at = {digest: at for digest, at in self._asked_at.items() if digest in named}

    def _settle(self) -> None:
        if not self._asking:
            self._rest.set()
