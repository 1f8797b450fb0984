"""Settings of Docker Swarm: how its services are reached, and which of them the nodes give by themselves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from manager.domain.gpu_metrics import why_no_exporter_url
from manager.domain.swarm import normal_constraint
from manager.domain.template import Refusal
from manager.settings.section import Section, Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.domain.template import Template
    from manager.settings.model import InstanceSettings

# Docker's own rule for the names of networks (moby `daemon/names`), without the modes that look like one.
_NETWORK = re.compile(r"(?!(?:bridge|default|host|none|ingress)$)[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
# moby `api/genericresource`: a kind is a word without `=`.
_RESOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")

Constraint = Annotated[Text, AfterValidator(normal_constraint)]
Placement = Annotated[tuple[Constraint, ...], Field(max_length=16)]


def _network(name: str) -> str:
    if _NETWORK.fullmatch(name) is None:
        raise ValueError("expected the name of an overlay network, such as ollama-manager-swarm")
    return name


def _resource(kind: str) -> str:
    if _RESOURCE.fullmatch(kind) is None:
        raise ValueError("expected a kind of generic resource, such as NVIDIA-GPU")
    return kind


def _exporter(url: str) -> str:
    if (why := why_no_exporter_url(url)) is not None:
        raise ValueError(why)
    return url


class SwarmSettings(Section):
    """`instances` auto makes one for the CPU and one for each card of every other node, all of this one too.

    `reach` is the way to services: the overlay `network`, by name, or the address of their `host` and a fixed
    port. `resource` is the kind of generic resource that nodes advertise their cards as. `gpu_exporter` is
    the URL of the exporter of their memory, with `{node}` for the address of each node; None reads none.
    """

    reach: Literal["auto", "network", "host"] = "auto"
    network: Annotated[str, AfterValidator(_network)] = "ollama-manager-swarm"
    instances: Literal["none", "auto", "all"] = "none"
    resource: Annotated[str, AfterValidator(_resource)] = "NVIDIA-GPU"
    gpu_exporter: Annotated[str, AfterValidator(_exporter)] | None = None


def swarm_refusals(instance: InstanceSettings) -> Iterator[Refusal]:
    """Refusals of an instance of driver swarm."""
    if instance.template is None:
        yield Refusal(key=("template",), message="missing; an instance of driver swarm needs a template")
    if instance.url is not None:
        yield Refusal(key=("url",), message="only for driver external; the endpoint follows from the node")
    for device in instance.device or ():
        if not device.startswith(("GPU-", "MIG-")):
            allowed = (
                "the UUID of a card that a node advertises (GPU-… or MIG-…), or a list of those of one node"
            )
            yield Refusal(key=("device",), message=f"{device!r}; expected {allowed}")


def template_refusals(instance: InstanceSettings, template: Template) -> Iterator[tuple[str, str]]:
    """Yield what Swarm cannot do of a template, or must not: the key of the instance, and the message."""
    if template.device.value == "gpu" and instance.device is None:
        yield (
            "device",
            "missing; driver swarm needs the UUID of the card, as a node advertises it",
        )
    for volume in template.volumes:
        if volume.is_bind:
            text = (
                f"{instance.template!r} mounts the directory {volume.source}, which cannot be checked on "
                "another node; expected a template with named volumes for driver swarm"
            )
            yield "template", text
