from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from manager.domain.container import LABEL_HASH, container_request
from manager.domain.image_override import (
    ImageInForce,
    ImageOverride,
    override_from,
    rolled_back,
    shown_override,
    upgraded,
    with_image,
)
from manager.domain.instance import DeviceKind, Driver, InstanceSpec, Limits
from manager.domain.template import Template

T0 = datetime(2026, 8, 1, tzinfo=UTC)
T1 = T0 + timedelta(hours=1)
TEMPLATE = Template(image="ollama/ollama:1", device=DeviceKind.CPU, env={"OLLAMA_KEEP_ALIVE": "5m"})
LIMITS = Limits(900, 5, 5, 5, 2, 15, 1)
SPEC = InstanceSpec("cpu", Driver.DOCKER, DeviceKind.CPU, LIMITS, template=TEMPLATE)


def test_upgrades_are_rolled_back_one_by_one_to_the_image_of_the_template() -> None:
    first = upgraded(None, "ollama/ollama:2", T0)
    second = upgraded(first, "ollama/ollama:3", T1)
    assert shown_override(second, "ollama/ollama:1") == ImageInForce("ollama/ollama:3", "ollama/ollama:2", T1)
    back = rolled_back(second, T1)
    assert back == ImageOverride(("ollama/ollama:2",), T1)
    assert shown_override(back, "ollama/ollama:1") == ImageInForce("ollama/ollama:2", "ollama/ollama:1", T1)
    assert rolled_back(first, T1) is None
    assert shown_override(None, "ollama/ollama:1") is None


def test_so_many_upgrades_are_remembered_and_no_more() -> None:
    override = None
    for number in range(20):
        override = upgraded(override, f"ollama/ollama:{number}", T0)
    assert override is not None
    assert override.images == tuple(f"ollama/ollama:{number}" for number in range(12, 20))
    assert override.image == "ollama/ollama:19"


def test_the_image_in_force_is_part_of_the_template_and_of_its_hash() -> None:
    chosen = with_image(SPEC, upgraded(None, "ollama/ollama:2", T0))
    assert chosen.template is not None
    assert (chosen.template.image, chosen.template.env) == ("ollama/ollama:2", TEMPLATE.env)
    requests = [
        container_request(template, manager_id="m", instance_id="cpu", gpu=None, loopback_port=None)
        for template in (TEMPLATE, chosen.template, TEMPLATE.model_copy(update={"image": "ollama/ollama:2"}))
    ]
    assert [request.image for request in requests] == [
        "ollama/ollama:1",
        "ollama/ollama:2",
        "ollama/ollama:2",
    ]
    assert requests[0].labels[LABEL_HASH] != requests[1].labels[LABEL_HASH] == requests[2].labels[LABEL_HASH]


def test_without_an_override_or_a_template_nothing_changes() -> None:
    external = InstanceSpec("nas", Driver.EXTERNAL, None, LIMITS, url="http://nas")
    assert with_image(SPEC, None) is SPEC
    assert with_image(external, upgraded(None, "ollama/ollama:2", T0)) is external


def test_an_override_comes_back_as_it_was_stored() -> None:
    override = ImageOverride(("ollama/ollama:2", "ollama/ollama:3"), T0)
    assert override_from(override.stored()) == override


@pytest.mark.parametrize("change", [{"images": []}, {"images": [1]}, {"since": "soon"}, {"images": None}])
def test_something_else_than_an_override_is_not_read(change: dict[str, Any]) -> None:
    stored = ImageOverride(("ollama/ollama:2",), T0).stored()
    with pytest.raises((TypeError, ValueError)):
        override_from(stored | change)
