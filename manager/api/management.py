"""The routes that change and describe models, passed on to the one instance that writes to their volume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from manager.api.answers import PLAIN_JSON
from manager.api.granted import permit_of
from manager.api.passage import NDJSON
from manager.api.refusal import RefusedError
from manager.domain.models import DEFAULT_TAG
from manager.domain.target import Protocol
from manager.domain.wording import model_not_found
from manager.services.instances.first_look import MAX_STARTUP_WAIT_S
from manager.services.models.pull import PullFailedError
from manager.services.models.volumes import NoSuchModelError
from manager.services.routing.attempting import Trouble
from manager.services.steps import in_steps
from manager.wire.listing import Alias, show_document
from manager.wire.management import reading_copy, reading_named
from manager.wire.ollama_routes import ACCOUNT, BLOB_PREFIX, USER_KEY_PREFIX
from manager.wire.progress import SuccessWatch
from manager.wire.statuses import BAD_REQUEST

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.types import Receive, Scope, Send

    from manager.api.backend import Passing
    from manager.api.passage import Passage
    from manager.domain.keys import Permit
    from manager.domain.routing import Attempt
    from manager.services.models.pull import Waiter
    from manager.services.routing.attempting import Step
    from manager.wire.management import ManagementBody

    Work = Callable[[Passage], Awaitable[None]]

_LINES = ((b"Content-Type", NDJSON),)
_DOCUMENT = ((b"Content-Type", PLAIN_JSON),)
_OK = 200
_FORBIDDEN = 403
_NOT_FOUND = 404
_SUCCESS = orjson.dumps({"status": "success"})


class Management:
    """Serves requests that manage models. See `work_for` for which."""

    def __init__(self, passing: Passing) -> None:
        self._passing = passing
        self._volumes = passing.volumes
        self._server = passing.server
        self._work: dict[str, Work] = {
            "/api/show": self._show,
            "/api/pull": self._pull,
            "/api/push": self._push,
            "/api/create": self._create,
            "/api/copy": self._copy,
            "/api/delete": self._delete,
            **dict.fromkeys(ACCOUNT, self._account),
        }
        # Routes below a prefix: what follows it is nothing to count requests by.
        self._below: dict[str, Work] = {BLOB_PREFIX: self._blob, USER_KEY_PREFIX: self._account}

    def serves(self, path: str) -> bool:
        return path in self._work or path.startswith(tuple(self._below))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        prefix = next((prefix for prefix in self._below if path.startswith(prefix)), None)
        route = path if prefix is None else prefix.rstrip("/")
        work = self._work[path] if prefix is None else self._below[prefix]
        passage = self._passing.passage(scope, receive, send, route, None)
        await self._passing.routing.router.known(within_s=MAX_STARTUP_WAIT_S)
        await self._passing.passages.run(passage, work)

    # --- what only looks ---

    async def _show(self, passage: Passage) -> None:
        body = await self._named(passage)
        pin, permit = body.instance or passage.instance, permit_of(passage.scope)
        if permit is None:
            model = self._meant(body)
        else:
            model, pin = await self._permitted(body.model, pin, permit)
        volume = await self._volumes.find(model, pin)
        attempts = self._volumes.readers(volume, model)
        if permit is not None:
            attempts = tuple(one for one in attempts if not permit.limit_of_instance(one.instance))
        target = await passage.target(self._enter(passage, volume, attempts))
        if target.protocol is not Protocol.OLLAMA:
            await self._show_known(passage, model)
            return
        raw = body.raw(model=model)
        await passage.pass_on(self._server, target, lambda target: passage.question(target, raw))

    async def _show_known(self, passage: Passage, model: str) -> None:
        """Answer with what is known of a model of a server that is no Ollama, and has no call for this."""
        found = self._passing.catalogue.find(model)
        known = found.of if isinstance(found, Alias) else found
        content = orjson.dumps(show_document(None if known is None else known.entry))
        passage.attempting.delivered()
        await passage.start(_OK, _DOCUMENT, len(content))
        await passage.send(content)
        await passage.end()

    async def _push(self, passage: Passage) -> None:
        body = await self._named(passage)
        volume = await self._volumes.find(body.model, body.instance or passage.instance)
        step = self._enter(passage, volume, self._volumes.writers(volume, body.model))
        await passage.pass_on(self._server, step, lambda target: passage.question(target, body.raw()))

    async def _account(self, passage: Passage) -> None:
        """Requests about the account of ollama.com: the key pair that signs them is on the volume."""
        body = await passage.body()
        volume = self._volumes.default(passage.instance)
        step = self._enter(passage, volume, self._volumes.readers(volume))
        await passage.pass_on(self._server, step, lambda target: passage.question(target, body))

    # --- what changes a volume, one after the other ---

    async def _create(self, passage: Passage) -> None:
        body = await self._named(passage)
        self._refuse_role(body.model)
        volume = self._place_of_new(body, body.instance or passage.instance)
        async with self._volumes.alone(volume, f"the creation of {body.model}"):
            step = self._enter(passage, volume, self._volumes.writers(volume, body.model))
            target = await passage.target(step)
            await self._volumes.unload_elsewhere(volume, body.model, except_on=target.instance)
            watch = SuccessWatch()

            async def before(piece: bytes) -> None:
                if watch.feed(piece):  # a client that reads this may use the model at once
                    await self._volumes.changed(passage.attempting.work.instance)

            step = target

            await passage.pass_on(
                self._server, step, lambda target: passage.question(target, body.raw()), before=before
            )

    async def _copy(self, passage: Passage) -> None:
        body = await in_steps(reading_copy(await passage.parts()))
        passage.record.model = body.model
        destination = body.text("destination")
        self._refuse_role(destination)
        try:
            await self._change(passage, body, f"the copy of {body.model}", replaces=destination)
        except NoSuchModelError as error:
            # Ollama's text for this route alone.
            raise NoSuchModelError(f'model "{body.model}" not found', error.not_asked) from error

    async def _delete(self, passage: Passage) -> None:
        body = await self._named(passage)
        await self._change(passage, body, f"the deletion of {body.model}", replaces=body.model)

    async def _change(self, passage: Passage, body: ManagementBody, what: str, *, replaces: str) -> None:
        """A change of one model; `replaces` names the model that is another one afterwards, or none."""
        volume = await self._volumes.find(body.model, body.instance or passage.instance)
        async with self._volumes.alone(volume, what):
            step = self._enter(passage, volume, self._volumes.writers(volume, body.model))
            target = await passage.target(step)
            await self._volumes.unload_elsewhere(volume, replaces, except_on=target.instance)
            await passage.pass_whole(
                self._server,
                target,
                lambda target: passage.question(target, body.raw()),
                then=lambda: self._volumes.changed(passage.attempting.work.instance),
            )

    async def _pull(self, passage: Passage) -> None:
        body = await self._named(passage)
        self._refuse_role(body.model)
        volume = self._volumes.default(body.instance or passage.instance)
        with self._passing.pulls.join(volume, body) as waiter:
            if body.stream:
                await self._pass_lines_on(passage, body, waiter)
            else:
                await self._wait_for_end(passage, body, waiter)
        await passage.end()

    async def _pass_lines_on(self, passage: Passage, body: ManagementBody, waiter: Waiter) -> None:
        started = False
        async for line in waiter:
            if not started:
                started = True
                if waiter.prepared is not None:
                    passage.answered_by(waiter.prepared, body.model)
                await passage.start(200, _LINES, None)
            await passage.send(line)

    async def _wait_for_end(self, passage: Passage, body: ManagementBody, waiter: Waiter) -> None:
        status, content = 200, _SUCCESS
        try:
            async for _ in waiter:
                pass
        except PullFailedError as error:
            if error.status is not None:
                raise
            # So Ollama tells it: not as it tells other errors, with a content type of its own.
            status, content = 500, orjson.dumps({"error": error.message})
        if waiter.prepared is not None:
            passage.answered_by(waiter.prepared, body.model)
        await passage.start(status, _DOCUMENT, len(content))
        await passage.send(content)

    # --- parts of models ---

    async def _blob(self, passage: Passage) -> None:
        volume = self._volumes.default(passage.instance)
        if passage.scope["method"] == "HEAD":
            await self._look_for_blob(passage, volume)
            return
        step = self._enter(passage, volume, self._volumes.writers(volume))
        pieces = passage.uploaded()
        length = passage.body_length
        await passage.pass_on(self._server, step, lambda target: passage.question(target, pieces, length))

    async def _look_for_blob(self, passage: Passage, volume: str) -> None:
        """Ask an instance that runs. Where none does the answer is no: the client then uploads the blob."""
        body = await passage.body()
        running = self._volumes.running(volume)
        if not running:
            digest = passage.scope["path"].removeprefix(BLOB_PREFIX)
            raise RefusedError(_NOT_FOUND, f'blob "{digest}" not found')
        step = self._enter(passage, volume, running, starts=False)
        await passage.pass_on(self._server, step, lambda target: passage.question(target, body))

    # --- helpers ---

    async def _named(self, passage: Passage) -> ManagementBody:
        body = await in_steps(reading_named(await passage.parts()))
        passage.record.model = body.model
        return body

    def _enter(
        self, passage: Passage, volume: str, attempts: Sequence[Attempt], *, starts: bool = True
    ) -> Step:
        none = self._volumes.none_left(volume)
        trouble = Trouble(none.reason, none.message, none.retry_after_s)
        return passage.attempting.enter_fixed(attempts, trouble, starts=starts)

    def _refuse_role(self, name: str) -> None:
        """Refuse to make a model that requests could not name.

        Raises:
            RefusedError: it is the name of a role.
        """
        if self._passing.catalogue.is_role(name):
            message = (
                f"'{name}' is a role here: requests that name it are answered by the role's model. "
                f"Name the model {name}:{DEFAULT_TAG}, or choose another name"
            )
            raise RefusedError(BAD_REQUEST, message)

    def _meant(self, body: ManagementBody) -> str:
        """The model that is asked about: clients look up what they are going to use, which may be a role."""
        found = self._passing.catalogue.find(body.model)
        return found.model if isinstance(found, Alias) else body.model

    async def _permitted(self, name: str, pin: str | None, permit: Permit) -> tuple[str, str]:
        """Return the model that is asked about, and an instance that has it and that the key permits.

        Raises:
            RefusedError: the key permits no such instance.
            NoSuchModelError: there is no such model, as far as the key permits to see.
        """
        limit = "" if pin is None else permit.limit_of_instance(pin)
        if limit:
            raise RefusedError(_FORBIDDEN, f"{limit} (forbidden)", "refused")
        catalogue = self._passing.catalogue
        await catalogue.refresh(lists=True)
        found = catalogue.find(name, permit)
        known = found.of if isinstance(found, Alias) else found
        if known is None:
            raise NoSuchModelError(model_not_found(name), "")
        return found.model if isinstance(found, Alias) else name, pin or known.instances[0]

    def _place_of_new(self, body: ManagementBody, pin: str | None) -> str:
        """Return the place for a new model: beside the one that it is made from, else where new ones go."""
        source = body.text("from")
        if pin is None and source and not body.has("files") and not body.has("adapters"):
            having = self._volumes.having(source)
            if having and self._volumes.default(None) not in having:
                return having[0]
        return self._volumes.default(pin)
