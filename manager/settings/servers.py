"""The settings of servers that somebody else runs, and of the use of paid ones."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, create_model

from manager.domain.money import DEFAULT_MAX_OUTPUT_TOKENS, MICRO_PER_USD, Price
from manager.domain.paid import Offer, offer
from manager.domain.roles import Fallback, RequestKind
from manager.domain.target import Protocol
from manager.domain.template import Refusal
from manager.settings.section import InstanceId, Number, Section, WholeNumber

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_IN_A_MODEL = re.compile(r"[\s\x00-\x1f\x7f]")
_VERSION = re.compile(r"/v[0-9][a-z0-9]*$")
MOST_MODELS = 1000
# The kinds of requests that servers of each protocol take. A transcription is not paid for by tokens.
_KINDS_OF_CLOUD: Mapping[Protocol, frozenset[RequestKind]] = {
    Protocol.OPENAI: frozenset({RequestKind.GENERATE, RequestKind.EMBED}),
    Protocol.ANTHROPIC: frozenset({RequestKind.GENERATE}),
}


def _variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError("expected the name of an environment variable, not a key")
    return name


def _model(name: str) -> str:
    if _NOT_IN_A_MODEL.search(name):
        raise ValueError("expected the name of a model, without spaces")
    return name


def _names_alone(value: object) -> object:
    """A list of names is a mapping without values."""
    return {name: {} for name in value} if isinstance(value, list | tuple) else value


EnvName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_variable)]
ServedName = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_model)]
UsdPerMtok = Annotated[Number, Field(ge=0, le=1_000_000)]


class _ServedModel(Section):
    """One model of a server. Prices are US dollars for a million tokens."""

    input_usd_per_mtok: UsdPerMtok | None = None
    output_usd_per_mtok: UsdPerMtok | None = None
    max_output_tokens: Annotated[WholeNumber, Field(ge=1, le=100_000_000)] | None = None

    @property
    def stands_in_for(self) -> tuple[str, ...]:
        """The roles and models that it answers for: the value of `for`, which Python has as a keyword."""
        names: tuple[str, ...] = getattr(self, "for")
        return names


if TYPE_CHECKING:
    ServedModelSettings = _ServedModel
else:
    _StandsIn = Annotated[tuple[ServedName, ...], Field(max_length=MOST_MODELS)]
    ServedModelSettings = create_model(
        "ServedModelSettings", __base__=_ServedModel, __module__=__name__, **{"for": (_StandsIn, ())}
    )

ServedModels = Annotated[
    dict[ServedName, ServedModelSettings], Field(max_length=MOST_MODELS), BeforeValidator(_names_alone)
]


class FallbackSettings(Section):
    """The use of paid servers; `order` empty means all of them, as they are configured."""

    enabled: StrictBool = False
    force_local: StrictBool = False
    order: Annotated[tuple[InstanceId, ...], Field(max_length=64)] = ()


def to_fallback(settings: FallbackSettings) -> Fallback:
    return Fallback(settings.enabled, settings.force_local, settings.order)


def order_refusals(fallback: FallbackSettings, paid: Mapping[str, bool]) -> Iterator[Refusal]:
    """Yield the problems of `fallback.order`, with keys relative to `fallback`.

    Args:
        fallback: the section.
        paid: for every instance whether it costs money.
    """
    allowed = ", ".join(name for name, costs in paid.items() if costs) or "nothing: there is no such instance"
    for place, name in enumerate(fallback.order):
        if name not in paid:
            yield Refusal(
                key=("order", place),
                message=f"{name!r} is no instance; expected those of driver cloud: {allowed}",
            )
        elif not paid[name]:
            yield Refusal(
                key=("order", place), message=f"{name!r} is no instance of driver cloud; expected {allowed}"
            )
        elif name in fallback.order[:place]:
            yield Refusal(
                key=("order", place), message=f"{name!r} is listed twice; expected each instance once"
            )


def cloud_refusals(
    protocol: Protocol | None, models: Mapping[str, ServedModelSettings] | None
) -> Iterator[Refusal]:
    """Yield the problems of a cloud instance's protocol and models, with keys relative to the instance."""
    if protocol not in _KINDS_OF_CLOUD:
        given = "missing" if protocol is None else f"{protocol.value!r}"
        yield Refusal(
            key=("protocol",), message=f"{given}; expected {' or '.join(_KINDS_OF_CLOUD)} for driver cloud"
        )
    if not models:
        yield Refusal(key=("models",), message="missing; driver cloud needs the models that may be asked for")
    for name, one in (models or {}).items():
        for key in ("input_usd_per_mtok", "output_usd_per_mtok"):
            if getattr(one, key) is None:
                message = "missing; a model without a price is never asked: expected US dollars, 0 or more"
                yield Refusal(key=("models", name, key), message=message)
        if not one.stands_in_for:
            message = "missing; expected the roles and models that it answers for"
            yield Refusal(key=("models", name, "for"), message=message)


def external_model_refusals(
    protocol: Protocol | None, models: Mapping[str, ServedModelSettings] | None
) -> Iterator[Refusal]:
    """Yield the problems of an external instance's protocol and models, with keys relative to it."""
    if protocol is Protocol.ANTHROPIC:
        yield Refusal(key=("protocol",), message="'anthropic'; expected ollama or openai for driver external")
    if models is None:
        return
    if protocol is not Protocol.OPENAI:
        yield Refusal(key=("models",), message="only for protocol openai; an Ollama lists its models itself")
    for name, one in models.items():
        for key in sorted(key for key, value in one if value not in (None, ())):
            yield Refusal(
                key=("models", name, key), message="only for driver cloud; expected the names of models alone"
            )


def price_of(model: ServedModelSettings) -> Price:
    """Return the price of a model of a cloud instance; fractions of a micro-dollar are rounded up."""
    return Price(
        _micro(model.input_usd_per_mtok or 0.0),
        _micro(model.output_usd_per_mtok or 0.0),
        model.max_output_tokens or DEFAULT_MAX_OUTPUT_TOKENS,
    )


def offers_of(models: Mapping[str, ServedModelSettings]) -> tuple[Offer, ...]:
    return tuple(offer(name, one.stands_in_for) for name, one in models.items())


def kinds_of_cloud(protocol: Protocol) -> frozenset[RequestKind]:
    """Return what a paid server of a protocol can be asked for."""
    return _KINDS_OF_CLOUD[protocol]


def base_url(url: str, protocol: Protocol) -> str:
    """Return the address that stands before the paths of a server's API, such as `/chat/completions`.

    Clients of OpenAI end it with a version, `…/v1`; a bare address means that one. Clients of Anthropic leave
    the version out.
    """
    if protocol is Protocol.OLLAMA:
        return url
    if protocol is Protocol.ANTHROPIC:
        return url if _VERSION.search(urlsplit(url).path) else f"{url}/v1"
    return url if urlsplit(url).path.strip("/") else f"{url}/v1"


def _micro(usd: float) -> int:
    return int((Decimal(str(usd)) * MICRO_PER_USD).to_integral_value(ROUND_CEILING))
