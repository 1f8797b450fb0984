"""The cards on the page: those of other hosts, and those whose memory is unknown."""

from __future__ import annotations

from typing import Any

from manager.domain.keys import Scope
from manager.web.page import element_id
from manager.web.pages.gpus import GPUS
from manager.web.pages.overview import _lost
from manager.web.rendering import Renderer
from manager.web.viewer import Viewer

HOSTILE = "<script>node</script>"
UNKNOWN = {"code": "vram_unknown", "message": "the memory of GPU-1 is unknown"}


def gpu(**values: Any) -> dict[str, Any]:
    sizes = ("vram_total_bytes", "vram_used_bytes", "vram_free_bytes", "reserved_bytes")
    sensors = ("utilisation_percent", "temperature_c", "power_watts", "power_limit_watts")
    none = dict.fromkeys((*sizes, *sensors, "lost", "host", "memory_unknown"))
    one = {"uuid": "GPU-1", "index": 0, "pci_bus_id": "", "name": "Card", "processes": []}
    return one | none | values


def rendered(one: dict[str, Any], id_: str, error: dict[str, str] | None = None) -> str:
    sections = {
        "instances": [{"id": "gpu0", "device": {"kind": "gpu", "cards": []}}],
        "gpus": {"gpus": [one], "error": error},
    }
    viewer = Viewer(None, frozenset(Scope))
    assert GPUS.fragments is not None
    part = GPUS.fragments(sections, viewer)[id_]
    return Renderer().render(part.template, {"id": "x", "viewer": viewer, **part.context})


def shown(**values: Any) -> str:
    return rendered(gpu(**values), element_id("gpu", "GPU-1"))


def test_a_card_of_the_own_machine_names_no_host() -> None:
    text = shown(pci_bus_id="00000000:01:00.0")
    assert "00000000:01:00.0" in text
    assert "PCI" in text
    assert "The driver lists no process on this card." in text
    assert "is unknown" not in text


def test_a_card_of_another_host_names_it_and_says_why_its_memory_is_unknown() -> None:
    text = shown(host=HOSTILE, memory_unknown="no exporter is set")
    assert "&lt;script&gt;node&lt;/script&gt;" in text
    assert HOSTILE not in text
    assert "The memory of this card is unknown: no exporter is set." in text
    assert "Processes on another machine are not known." in text
    assert "PCI" not in text


def test_unknown_memory_is_no_trouble_of_the_driver() -> None:
    away = gpu(host="node-1", memory_unknown="no exporter is set")
    assert "cannot be read" not in rendered(away, "gpus-notice", UNKNOWN)
    assert "cannot be read" in rendered(gpu(), "gpus-notice", UNKNOWN | {"code": "timeout"})
    on_card = [{"device": {"kind": "gpu"}}]
    assert list(_lost({"gpus": [away], "error": UNKNOWN}, on_card)) == []
    assert len(list(_lost({"gpus": [gpu()], "error": UNKNOWN}, on_card))) == 1
