"""The daemon, which counts on SIGUSR1 what it holds: `python -m tests.support.watched FILE serve …`.

FILE gets a JSON object: the tasks of the loop, and the objects of requests that are alive.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from collections import Counter
from pathlib import Path

from manager.cli import main
from manager.domain.lanes import Waiter
from manager.relay.exchange import Exchange
from manager.services.instances.leases import Lease
from manager.services.lanes.slots import Place
from manager.services.routing.attempting import Attempting

_COUNTED = (Attempting, Exchange, Lease, Place, Waiter)


def _count(file: Path) -> None:
    gc.collect()
    kinds = Counter(type(one) for one in gc.get_objects())
    found = {kind.__name__: kinds[kind] for kind in _COUNTED}
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"tasks": len(asyncio.all_tasks()), **found}), encoding="utf-8")
    new.replace(file)


if __name__ == "__main__":
    written = Path(sys.argv.pop(1))
    signal.signal(signal.SIGUSR1, lambda *_: _count(written))
    main()
