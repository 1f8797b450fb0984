"""A long piece of work in a thread with an event loop of its own, so that it can be cut off."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_TURN_S = 0.1


class Background:
    """Runs once. `ended` says whether the work has come to its end, or was cut off.

    The work is cut off, too, when the interpreter ends. The thread is not one of an executor: the
    interpreter waits for those before it says that it ends.
    """

    def __init__(self, work: Callable[[], Coroutine[object, object, None]], name: str) -> None:
        self.ended: Future[bool] = Future()
        self._work = work
        self._is_cut_off = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def start(self) -> None:
        self._thread.start()

    def cut_off(self) -> None:
        self._is_cut_off.set()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._watched())
        except asyncio.CancelledError:
            self.ended.set_result(False)
        except BaseException as error:  # noqa: BLE001  (whoever waits is told)
            self.ended.set_exception(error)
        else:
            self.ended.set_result(True)

    async def _watched(self) -> None:
        task = asyncio.ensure_future(self._work())
        while not task.done():
            await asyncio.wait({task}, timeout=_TURN_S)
            if self._is_cut_off.is_set() or not threading.main_thread().is_alive():
                task.cancel()
        await task
