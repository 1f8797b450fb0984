"""What a daemon measures of its cards: sensors, their metrics, and the history over a restart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from manager.api.gpu_history import GpuHistoryBody
from tests.nvml.standin import Card, Process, Sensors
from tests.support.cards import GIB, A, B, Machine
from tests.support.daemon import wait_for
from tests.support.engine import private_engine_obstacles

if TYPE_CHECKING:
    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon

pytestmark = pytest.mark.skipif(
    bool(private_engine_obstacles()), reason="; ".join(private_engine_obstacles())
)

# This process stands in for a foreign one on the card.
NAME = Path("/proc/self/comm").read_text(encoding="utf-8").strip()


def hot(used: int = 3 * GIB, **more: Any) -> Card:
    processes = (Process(os.getpid(), 2 * GIB),)
    sensors = Sensors(97, 61, 412_500, 700_000)
    return Card(A, vram_used=used, processes=processes, sensors=sensors, **more)


def history(daemon: Daemon, query: str = "") -> list[dict[str, Any]]:
    body = daemon.get(f"gpus/history{query}")
    GpuHistoryBody.model_validate(body)
    for one in body["gpus"]:
        columns = [one["used_bytes"], one["utilisation_percent"], one["temperature_c"], one["power_watts"]]
        columns += [*one["instances"].values(), *one["processes"].values()]
        assert {len(column) for column in columns} == {len(one["times"])}
        assert all(second % body["step_s"] == 0 for second in one["times"])
    gpus: list[dict[str, Any]] = body["gpus"]
    return gpus


def test_cards_are_measured_shown_and_remembered_over_a_restart(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, hot(), Card(B, pci_bus_id="00000000:02:00.0"))
    daemon = new_daemon(config={"gpus": "none"}, environment=machine.environment).start()

    first, second = daemon.get("gpus")["gpus"]
    names = ("utilisation_percent", "temperature_c", "power_watts", "power_limit_watts")
    assert [first[name] for name in names] == [97, 61, 412.5, 700]
    assert [second[name] for name in names] == [None] * 4
    metrics = daemon.call("GET", "/metrics").text
    assert f'ollama_manager_gpu_power_watts{{uuid="{A}"}} 412.5' in metrics
    assert f'ollama_manager_gpu_utilisation_percent{{uuid="{A}"}} 97.0' in metrics
    assert f'gpu_temperature_celsius{{uuid="{B}"}}' not in metrics

    gpus = wait_for(lambda: history(daemon), lambda found: len(found) == 2, within_s=20)
    it = gpus[0]
    assert (it["uuid"], it["vram_total_bytes"], it["used_bytes"][-1]) == (A, 24 * GIB, 3 * GIB)
    assert (it["utilisation_percent"][-1], it["power_watts"][-1]) == (97, 412.5)
    assert (it["instances"], it["processes"][NAME][-1]) == ({}, 2 * GIB)
    assert gpus[1]["power_watts"] == [None] * len(gpus[1]["times"])
    assert history(daemon, "?span=24h") == []

    machine.show(hot(error=15), Card(B, pci_bus_id="00000000:02:00.0"))
    (it,) = wait_for(
        lambda: history(daemon, f"?gpu={A}"), lambda found: found[0]["used_bytes"][-1] is None, within_s=30
    )
    assert 3 * GIB in it["used_bytes"]
    assert it["processes"][NAME][-1] is None

    assert daemon.stop() == 0
    daemon.start()
    gpus = wait_for(lambda: history(daemon, "?span=24h"), within_s=20)
    assert {one["uuid"] for one in gpus} == {A, B}
    assert {value for one in gpus if one["uuid"] == A for value in one["power_watts"]} >= {412.5}

    unknown = daemon.call("GET", "gpus/history?gpu=GPU-x")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_gpu")
    assert daemon.call("GET", "gpus/history?span=2h").status_code == 422
