"""A machine with graphics cards for daemons on the shared engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.nvml import standin

if TYPE_CHECKING:
    from pathlib import Path

    from tests.nvml.standin import Card

GIB = 2**30
A = "GPU-aaaaaaaa-0000-4000-8000-000000000001"
B = "GPU-bbbbbbbb-0000-4000-8000-000000000002"
C = "GPU-cccccccc-0000-4000-8000-000000000003"
D = "GPU-dddddddd-0000-4000-8000-000000000004"


class Machine:
    """What NVML tells the daemons that get `environment`; `show` changes it under their hands."""

    def __init__(self, directory: Path, *cards: Card, **knobs: int) -> None:
        self._state = directory / "cards"
        self.show(*cards, **knobs)
        self.environment = standin.environment(standin.build(directory / "nvml"), self._state)

    def show(self, *cards: Card, init_error: int = 0, count_error: int = 0) -> None:
        standin.write(self._state, cards, init_error=init_error, count_error=count_error)
