"""The part of `doctor` that asks the container engine and the NVIDIA driver."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manager.adapters.cgroups import ProcCgroups
from manager.adapters.owner import known_owner
from manager.cli.findings import Finding, broken, fine, skipped, warning
from manager.domain.gpu import (
    ALL,
    AUTO,
    Gpu,
    Holder,
    NamedCard,
    find_gpu,
    gib,
    held_by,
    why_not_together,
)
from manager.domain.orphans import find_orphans
from manager.domain.ownership import left_behind, owner_of
from manager.errors import EngineError, GpuQueryError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from manager.adapters.docker_engine import DockerEngine
    from manager.domain.instance import InstanceSpec
    from manager.domain.ownership import Owner
    from manager.services.ports import EngineInfo
    from manager.settings import Settings

_LONGEST_WAIT_S = 5.0
_NO_DRIVER = frozenset({"library_missing", "driver_not_loaded"})
# The ids of instances that cards get by themselves.
_OF_A_CARD = re.compile(r"gpu[0-9]+")
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Needs:
    """The demands of the configured instances on the engine and the cards.

    `instances` are those with containers. `finds_cards`: cards that are found have instances of their own.
    `uses_swarm`: there are services of Docker Swarm, or may be; `services` are those that are configured.
    """

    gpu_instances: tuple[str, ...] = ()
    selectors: tuple[tuple[str, tuple[str, ...]], ...] = ()
    images: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    finds_cards: bool = False
    uses_swarm: bool = False
    services: tuple[InstanceSpec, ...] = ()

    def engine_for(self, cards: tuple[Gpu, ...]) -> bool:
        """Return whether an instance needs the engine, also one that one of these cards gets."""
        return bool(self.instances or self.uses_swarm or (self.finds_cards and cards))


def read_cards() -> tuple[tuple[Gpu, ...], GpuQueryError | None]:
    """The cards, or why there are none to see."""
    from manager.adapters.nvml import Nvml  # noqa: PLC0415

    async def read() -> tuple[tuple[Gpu, ...], GpuQueryError | None]:
        reader = Nvml(timeout_s=_LONGEST_WAIT_S)
        try:
            return await reader.read(), None
        except GpuQueryError as error:
            return (), error
        finally:
            await reader.close()

    return asyncio.run(read())


def card_finding(cards: tuple[Gpu, ...], refused: GpuQueryError | None, needs: Needs) -> Finding:
    if refused is not None:
        return _refusal_finding(refused, ", ".join(needs.gpu_instances))
    lines = [f"{len(cards)} seen, driver {_driver_version()}"]
    for card in cards:
        lines.append(f"{card.index}: {card.name}, {_memory(card)}, {card.uuid}, {card.pci_bus_id}")
        if card.processes:
            lines.append(f"   held by {held_by(_holders(card))}")
    if lost := [card for card in cards if card.lost is not None]:
        whys = [(card.uuid, *str(card.lost).partition("; ")[::2]) for card in lost]
        lines += [f"{uuid} is lost: {why}" for uuid, why, _ in whys]
        return broken("GPUs", "\n".join(lines), "\n".join(dict.fromkeys(remedy for *_, remedy in whys)))
    missing = [
        f"{instance} wants {selector}, which is not there"
        for instance, selectors in needs.selectors
        for selector in selectors
        if selector not in (AUTO, ALL) and find_gpu(cards, selector) is None
    ]
    missing += [
        f"{instance} wants all cards, and there is none"
        for instance, selectors in needs.selectors
        if selectors == (ALL,) and not cards
    ]
    if missing:
        return broken("GPUs", "\n".join([*lines, *missing]), "correct its `device`, or put that card in")
    unfit = [
        f"{instance}: {why}"
        for instance, selectors in needs.selectors
        if (why := why_not_together(_named(selectors, cards))) is not None
    ]
    if unfit:
        return broken("GPUs", "\n".join([*lines, *unfit]), "correct its `device`")
    named = {
        found.uuid
        for _, selectors in needs.selectors
        for selector in selectors
        if (found := find_gpu(cards, selector))
    }
    explicit = {instance for instance, selectors in needs.selectors if selectors != (AUTO,)}
    automatic = [instance for instance in needs.gpu_instances if instance not in explicit]
    if len(automatic) > len(cards) - len(named):
        lines.append(f"{', '.join(automatic)} want a card each that no other instance names")
        return broken(
            "GPUs", "\n".join(lines), "name a card as `device` to share it, or take an instance out"
        )
    return fine("GPUs", "\n".join(lines))


def _named(selectors: tuple[str, ...], cards: tuple[Gpu, ...]) -> list[NamedCard]:
    if selectors == (ALL,):
        return [NamedCard(card.uuid, card.uuid) for card in cards]
    found = {selector: find_gpu(cards, selector) for selector in selectors}
    return [NamedCard(selector, gpu.uuid if gpu else None) for selector, gpu in found.items()]


def _refusal_finding(refused: GpuQueryError, wanted: str) -> Finding:
    message, _, remedy = refused.message.partition("; ")
    if wanted:
        return broken("GPUs", f"{message}, but {wanted} needs one", remedy)
    if refused.details.get("nvml") in _NO_DRIVER:
        return fine("GPUs", f"none usable ({message}); instances run on the CPU")
    return warning("GPUs", message, remedy)


def engine_findings(settings: Settings, needs: Needs, cards: tuple[Gpu, ...]) -> Iterator[Finding]:
    from manager.adapters.docker_engine import DockerEngine  # noqa: PLC0415

    async def collect() -> list[Finding]:
        engine = DockerEngine(settings.engine.url, min(settings.engine.timeout_s, _LONGEST_WAIT_S))
        try:
            return [finding async for finding in _engine(engine, settings, needs, cards)]
        finally:
            engine.close()

    yield from asyncio.run(collect())


async def _engine(
    engine: DockerEngine, settings: Settings, needs: Needs, cards: tuple[Gpu, ...]
) -> AsyncIterator[Finding]:
    try:
        info = await engine.info()
    except EngineError as error:
        if not needs.engine_for(cards):
            yield fine("engine", f"not needed: no instance has a container ({error.message})")
            return
        yield broken("engine", error.message, _engine_remedy(engine.url, error.message))
        for check in ("NVIDIA runtime", "images", "network", "containers"):
            yield skipped(check, "not looked at: the engine does not answer")
        return
    kind = " (Docker Desktop)" if info.desktop else " (rootless)" if info.rootless else ""
    yield fine("engine", f"{'Podman' if info.podman else 'Docker'} {info.version}{kind} at {engine.url}")
    yield runtime_finding(info, needs, cards)
    for image in needs.images:
        yield await _image(engine, image)
    for network in needs.networks:
        yield await _network(engine, network)
    yield await _containers(engine, settings.manager_id, needs, known_owner(settings.state.dir))


def _engine_remedy(url: str, message: str) -> str:
    lowered = message.lower()
    if "permission denied" in lowered:
        return "add the user to the group that owns the socket: usermod -aG docker USER, then log in again"
    if url.startswith("unix://") and ("no such file" in lowered or "refused" in lowered):
        unit = "podman.socket" if "podman" in url else "docker"
        return f"start it (`systemctl start {unit}`), install it, or set DOCKER_HOST or engine.url"
    return "check DOCKER_HOST or engine.url, and that the engine runs"


def runtime_finding(info: EngineInfo, needs: Needs, cards: tuple[Gpu, ...]) -> Finding:
    """Whether the engine can give cards to containers, as far as it says so."""
    if not info.podman and any("nvidia" in runtime for runtime in info.runtimes):
        return fine("NVIDIA runtime", "the engine has it")
    if not cards and not needs.gpu_instances:
        return fine("NVIDIA runtime", "not needed: there is no GPU to use")
    if not info.gives_cards:
        return (broken if needs.gpu_instances else warning)(
            "NVIDIA runtime",
            f"the Docker-compatible API of Podman {info.version} gives no GPU to containers",
            "install Podman 5.4 or newer, or use Docker",
        )
    if info.podman:
        return warning(
            "NVIDIA runtime",
            "Podman gives GPUs by CDI; whether there is a specification is not visible from here",
            "`nvidia-ctk cdi list` must name each card by its UUID: "
            "`nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml`",
        )
    return warning(
        "NVIDIA runtime",
        "the engine names none; it may still give GPUs to containers by a hook or by CDI",
        "install the NVIDIA container toolkit, then `nvidia-ctk runtime configure` and restart the engine",
    )


async def _image(engine: DockerEngine, image: str) -> Finding:
    try:
        present = await engine.has_image(image)
    except EngineError as error:
        return broken("image", f"{image}: {error.message}", "look at the engine's log")
    if present:
        return fine("image", image)
    return warning("image", f"{image} is missing", f"docker pull {image}, or `ollama-manager up`")


async def _network(engine: DockerEngine, name: str) -> Finding:
    try:
        found = await engine.has_network(name)
    except EngineError as error:
        return broken("network", f"{name}: {error.message}", "look at the engine's log")
    return fine("network", name if found else f"{name}, made by the first start")


async def _containers(
    engine: DockerEngine, manager_id: str, needs: Needs, owner: Owner | None = None
) -> Finding:
    """Judge the containers of a manager id; `owner` is that of the state directory, if it has one."""
    former = owner.manager_id if owner else None
    try:
        listed = await engine.list_containers(manager_id)
        of_former = await engine.list_containers(former) if former not in (None, manager_id) else ()
    except EngineError as error:
        return broken("containers", error.message, "look at the engine's log")
    if owner is not None and (wrong := left_behind(owner, manager_id, of_former)) is not None:
        return broken("containers", *wrong)

    def is_configured(instance: str) -> bool:
        return instance in needs.instances or (
            needs.finds_cards and _OF_A_CARD.fullmatch(instance) is not None
        )

    others = [one for one in listed if not (owner.owns(one) if owner else owner_of(one) is None)]
    if others:
        names = ", ".join(one.name for one in others)
        return broken(
            "containers",
            f"belong to another state directory with manager_id {manager_id!r}: {names}",
            "set another manager_id; if that directory was lost, run `ollama-manager serve --take-over`",
        )
    orphans = find_orphans(listed, manager_id=manager_id, is_configured=is_configured)
    if not orphans:
        return fine("containers", f"{len(listed)} of manager {manager_id!r}, each of an instance")
    lines = [f"{one.name} ({'running' if one.is_running else 'ended'}): {one.why}" for one in orphans]
    remedy = f"nothing watches them; `{'`, `'.join(one.remedy for one in orphans)}` removes them"
    return warning("containers", "\n".join(lines), remedy)


def _memory(card: Gpu) -> str:
    if card.vram_total_bytes is None:
        return "memory unknown"
    if card.vram_free_bytes is None:
        return gib(card.vram_total_bytes)
    return f"{gib(card.vram_free_bytes)} of {gib(card.vram_total_bytes)} free"


def _holders(card: Gpu) -> list[Holder]:
    names = ProcCgroups()
    return [Holder(it.pid, names.name_of(it.pid), None, it.used_bytes) for it in card.processes]


def _driver_version() -> str:
    try:
        text = _DRIVER_VERSION.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else "unknown"
