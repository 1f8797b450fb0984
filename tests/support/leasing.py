"""A daemon process that gives out leases over HTTP, for tests that kill it.

It is forked from a server that has everything imported already, so that starting it again costs little.
`POST /lease/INSTANCE` on the port of the control API waits for a lease, `DELETE /lease/INSTANCE` gives the
oldest one back.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import requests
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

import manager.app
from manager.api.errors import manager_error_response
from manager.errors import ManagerError
from manager.settings import load_settings
from manager.web.app import application
from manager.wire.access import Access
from tests.support.daemon import COMPUTE, free_port, wait_for

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

    from manager.services.instances.leases import Lease

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


class LeasingDaemon:
    """The process; `start` and `kill` in any order any number of times."""

    def __init__(self, config_file: Path) -> None:
        self.config_file = config_file
        self.log_file = config_file.with_name("leasing.log")
        self.port = free_port()
        self._process: ForkServerProcess | None = None

    def start(self) -> None:
        self._process = _FORKS.Process(
            target=_run, args=(str(self.config_file), str(self.log_file), self.port), daemon=True
        )
        self._process.start()
        wait_for(self._is_ready, within_s=60)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None

    def call(self, method: str, path: str, **query: str) -> requests.Response:
        full = path if path.startswith("/") else f"{COMPUTE}/{path}"
        return requests.request(method, f"http://127.0.0.1:{self.port}{full}", params=query, timeout=120)

    def instance(self, instance: str) -> dict[str, Any]:
        answer = self.call("GET", f"instances/{instance}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.is_alive(), self.log()
        with contextlib.suppress(requests.ConnectionError):
            return self.call("GET", "/readyz").status_code == 200
        return False


def _run(config_file: str, log_file: str, port: int) -> None:
    with Path(log_file).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    asyncio.run(_serve(Path(config_file), port))


async def _serve(config_file: Path, port: int) -> None:
    async with manager.app.open_daemon(load_settings(config_file)) as daemon:
        app = application(daemon.backend, access=Access(allowed_hosts={"127.0.0.1"}))
        app.mount("/lease", _leases(daemon))
        config = uvicorn.Config(app, port=port, ws="none", lifespan="off", log_config=None, access_log=False)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(daemon.run())
            tasks.create_task(uvicorn.Server(config).serve())


def _leases(daemon: manager.app.Daemon) -> FastAPI:
    app = FastAPI()
    held: dict[str, list[Lease]] = defaultdict(list)

    @app.post("/{instance}")
    async def take(instance: str) -> JSONResponse:
        try:
            lease = await daemon.fleet.get(instance).lease()
        except ManagerError as error:
            return manager_error_response(error)
        held[instance].append(lease)
        return JSONResponse({"endpoint": lease.endpoint})

    @app.delete("/{instance}")
    async def give_back(instance: str) -> JSONResponse:
        held[instance].pop(0).release()
        return JSONResponse({})

    return app
