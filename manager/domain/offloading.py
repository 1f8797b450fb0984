"""The advice to hand small jobs to a model: it is local, small or fast, and available."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from manager.domain.classification import Tier
from manager.domain.models import parameter_count, parameter_text

if TYPE_CHECKING:
    from collections.abc import Collection

# The largest model is a "14b", which calls itself 14.8B.
MOST_PARAMETERS = 14 * 10**9
_BEYOND = 15 * 10**9
_GENERATES = "completion"


class OffloadHint(NamedTuple):
    """The advice, and why in few words."""

    suitable: bool
    why: str


def offload_hint(
    *,
    capabilities: Collection[str] | None,
    parameters: str,
    tier: Tier | None,
    remote_host: str,
    is_available: bool,
) -> OffloadHint:
    """Return whether small jobs may be handed to a model.

    Args:
        capabilities: as its server lists them; None where that is not known, which counts as text.
        parameters: its size as its server writes it, such as `7.6B`; empty where it says none.
        tier: the one that the operator has stated, if any; `fast` stands above the size.
        remote_host: where it runs, if it only seems to be here; empty for a local model.
        is_available: an instance that has it runs or can be started.
    """
    if capabilities is not None and _GENERATES not in capabilities:
        return OffloadHint(suitable=False, why="it generates no text")
    if remote_host:
        return OffloadHint(suitable=False, why=f"it runs at {remote_host}")
    if not is_available:
        return OffloadHint(suitable=False, why="no instance that has it can answer now")
    return OffloadHint(suitable=True, why="its tier is fast") if tier is Tier.FAST else _by_size(parameters)


def _by_size(parameters: str) -> OffloadHint:
    count = _count(parameters)
    if count is None:
        return OffloadHint(suitable=False, why="neither a fast tier nor its size is known")
    size = f"{parameters.strip()} parameters"
    if count >= _BEYOND:
        return OffloadHint(suitable=False, why=f"{size} are more than {parameter_text(MOST_PARAMETERS)}")
    return OffloadHint(suitable=True, why=f"{size} are at most {parameter_text(MOST_PARAMETERS)}")


def _count(parameters: str) -> int | None:
    try:
        return parameter_count(parameters)
    except ValueError:
        return None
