"""The common parts of the sections of the configuration: their base, and the kinds of values in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from manager.domain.durations import parse_duration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.domain.template import Refusal

_CARD_ID = re.compile(r"gpu(?:0|[1-9][0-9]{0,3})")
_NODE_ID = re.compile(r"[a-z][a-z0-9-]*-(?:(?P<card>gpu(?:0|[1-9][0-9]{0,3}))|cpu)")


@dataclass(frozen=True, slots=True)
class FoundIds:
    """The instances that may be found while the daemon runs, without being configured.

    Attributes:
        cards: those of cards of this machine (`gpus: auto`).
        nodes: those of the nodes of a swarm (`swarm.instances`).
    """

    cards: bool = False
    nodes: bool = False

    def on_gpu(self, instance_id: str) -> bool | None:
        """Return whether such an instance is on a card; None where no instance of that id can be found."""
        if self.cards and _CARD_ID.fullmatch(instance_id):
            return True
        match = _NODE_ID.fullmatch(instance_id) if self.nodes else None
        return None if match is None else match["card"] is not None

    @property
    def words(self) -> tuple[str, ...]:
        """Their ids, for people."""
        cards = ("gpuN (gpus: auto)",) if self.cards else ()
        return (*cards, "HOST-cpu", "HOST-gpuN (swarm.instances)") if self.nodes else cards


# The longest time that most settings allow, in seconds.
MOST_S = 86_400
YEAR_S = 366 * MOST_S


def _seconds(value: object) -> object:
    """A duration as text (`15m`) in seconds; any other value as it is."""
    return parse_duration(value) if isinstance(value, str) else value


WholeNumber = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Duration = Annotated[Number, BeforeValidator(_seconds)]
Timeout = Annotated[Duration, Field(gt=0, le=MOST_S)]
Wait = Annotated[Duration, Field(ge=0, le=MOST_S)]
Interval = Annotated[Duration, Field(ge=0.01, le=MOST_S)]
Ttl = Annotated[Duration, Field(ge=0, le=YEAR_S)]
Text = Annotated[str, Field(min_length=1)]
InstanceId = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


def refuse(refusals: Iterable[Refusal]) -> None:
    """Raise all of `refusals` as one error, whose keys are relative to what is being checked."""
    found = list(refusals)
    if found:
        text = "; ".join(f"{'.'.join(map(str, one.key))}: {one.message}" for one in found)
        raise PydanticCustomError("contradiction", "{text}", {"text": text, "refusals": found})
