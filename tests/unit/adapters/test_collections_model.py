"""The store of collections beside a model of it: any calls in any order, and processes that are killed."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from manager.adapters.collections import open_collections
from tests.support.collecting import Model, child, next_step, opened, rows_of, seen, state_of, steps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "embeddings.sqlite3"


# --- any calls in any order ---


class Machine(RuleBasedStateMachine):
    """Makes the same steps in the store and in a model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.path = Path(self.directory.name, "embeddings.sqlite3")
        self.runner = asyncio.Runner()
        self.store = self.runner.run(open_collections(self.path))
        self.model = Model()

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        step = next_step(self.model, lambda values: data.draw(st.sampled_from(values)))
        note(f"{step}")
        assert self.runner.run(step.make(self.store)) == self.model.take(step), step

    @rule()
    def look(self) -> None:
        assert self.runner.run(seen(self.store)) == self.model.seen()

    @rule(closes=st.booleans())
    def reopen(self, closes: bool) -> None:
        self.runner.run(self.store.close() if closes else self.store.abandon())
        self.store = self.runner.run(open_collections(self.path))
        self.look()

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.runner.run(self.store.all_counts()) == self.model.all_counts()
        assert self.runner.run(self.store.item_counts()) == self.model.item_counts()

    def teardown(self) -> None:
        try:
            self.look()
        finally:
            self.runner.run(self.store.close())
            self.runner.close()
            self.directory.cleanup()


TestMachine = Machine.TestCase
# A failure shows its steps; to make them fewer takes minutes.
TestMachine.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    phases=(Phase.generate,),
    suppress_health_check=[*HealthCheck],
    deadline=None,
)


async def test_many_steps(path: Path) -> None:
    model = Model()
    following = steps(7, model)
    made: set[str] = set()
    async with opened(path) as store:
        for _ in range(400):
            step = following()
            made.add(step.method)
            assert await step.make(store) == model.take(step), step
        assert await seen(store) == model.seen()
    assert len(made) == 15


# --- processes that are killed ---


async def test_what_a_killed_process_had_done_is_there(path: Path) -> None:
    seed, done = "5", 0
    chance = random.Random()
    for _ in range(3):
        process = child("-m", "tests.support.collecting", str(path), seed, str(done))
        assert process.stdout is not None
        wanted = done + chance.randrange(1, 60)
        try:
            # The moment of the kill is as random as the two processes' turns.
            while done < wanted:
                done = int(process.stdout.readline())
        finally:
            process.kill()
            said = process.communicate()[0].split()
        # A line may be cut off; what it says is done in any case.
        done = max(done, *(int(one) for one in said)) if said else done
        model = Model()
        following = steps(int(seed), model)
        for _ in range(done):
            model.take(following())
        was_closed, found = await state_of(path)
        assert not was_closed
        if found != model.seen():
            # The last step was made, and not said.
            model.take(following())
            done += 1
        assert found == model.seen()


REMOVES = """
import asyncio, sys
from pathlib import Path
from manager.adapters.collections import open_collections, removal
from tests.support.collecting import filled
async def main():
    removal.SLICE = 2
    store = await open_collections(Path(sys.argv[1]))
    collection, version = await filled(store, 1000)
    removing = asyncio.create_task(store.remove(collection))
    while await store.collections():
        await asyncio.sleep(0)
    print("removing", flush=True)
    await removing
asyncio.run(main())
"""


async def test_a_removal_goes_on_after_a_kill(path: Path) -> None:
    process = child("-c", REMOVES, str(path))
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "removing\n"
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert rows_of(path, "items") > 0
    async with opened(path) as store:
        assert not await store.was_closed()
        assert await seen(store) == Model().seen()
        async with asyncio.timeout(30):
            while rows_of(path, "removed"):
                await store.allocate(1)
    assert rows_of(path, "items") == rows_of(path, "vectors") == 0
