"""A daemon without a listener that has a lease: `python -m tests.support.leaser CONFIG INSTANCE STEP`.

It starts the instance, takes a lease on it, begins to stop it and dies by SIGKILL at that step. So it gets to
the one step that needs somebody in the middle of a request.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from manager.app import open_daemon
from manager.settings import load_settings


async def main() -> None:
    config, instance, wanted = sys.argv[1:]

    async def die_at_step(on_instance: str, at_step: str) -> None:
        if (on_instance, at_step) == (instance, wanted):
            os.kill(os.getpid(), signal.SIGKILL)

    async with open_daemon(load_settings(Path(config)), on_step=die_at_step) as daemon:
        running = asyncio.ensure_future(daemon.run())
        await daemon.parts.first_look.settled(within_s=20)
        with await daemon.fleet.get(instance).lease():
            stopping = asyncio.ensure_future(daemon.fleet.managed(instance).stop())
            await asyncio.wait({running, stopping})


if __name__ == "__main__":
    asyncio.run(main())
