"""The device that Ollama has found, by its log."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMPUTE = re.compile(r'msg="inference compute"')
_ON_CPU = re.compile(r"\b(?:id|library)=\"?cpu\"?\b")


def fell_back_to_cpu(lines: Sequence[str]) -> bool | None:
    """Whether the log names the CPU as the only device; None while it has not named any.

    Ollama logs one `inference compute` line a device once its discovery has ended, and one with `id=cpu`
    when it found no card (seen in 0.24 to 0.33).
    """
    devices = [line for line in lines if _COMPUTE.search(line)]
    if not devices:
        return None
    return all(_ON_CPU.search(line) for line in devices)
