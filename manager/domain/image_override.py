"""An operator's choice of the image of one instance, instead of the image of its template."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.instance import InstanceSpec

# Roll-backs that are remembered; of more upgrades in a row the oldest are forgotten.
_MOST_IMAGES = 8


@dataclass(frozen=True, slots=True)
class ImageOverride:
    """The images of an instance's upgrades, the one in force last, and the time of the last change in UTC."""

    images: tuple[str, ...]
    since: datetime

    @property
    def image(self) -> str:
        return self.images[-1]

    def stored(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"images": list(self.images), "since": self.since.isoformat()}


@dataclass(frozen=True, slots=True)
class ImageInForce:
    """An override as it is shown; `previous` is the image that a roll-back returns to."""

    image: str
    previous: str
    since: datetime


def override_from(stored: Mapping[str, Any]) -> ImageOverride:
    """Return what `ImageOverride.stored` gave.

    Raises:
        LookupError, TypeError, ValueError: it is something else.
    """
    images = tuple(stored["images"])
    if not images or not all(isinstance(image, str) for image in images):
        raise TypeError(f"the images of an override are {images!r}")
    return ImageOverride(images, datetime.fromisoformat(stored["since"]))


def upgraded(override: ImageOverride | None, image: str, at: datetime) -> ImageOverride:
    """Return the override after an upgrade to `image`."""
    images = () if override is None else override.images
    return ImageOverride((*images, image)[-_MOST_IMAGES:], at)


def rolled_back(override: ImageOverride, at: datetime) -> ImageOverride | None:
    """Return the override after a roll-back; None where the template's image is in force again."""
    images = override.images[:-1]
    return ImageOverride(images, at) if images else None


def shown_override(override: ImageOverride | None, template_image: str) -> ImageInForce | None:
    """Return the override with the image that a roll-back returns to."""
    if override is None:
        return None
    previous = override.images[-2] if len(override.images) > 1 else template_image
    return ImageInForce(override.image, previous, override.since)


def with_image(spec: InstanceSpec, override: ImageOverride | None) -> InstanceSpec:
    """Return the specification with the image that is in force; the rest of the template stays."""
    if override is None or spec.template is None:
        return spec
    return replace(spec, template=spec.template.model_copy(update={"image": override.image}))
