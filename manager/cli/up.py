"""`up`: prepares the engine, the images and the volumes that the configuration needs."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manager.cli import machine
from manager.cli.doctor_engine import read_cards
from manager.cli.failures import MISUSED, CommandError
from manager.settings import load_templates, resolve_instances
from manager.settings.model import GPU_TEMPLATE

if TYPE_CHECKING:
    from manager.adapters.docker_engine import DockerEngine
    from manager.settings import LoadedSettings

# A registry that cannot be reached may never answer: a pull without progress for so long is given up.
NO_PROGRESS_S = 20.0
_SHOW_EVERY_S = 1.0
# Only root starts an engine.
_LOG_DIR = Path("/var/log")


class ImagesMissingError(CommandError):
    """Images are missing and cannot be pulled.

    Args:
        troubles: by image, why it cannot be pulled.
    """

    def __init__(self, troubles: dict[str, str]) -> None:
        super().__init__(
            f"{'an image' if len(troubles) == 1 else f'{len(troubles)} images'} cannot be pulled",
            lines=[why if image in why else f"{image}: {why}" for image, why in troubles.items()],
            next_step="check the way to the registry, or `docker load` the image; then try again",
        )
        self.troubles = troubles


@dataclass(frozen=True, slots=True)
class Needed:
    """The images and named volumes of all instances, each once."""

    images: tuple[str, ...]
    volumes: tuple[str, ...]


def needed(loaded: LoadedSettings) -> Needed:
    """Return what the configured instances need, and with `gpus: auto` the ones that each card would get.

    Nothing is needed where no instance has a container, and no card is there to get one.

    Raises:
        ConfigurationError: the templates or the instances cannot be used.
    """
    templates = load_templates(loaded.settings)
    used = [spec.template for spec in resolve_instances(loaded, templates) if spec.template is not None]
    if loaded.settings.gpus == "auto" and GPU_TEMPLATE in templates and (used or read_cards()[0]):
        used.append(templates[GPU_TEMPLATE])
    volumes = (volume.source for template in used for volume in template.volumes if not volume.is_bind)
    images = (template.image for template in used)
    return Needed(tuple(dict.fromkeys(images)), tuple(dict.fromkeys(volumes)))


def prepare(loaded: LoadedSettings, *, yes: bool) -> None:
    """Have the engine run, the images in it, and the volumes; ask before anything is changed.

    Args:
        loaded: the configuration.
        yes: do not ask.

    Raises:
        ConfigurationError: the configuration cannot be used.
        ImagesMissingError: an image cannot be had; everything else is prepared.
        CommandError: something else cannot be done, nobody can be asked, or the answer was no.
    """
    need, settings = needed(loaded), loaded.settings
    if not need.images:
        return
    trouble = machine.why_no_engine(settings.engine.url)
    steps = list(machine.how_to_start(settings.engine.url, trouble)) if trouble is not None else []
    lacks = need if trouble is not None else asyncio.run(_lacking(settings.engine.url, need))
    there = "" if trouble is None else ", unless it is there"
    steps += [f"pull the image {image}{there}" for image in lacks.images]
    steps += [f"create the volume {volume} for models{there}" for volume in lacks.volumes]
    if not steps:
        return
    _ask(steps, yes=yes)
    if trouble is not None:
        machine.start_engine(settings.engine.url, _LOG_DIR)
        lacks = asyncio.run(_lacking(settings.engine.url, need))
    asyncio.run(_provide(settings.engine.url, lacks))


def _ask(steps: list[str], *, yes: bool) -> None:
    click.echo("ollama-manager up is going to:", err=True)
    for step in steps:
        click.echo(f"  - {step}", err=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(
            "up asks before it changes anything, and there is no terminal to ask on",
            exit_code=MISUSED,
            next_step="give --yes to agree",
        )
    if not click.confirm("Go on?", default=True, err=True):
        raise CommandError("nothing was changed")


async def _lacking(url: str, need: Needed) -> Needed:
    engine = _engine(url)
    try:
        images = [image for image in need.images if not await engine.has_image(image)]
        volumes = [volume for volume in need.volumes if not await engine.has_volume(volume)]
    finally:
        engine.close()
    return Needed(tuple(images), tuple(volumes))


async def _provide(url: str, lacks: Needed) -> None:
    engine = _engine(url)
    troubles: dict[str, str] = {}
    try:
        for volume in lacks.volumes:
            await engine.ensure_volume(volume)
        for image in lacks.images:
            why = await pull(engine, image)
            if why is not None:
                troubles[image] = why
    finally:
        engine.close()
    if troubles:
        raise ImagesMissingError(troubles)


async def pull(engine: DockerEngine, image: str) -> str | None:
    """Pull an image and show the progress; return why it cannot be had, None when it is there."""
    from manager.errors import EngineError  # noqa: PLC0415

    click.echo(f"pulling {image} ...", err=True)
    layers: dict[str, tuple[int, int]] = {}
    shown_at = time.monotonic()
    lines = engine.pull(image)
    try:
        while True:
            async with asyncio.timeout(NO_PROGRESS_S):
                line = await anext(lines, None)
            if line is None:
                break
            if line.layer is not None and line.current_bytes is not None and line.total_bytes:
                layers[line.layer] = (line.current_bytes, line.total_bytes)
            if layers and time.monotonic() - shown_at >= _SHOW_EVERY_S:
                done, total = (sum(column) for column in zip(*layers.values(), strict=True))
                click.echo(f"  {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB", err=True)
                shown_at = time.monotonic()
    except TimeoutError:
        return f"no progress for {NO_PROGRESS_S:g} s"
    except EngineError as error:
        return error.message
    return None if await engine.has_image(image) else "the pull ended early"


def _engine(url: str) -> DockerEngine:
    from manager.adapters.docker_engine import DockerEngine  # noqa: PLC0415

    return DockerEngine(url, 30.0)
