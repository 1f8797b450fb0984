from __future__ import annotations

import pytest

from manager.domain.condition import explain_end
from manager.domain.instance import ContainerFacts, Explanation
from manager.errors import Reason


@pytest.mark.parametrize(
    ("exit_code", "text"),
    [
        (137, "x was ended from outside, by SIGKILL (exit code 137)"),
        (143, "x was ended from outside, by SIGTERM (exit code 143)"),
        (1, "x ended by itself with exit code 1"),
        (0, "x ended by itself with exit code 0"),
    ],
)
def test_an_end_from_outside_is_told_from_one_by_itself(exit_code: int, text: str) -> None:
    why = explain_end("x", ContainerFacts("c", "x", "i", "exited", exit_code=exit_code))
    assert why.code is Reason.CONTAINER_EXITED
    assert why.message.startswith(text)


def test_a_container_that_is_gone_was_removed() -> None:
    assert explain_end("x", None) == Explanation(Reason.CONTAINER_EXITED, "x was removed")


def test_a_child_that_ran_out_of_memory_is_the_reason_whatever_the_exit_code() -> None:
    facts = ContainerFacts("c", "x", "i", "exited", exit_code=137, out_of_memory=True)
    assert explain_end("x", facts).code is Reason.OUT_OF_MEMORY
