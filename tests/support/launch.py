"""The daemon with a fault point: `python -m tests.support.launch CONFIG INSTANCE:STEP[:NTH]` dies there.

Only a test can ask for that: the composition root takes the hook as an argument, and no setting leads to it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import uvloop

from manager.daemon import serve
from manager.settings import load_settings


def main() -> None:
    config, wanted = sys.argv[1:]
    instance, step, *nth = wanted.split(":")
    left = int(nth[0]) if nth else 1

    async def die_at_step(on_instance: str, at_step: str) -> None:
        nonlocal left
        if (on_instance, at_step) == (instance, step):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(load_settings(Path(config)), on_step=die_at_step))


if __name__ == "__main__":
    main()
