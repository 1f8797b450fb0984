"""One execution of a run: what is a failure, and what the run waits for."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.adapters.run_files import DirectoryFiles
from manager.domain.runs import RunError, RunStatus, body_file
from manager.errors import AskFailedError, CancelledByStopError, Reason
from manager.services.bodies import BodyBudget
from manager.services.requests import Requests
from manager.services.runs.execution import Done, Execution, PostponedError
from manager.wire.caller import HeaderNames
from tests.support.attempts import Stage, attempt, unavailable
from tests.support.runs import a_run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from manager.domain.target import Target
    from manager.services.ports import Question

BODY = b'{"model":"tiny","messages":[],"stream":false}'
NAMES = HeaderNames(
    instance=b"x-instance", lane=b"x-lane", project=b"x-project", intent=b"x-intent", local_only=b"x-local"
)


class Server:
    """A server that fails each request with `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked: list[str] = []

    @asynccontextmanager
    async def ask(self, question: Question) -> AsyncIterator[Any]:
        self.asked.append(question.instance)
        raise self.error
        yield


class Rig:
    """Executes a run whose instance has to be started."""

    def __init__(self, files: DirectoryFiles) -> None:
        self.files = files
        self.stage = Stage(attempt("a", "startable"))
        self.server = Server(AskFailedError("a cannot be reached", reason=Reason.CANCELLED, begun=True))

    async def execute(self) -> Done:
        run = a_run(body_bytes=len(BODY))
        await self.files.names()  # makes the directory
        await self.files.save(body_file(run.id), BODY)
        execution = Execution(
            self.stage.routing,
            cast("Any", self.server),
            Requests(NAMES, default_project="default"),
            self.files,
            BodyBudget(10_000),
        )

        async def sent(_target: Target, _request_id: str) -> None:
            assert run.status is RunStatus.QUEUED

        return await execution.execute(
            run,
            most_result_bytes=1000,
            begun=lambda _attempting: None,
            sent=sent,
            is_cancelled=lambda: False,
        )


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    files = DirectoryFiles(tmp_path / "runs")
    yield Rig(files)
    files.close()


async def test_a_run_whose_start_an_operator_stops_waits_as_for_an_instance_that_is_away(rig: Rig) -> None:
    rig.stage.placement.prepares["a"] = CancelledByStopError("a was stopped while it started", instance="a")
    with pytest.raises(PostponedError) as caught:
        await rig.execute()
    assert caught.value.error == RunError("cancelled", "a was stopped while it started")
    assert rig.server.asked == []
    (record,) = rig.stage.ended
    assert (record.outcome, record.fallback_reason) == ("cut", Reason.CANCELLED)


async def test_a_run_that_a_server_may_have_begun_has_failed(rig: Rig) -> None:
    done = await rig.execute()
    assert rig.server.asked == ["a"]
    assert done.error == RunError("cancelled", "a cannot be reached")


async def test_a_run_that_no_later_try_can_help_has_failed(rig: Rig) -> None:
    rig.stage.placement.prepares["a"] = unavailable(Reason.MODEL_MISSING)
    done = await rig.execute()
    assert done.error == RunError("model_missing", "a cannot be started")
