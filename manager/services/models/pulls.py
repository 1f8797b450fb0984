"""Downloads of models: one at a time for each volume and model, whoever asks and however many do."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import count
from typing import TYPE_CHECKING

import orjson
import structlog

from manager.domain.models import model_key
from manager.errors import ManagerError, UnknownPullError
from manager.services.models.pull import Pull, PullFailedError, PullView, Waiter
from manager.services.ports import Question
from manager.wire.dialect import message_of
from manager.wire.management import read_named
from manager.wire.progress import (
    Lines,
    LineTooLongError,
    progress,
    read_progress,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.services.models.volumes import Volumes
    from manager.services.ports import ModelServer, ServerAnswer
    from manager.wire.management import ManagementBody

_log = structlog.get_logger("pulls")

_HEADERS = ((b"content-type", b"application/json"),)
# So many lines are read before the event loop gets a turn: about a millisecond.
_LINES_A_TURN = 64
# A model that cannot be had is not asked for again at once, however many requests name it.
_GIVEN_UP_FOR_S = 10.0
_MOST_GIVEN_UP = 1024
_MOST_REFUSAL_BYTES = 64 * 1024
# Pulls that have ended stay listed: so many, the oldest go first; those that went well for a while.
_MOST_ENDED = 8
_DONE_S = 60.0
_OK = 200
# What Ollama says where the registry has no such model (`server/images.go` pullModelManifest): pulling it to
# another volume is of no use either.
_NOT_IN_REGISTRY = "pull model manifest: file does not exist"
# Lines of Ollama that come once all layers are here and before the name means the new ones.
_BEFORE_REPLACING = ("verifying sha256 digest", "writing manifest")


class Pulls:
    """Implements `services.routing.placement.ModelPuller`. `run` must go on while pulls are asked for.

    Args:
        volumes: which instance writes, and when it is its turn.
        server: sends the requests.
        now: seconds on a monotonic clock.
    """

    def __init__(self, volumes: Volumes, server: ModelServer, *, now: Callable[[], float]) -> None:
        self._volumes = volumes
        self._server = server
        self._now = now
        self._pulls: dict[tuple[str, str, bytes], Pull] = {}
        self._tasks: dict[Pull, asyncio.Task[None]] = {}
        self._begun: asyncio.Queue[Pull] = asyncio.Queue()
        self._numbers = count(1)
        self._ended: deque[Pull] = deque(maxlen=_MOST_ENDED)
        # (volume, model) -> when and why; None is every volume.
        self._given_up: dict[tuple[str | None, str], tuple[float, str]] = {}

    async def run(self) -> None:
        """Do what is asked for, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                pull = await self._begun.get()
                if pull.is_wanted:
                    self._tasks[pull] = tasks.create_task(self._work(pull), name=f"pull {pull.body.model}")
                else:
                    self._forget(pull)

    @property
    def busy(self) -> bool:
        """Whether a pull goes on, or waits for its turn."""
        return bool(self._pulls)

    def join(self, volume: str, body: ManagementBody) -> Waiter:
        """Wait for a pull to a volume, the one that is under way or a new one. To be entered at once."""
        return Waiter(self._joined(volume, body), self._has_left)

    def begin(self, volume: str, body: ManagementBody) -> PullView:
        """Have a pull to a volume that goes on without clients: the one that is under way, or a new one."""
        pull = self._joined(volume, body)
        pull.is_kept = True
        return pull.view(self._now())

    def views(self) -> tuple[PullView, ...]:
        """Return the pulls under way, then the last ones that ended, newest first."""
        now = self._now()
        ended = [
            pull
            for pull in reversed(self._ended)
            if pull.is_cancelled or pull.error is not None or now - pull.ended_at < _DONE_S
        ]
        return tuple([pull.view(now) for pull in (*self._pulls.values(), *ended)])

    def cancel(self, number: int) -> PullView:
        """Cancel a pull, whoever waits for it. One that has ended is listed no longer.

        Raises:
            UnknownPullError: there is none of that number.
        """
        pull = next((one for one in self._pulls.values() if one.number == number), None)
        if pull is not None:
            self._give_up(pull)
            error = PullFailedError(f"the pull of {pull.body.model!r} was cancelled by an operator")
            pull.end(error, self._now())
            return pull.view(self._now())
        ended = next((one for one in self._ended if one.number == number), None)
        if ended is None:
            raise UnknownPullError(f"there is no pull {number}")
        self._ended.remove(ended)
        return ended.view(self._now())

    async def pull(self, instance: str, model: str, tell: Callable[[str], None]) -> None:
        """Have the model on the instance's volume.

        Args:
            instance: one of those that mount it.
            model: its name.
            tell: takes what goes on, in words.

        Raises:
            ManagerError: it cannot be had.
        """
        self.refuse_given_up(instance, model)
        volume = self._volumes.of(instance)
        try:
            with self.join(volume, read_named(orjson.dumps({"model": model}))) as waiter:
                async for line in waiter:
                    tell(read_progress(line).in_words())
        except PullFailedError as error:
            if len(self._given_up) >= _MOST_GIVEN_UP:
                self._given_up.clear()
            place = None if _NOT_IN_REGISTRY in error.message else volume
            self._given_up[place, model_key(model)] = (self._now(), error.message)
            raise

    def refuse_given_up(self, instance: str, model: str) -> None:
        """Refuse a model that could not be pulled a moment ago.

        Raises:
            PullFailedError: with the error of that pull.
        """
        for place in (self._volumes.of(instance), None):
            at, why = self._given_up.get((place, model_key(model)), (float("-inf"), ""))
            if self._now() - at < _GIVEN_UP_FOR_S:
                raise PullFailedError(why, instance=instance)

    # --- one pull ---

    async def _work(self, pull: Pull) -> None:
        error: ManagerError | None = PullFailedError(f"the pull of {pull.body.model!r} was given up")
        try:
            await self._do(pull)
            error = None
        except ManagerError as failed:
            error = failed
        except Exception as defect:  # noqa: BLE001  (those who wait get an answer, the others go on)
            _log.error("pull_failed", model=pull.body.model, exc_info=defect)
            error = PullFailedError("the manager failed; its log says more")
        finally:
            if self._forget(pull):
                self._ended.append(pull)
            pull.end(error, self._now())

    async def _do(self, pull: Pull) -> None:
        doing = self._volumes.doing(pull.volume)
        if doing is not None:
            waiting = f"waiting for {doing}"
            pull.status = waiting
            pull.tell(progress(waiting), (waiting, None))
        async with self._volumes.alone(pull.volume, f"the pull of {pull.body.model}"):
            prepared = await self._volumes.writer(pull.volume)
            with prepared.lease as lease:
                pull.prepared, pull.instance = prepared, lease.instance
                raw = pull.body.raw(stream=True)
                headers = (*_HEADERS, *lease.target.headers)
                question = Question(lease.instance, lease.endpoint, "POST", "/api/pull", headers, raw)
                async with self._server.ask(question) as answer:
                    if answer.status != _OK:
                        raise await _refusal(answer, lease.instance)
                    await self._pass_on(pull, answer, lease.instance)

    async def _pass_on(self, pull: Pull, answer: ServerAnswer, instance: str) -> None:
        lines, more, succeeded, turn = Lines(), True, False, 0
        is_new = False
        while more:
            piece = await answer.piece()
            more = bool(piece)
            try:
                found = lines.feed(piece) if more else lines.end()
            except LineTooLongError as error:
                raise PullFailedError("the server's progress has no lines", instance=instance) from error
            for line in found:
                step = read_progress(line)
                if step.error is not None:
                    raise PullFailedError(step.error, instance=instance)
                is_new = is_new or step.is_download
                if is_new and step.status in _BEFORE_REPLACING:
                    is_new = False
                    await self._volumes.unload_elsewhere(pull.volume, pull.body.model, except_on=instance)
                if step.is_success:
                    # A client that reads this line may use the model at once.
                    await self._volumes.changed(instance)
                    succeeded = True
                pull.see(step, self._now())
                pull.tell(line, step.subject)
                turn += 1
                if turn % _LINES_A_TURN == 0:
                    await asyncio.sleep(0)
        if not succeeded:
            raise PullFailedError("the server ended the pull before its end", instance=instance)

    # --- who waits ---

    def _joined(self, volume: str, body: ManagementBody) -> Pull:
        key = _key(volume, body)
        pull = self._pulls.get(key)
        if pull is None:
            self._drop_ended(key)
            pull = self._pulls[key] = Pull(volume, body, next(self._numbers))
            self._begun.put_nowait(pull)
        return pull

    def _drop_ended(self, key: tuple[str, str, bytes]) -> None:
        """Forget how earlier pulls of the same ended."""
        for one in [one for one in self._ended if _key(one.volume, one.body) == key]:
            self._ended.remove(one)

    def _has_left(self, pull: Pull) -> None:
        if not pull.is_wanted and pull in self._tasks:
            self._give_up(pull)

    def _give_up(self, pull: Pull) -> None:
        """Cancel a pull that goes on; one that waits to be begun never is."""
        pull.is_cancelled, pull.is_kept = True, False
        task = self._tasks.get(pull)
        if self._forget(pull):  # a client that asks from now on gets a new one
            self._ended.append(pull)
        if task is not None:
            task.cancel()

    def _forget(self, pull: Pull) -> bool:
        """Forget a pull; return whether it was under way."""
        self._tasks.pop(pull, None)
        key = _key(pull.volume, pull.body)
        if self._pulls.get(key) is not pull:
            return False
        del self._pulls[key]
        return True


async def _refusal(answer: ServerAnswer, instance: str) -> PullFailedError:
    parts = bytearray()
    while len(parts) < _MOST_REFUSAL_BYTES and (piece := await answer.piece()):
        parts += piece
    message = message_of(bytes(parts)) or f"{instance} answered with status {answer.status}"
    return PullFailedError(message, instance=instance, status=answer.status)


def _key(volume: str, body: ManagementBody) -> tuple[str, str, bytes]:
    return volume, model_key(body.model), body.rest()
