"""Filters read the metadata of thousands of items: the event loop goes on meanwhile."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from manager.domain.metadata_filter import Condition
from manager.domain.metadata_filter import matches as really_matches
from manager.services.embeddings import querying
from manager.services.embeddings.querying import Query
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.unit.services.embeddings.rig import ASKING, MODEL, Rig

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def test_metadata_are_not_read_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    await rig.open()
    await rig.switching.create(NewCollection("docs", MODEL, "", None, truncate=False, keep_text=True))
    items = [NewItem(str(at), f"text {at}", None, b'{"n": %d}' % at) for at in range(50)]
    await rig.writing.put("docs", items, ASKING)
    threads: set[threading.Thread] = set()

    def noted(*args: Any) -> bool:
        threads.add(threading.current_thread())
        return really_matches(*args)

    monkeypatch.setattr(querying, "matches", noted)
    # The first one is answered by the nearest hits, the second one by a look at all items.
    for least, count in ((0, 50), (49, 1)):
        query = Query("text 1", None, 50 if count > 1 else 4, None, (Condition("n", "$gte", least),))
        answer = await rig.querying.query("docs", query, ASKING)
        assert len(answer.matches) == count
    assert threads
    assert threading.current_thread() not in threads
    await rig.close()
