"""Events of an answer as blocks, one after the other, in whatever order a server sends pieces of calls."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.translate import blocks as under_test
from manager.wire.translate.blocks import Began, Blocks, More, Over, arguments_of
from manager.wire.translate.codec import UnsayableError
from manager.wire.translate.hub import (
    ArgumentsCame,
    CallBegan,
    Ended,
    Failed,
    Stop,
    TextCame,
    ThinkingCame,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.wire.translate.hub import AnswerEvent

END = Ended(Stop.END)


def told(events: Iterable[AnswerEvent], blocks: Blocks | None = None) -> list[str]:
    """The steps of an answer: `0(` a block begins, `0:a` more of it, `0)` it ends."""
    blocks = blocks or Blocks(keeps_all=False)
    found: list[str] = []
    for event in events:
        for step in blocks.take(event):
            at = step.block.index
            if isinstance(step, Began):
                found.append(f"{at}(")
            elif isinstance(step, More):
                found.append(f"{at}:{step.text}")
            else:
                found.append(f"{at})")
    return found


def test_a_block_ends_when_another_begins() -> None:
    events: list[AnswerEvent] = [
        ThinkingCame("h"),
        ThinkingCame("m"),
        TextCame("a"),
        TextCame(""),
        TextCame("b"),
        CallBegan(0, "i", "n"),
        ArgumentsCame(0, "{"),
        ArgumentsCame(0, "}"),
        CallBegan(1, "j", "n"),
        ArgumentsCame(1, "{}"),
        TextCame("c"),
        END,
    ]

    assert " ".join(told(events)) == "0( 0:h 0:m 0) 1( 1:a 1:b 1) 2( 2:{ 2:} 2) 3( 3:{} 3) 4( 4:c 4)"


def test_pieces_of_a_later_call_wait_until_the_first_is_whole() -> None:
    events: list[AnswerEvent] = [CallBegan(0, "i", "n"), ArgumentsCame(0, '{"a":'), CallBegan(1, "j", "n")]
    blocks = Blocks(keeps_all=False)

    assert told([*events, ArgumentsCame(1, "{"), TextCame("a")], blocks) == ["0(", '0:{"a":']
    assert told([ArgumentsCame(0, "{}")], blocks) == ["0:{}"]  # an inner object ends, not the arguments
    assert told([ArgumentsCame(0, "}")], blocks) == ["0:}", "0)", "1(", "1:{"]
    assert told([ArgumentsCame(1, "}"), TextCame("b")], blocks) == ["1:}", "1)", "2(", "2:a", "2:b"]
    assert told([ArgumentsCame(0, " "), END], blocks) == ["2)"]


def test_the_end_ends_calls_that_are_not_whole() -> None:
    events: list[AnswerEvent] = [CallBegan(0, "i", "n"), CallBegan(1, "j", "n"), ArgumentsCame(1, "{"), END]

    assert told(events) == ["0(", "0)", "1(", "1:{", "1)"]


def test_thinking_behind_a_signature_is_another_block() -> None:
    blocks = Blocks(keeps_all=True)
    events: list[AnswerEvent] = [
        ThinkingCame("a"),
        ThinkingCame("", "s"),
        ThinkingCame(""),
        ThinkingCame("b", "t"),
        END,
    ]

    assert told(events, blocks) == ["0(", "0:a", "0)", "1(", "1:b", "1)"]
    assert [(block.text, block.signature) for block in blocks.done] == [("a", "s"), ("b", "t")]


def test_a_failure_is_no_step() -> None:
    assert told([Failed("oh")]) == []


@pytest.mark.parametrize(
    ("events", "stop", "expected"),
    [
        ([TextCame("a")], Stop.END, Stop.END),
        ([CallBegan(0, "", "n")], Stop.END, Stop.TOOL_CALLS),
        ([CallBegan(0, "", "n")], Stop.LENGTH, Stop.LENGTH),
    ],
)
def test_an_end_after_a_call_is_for_the_call(events: list[AnswerEvent], stop: Stop, expected: Stop) -> None:
    blocks = Blocks(keeps_all=True)
    told(events, blocks)

    assert blocks.stop(Ended(stop)) is expected


@pytest.mark.parametrize("events", [[TextCame("a" * 1000)] * 2, [CallBegan(0, "", "n")] * 5])
def test_what_is_kept_is_bounded(events: list[AnswerEvent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOST_KEPT_CHARACTERS", 1100)

    with pytest.raises(UnsayableError, match="more than 1100 characters"):
        told(events, Blocks(keeps_all=True))


def test_text_that_is_passed_on_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOST_KEPT_CHARACTERS", 1100)

    assert len(told([TextCame("a" * 1000)] * 9)) == 10


def block_of(arguments: str) -> under_test.Block:
    return under_test.Block(0, "call", name="get", pieces=[arguments])


def test_arguments_are_an_object() -> None:
    assert arguments_of(block_of('{"a": 1}'), Stop.TOOL_CALLS) == {"a": 1}
    assert arguments_of(block_of(" "), Stop.TOOL_CALLS) == {}
    assert arguments_of(block_of('{"a'), Stop.LENGTH) == {}  # the limit has cut them off


@pytest.mark.parametrize("arguments", ['{"a', "[]", "1"])
def test_arguments_that_are_no_object_are_a_fault(arguments: str) -> None:
    with pytest.raises(UnsayableError, match="the arguments for the tool get are no JSON object"):
        arguments_of(block_of(arguments), Stop.TOOL_CALLS)


_CALLS = st.lists(st.dictionaries(st.text(max_size=3), st.integers(), max_size=3), min_size=1, max_size=4)


@given(_CALLS, st.data())
def test_every_interleaving_of_calls_gives_each_its_arguments_in_one_block(
    calls: list[dict[str, int]], data: st.DataObject
) -> None:
    texts = [json.dumps(call) for call in calls]
    rest = [[ArgumentsCame(number, piece) for piece in text] for number, text in enumerate(texts)]
    events: list[AnswerEvent] = [CallBegan(number, f"i{number}", "n") for number in range(len(calls))]
    while any(rest):
        number = data.draw(st.sampled_from([at for at, pieces in enumerate(rest) if pieces]))
        events.append(rest[number].pop(0))
    blocks = Blocks(keeps_all=False)
    steps = [step for event in (*events, END) for step in blocks.take(event)]

    assert [block.text for block in blocks.done] == texts
    open_at = -1
    came = [""] * len(calls)
    for step in steps:
        if isinstance(step, Began):
            assert step.block.index == open_at + 1
            open_at += 1
        assert step.block.index == open_at
        if isinstance(step, More):
            came[open_at] += step.text
    assert came == texts
    assert sum(isinstance(step, Over) for step in steps) == len(calls)
