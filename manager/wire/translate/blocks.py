"""The pieces of an answer as blocks that come one after the other, for dialects that have blocks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import orjson

from manager.wire.translate.codec import UnsayableError
from manager.wire.translate.hub import ArgumentsCame, CallBegan, Ended, Stop, TextCame, ThinkingCame

if TYPE_CHECKING:
    from manager.wire.translate.hub import AnswerEvent

# Of one answer, as far as it has to be kept: a whole one, or calls that wait for their turn.
MOST_KEPT_CHARACTERS = 32 * 1024 * 1024
# A block costs so much beside its text.
_BLOCK_COST = 256

_Kind: TypeAlias = Literal["text", "thinking", "call"]


@dataclass(slots=True)
class Block:
    """Text, thinking, or a call with its arguments. `text` is that of the pieces that were kept."""

    index: int
    kind: _Kind
    number: int = -1
    id: str = ""
    name: str = ""
    signature: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Began(NamedTuple):
    block: Block


class More(NamedTuple):
    block: Block
    text: str


class Over(NamedTuple):
    block: Block


Step: TypeAlias = Began | More | Over


class Blocks:
    """Puts the events of an answer into an order in which each block ends before the next begins.

    A server may send pieces of several calls in turn. Those of a later block wait until the arguments of the
    call before it are whole, or the answer ends.

    Attributes:
        done: the blocks that are over, with all of their text where everything is kept.
        has_calls: whether any block is a call.
    """

    def __init__(self, *, keeps_all: bool) -> None:
        self.done: list[Block] = []
        self.has_calls = False
        self._keeps_all = keeps_all
        self._open: deque[Block] = deque()  # the first one has begun for the client, the others wait
        self._kept = 0

    def take(self, event: AnswerEvent) -> list[Step]:
        """Return what the event makes of the blocks; `Ended` ends them all.

        Raises:
            UnsayableError: too much would have to be kept.
        """
        steps: list[Step] = []
        if isinstance(event, TextCame):
            if event.text:
                self._add(self._of_kind("text", steps), event.text, steps)
        elif isinstance(event, ThinkingCame):
            if event.text or event.signature:
                block = self._of_kind("thinking", steps)
                self._add(block, event.text, steps)
                block.signature = event.signature
        elif isinstance(event, CallBegan):
            self.has_calls = True
            self._begin(Block(0, "call", event.number, event.id, event.name), steps)
        elif isinstance(event, ArgumentsCame):
            call = next((one for one in self._open if one.number == event.number), None)
            if call is not None:  # otherwise its JSON was whole, and this is beyond it
                self._add(call, event.text, steps)
                self._advance(steps)
        elif isinstance(event, Ended):
            while self._open:
                self._next(steps)
        return steps

    def stop(self, event: Ended) -> Stop:
        """Return why the answer has ended: some servers do not say that it is for a call."""
        return Stop.TOOL_CALLS if event.stop is Stop.END and self.has_calls else event.stop

    def _of_kind(self, kind: _Kind, steps: list[Step]) -> Block:
        """The last block where it can go on, otherwise a new one."""
        last = self._open[-1] if self._open else None
        if last is not None and last.kind == kind and not last.signature:
            return last
        block = Block(0, kind)
        self._begin(block, steps)
        return block

    def _begin(self, block: Block, steps: list[Step]) -> None:
        self._keep(_BLOCK_COST)
        block.index = len(self.done) + len(self._open)
        self._open.append(block)
        if len(self._open) == 1:
            steps.append(Began(block))
        else:
            self._advance(steps)

    def _add(self, block: Block, text: str, steps: list[Step]) -> None:
        is_first = block is self._open[0]
        if is_first and text:
            steps.append(More(block, text))
        if self._keeps_all or not is_first or block.kind == "call":
            self._keep(len(text))
            block.pieces.append(text)

    def _keep(self, more: int) -> None:
        self._kept += more
        if self._kept > MOST_KEPT_CHARACTERS:
            raise UnsayableError(f"the answer has more than {MOST_KEPT_CHARACTERS} characters")

    def _advance(self, steps: list[Step]) -> None:
        while len(self._open) > 1 and _is_whole(self._open[0]):
            self._next(steps)

    def _next(self, steps: list[Step]) -> None:
        """End the first block, and begin the next one with what has waited of it."""
        block = self._open.popleft()
        self.done.append(block)
        steps.append(Over(block))
        if not self._open:
            return
        block = self._open[0]
        steps.append(Began(block))
        if block.text:
            steps.append(More(block, block.text))


def arguments_of(block: Block, stop: Stop) -> dict[str, Any]:
    """Return the arguments of a call as an object.

    Raises:
        UnsayableError: they are none, although the model has ended them.
    """
    try:
        found: Any = orjson.loads(block.text.strip() or "{}")
    except orjson.JSONDecodeError:
        found = None
    if isinstance(found, dict):
        return found
    if stop is Stop.LENGTH:
        return {}
    raise UnsayableError(f"the arguments for the tool {block.name} are no JSON object")


def _is_whole(block: Block) -> bool:
    if block.kind != "call":
        return True
    text = block.text.rstrip()
    if not text.endswith("}"):
        return False
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
