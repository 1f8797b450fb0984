"""Which volume an instance keeps its models on, who writes to it, and who is asked about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.routing import State
from manager.domain.template import Template
from manager.domain.volumes import Member, model_store, models_mount, readers, writers

RUNS = Member("runs", State.READY)
STARTS = Member("starts", State.STARTABLE, priority=10)
OUT = Member("out", State.OUT, priority=20)
READS = Member("reads", State.READY, priority=30, writable=False)

MEMBERS = st.lists(
    st.builds(
        Member,
        st.sampled_from("abcdef"),
        st.sampled_from(State),
        st.integers(-2, 2),
        writable=st.booleans(),
    ),
    unique_by=lambda member: member.id,
)


def test_whoever_runs_comes_before_whoever_would_have_to_be_started() -> None:
    assert writers([STARTS, OUT, RUNS], None) == ("runs", "starts")


def test_priority_then_order_decide_among_equals() -> None:
    one, two, three = Member("one", State.READY), Member("two", State.READY, 5), Member("three", State.READY)
    assert writers([one, two, three], None) == ("two", "one", "three")


def test_nobody_writes_to_what_it_mounts_for_reading_but_it_may_be_asked() -> None:
    assert writers([READS, STARTS], None) == ("starts",)
    assert readers([READS, STARTS]) == ("reads", "starts")


def test_the_operators_choice_stands_alone() -> None:
    assert writers([RUNS, STARTS, OUT], "out") == ("out",)
    assert writers([], "elsewhere") == ("elsewhere",)


def test_where_nobody_can_be_had_there_is_nobody() -> None:
    assert writers([OUT], None) == ()
    assert readers([OUT]) == ()


@given(MEMBERS)
def test_each_is_tried_once_and_nobody_who_is_out(members: list[Member]) -> None:
    known = {member.id: member for member in members}
    for ids in (writers(members, None), readers(members)):
        assert len(set(ids)) == len(ids)
        assert all(known[id_].state is not State.OUT for id_ in ids)
        states = [known[id_].state is State.READY for id_ in ids]
        assert states == sorted(states, reverse=True)


# --- where models are -----------------------------------------------------------------------------


def template(env: dict[str, str], *targets: str) -> Template:
    volumes = [{"source": f"v{number}", "target": target} for number, target in enumerate(targets)]
    return Template.model_validate({"image": "x:1", "device": "cpu", "env": env, "volumes": volumes})


@pytest.mark.parametrize(
    ("env", "targets", "store", "mount"),
    [
        ({}, ["/root/.ollama"], "/root/.ollama/models", "/root/.ollama"),
        ({}, ["/root/.ollama", "/root/.ollama/models"], "/root/.ollama/models", "/root/.ollama/models"),
        ({}, ["/root/.ollama/models", "/root/.ollama"], "/root/.ollama/models", "/root/.ollama/models"),
        ({}, ["/root/.ollama/models/blobs"], "/root/.ollama/models", None),
        ({}, ["/root/.ollamas", "/tmp"], "/root/.ollama/models", None),
        ({}, [], "/root/.ollama/models", None),
        ({"OLLAMA_MODELS": "/data/m/"}, ["/root/.ollama", "/data"], "/data/m", "/data"),
        ({"OLLAMA_MODELS": "/data"}, ["/root/.ollama"], "/data", None),
        ({"OLLAMA_MODELS": " "}, ["/root/.ollama"], "/root/.ollama/models", "/root/.ollama"),
        ({"OLLAMA_MODELS": "data"}, ["/data"], "/data", "/data"),
    ],
)
def test_models_lie_on_the_volume_that_holds_their_directory(
    env: dict[str, str], targets: list[str], store: str, mount: str | None
) -> None:
    made = template(env, *targets)
    found = models_mount(made)
    assert model_store(made) == store
    assert (found.target if found else None) == mount
