"""A process of its own around one `Nvml`, for the tests: the library path is read once, when it starts.

Argument: the deadline in seconds. One command a line on standard input, one JSON answer a line on standard
output: {"gpus": […]}, {"refused": <details.nvml>, "code": …, "message": …}, {"suspended": true} or {}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from manager.adapters.nvml import Nvml
from manager.errors import GpuQueryError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from manager.domain.gpu import Gpu

    Answer = dict[str, Any]


class Reader:
    """A method for each command. Time for the waits between attempts stands still but for `advance`."""

    def __init__(self, timeout_s: float) -> None:
        self._now_s = 1000.0
        self._nvml = Nvml(timeout_s=timeout_s, clock=lambda: self._now_s)

    async def read(self) -> Answer:
        return _gpus(await self._nvml.read())

    async def read_twice(self) -> Answer:
        first, second = await asyncio.gather(self._nvml.read(), self._nvml.read())
        return {**_gpus(first), "same": first is second}

    async def read_and_give_up(self) -> Answer:
        reading = asyncio.create_task(self._nvml.read())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        return {"cancelled": reading.cancelled()}

    async def read_until_answered(self) -> Answer:
        while True:
            try:
                return _gpus(await self._nvml.read())
            except GpuQueryError:
                await asyncio.sleep(0)

    async def read_at_once(self) -> Answer:
        return _at_once(self._nvml.read())

    async def close(self) -> Answer:
        await self._nvml.close()
        return {}

    async def close_at_once(self) -> Answer:
        return _at_once(self._nvml.close())

    async def advance(self, seconds: str) -> Answer:
        self._now_s += float(seconds)
        return {}

    async def seen(self) -> Answer:
        return {"seen": len(self._nvml._driver._seen)}

    async def imported(self) -> Answer:
        return {"pynvml": "pynvml" in sys.modules}


async def _answer(reader: Reader, command: str, *arguments: str) -> Answer:
    try:
        answer: Answer = await getattr(reader, command)(*arguments)
    except GpuQueryError as error:
        return {"refused": error.details["nvml"], "code": error.code, "message": error.message}
    return answer


def _gpus(gpus: Sequence[Gpu]) -> Answer:
    return {"gpus": [asdict(gpu) for gpu in gpus]}


def _at_once(call: Coroutine[Any, Any, object]) -> Answer:
    """Whatever the call does before it waits for anything."""
    try:
        call.send(None)
    except StopIteration:
        return {}
    call.close()
    return {"suspended": True}


async def main() -> None:
    reader = Reader(float(sys.argv[1]))
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await _answer(reader, *line.split())), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
