"""Settings of TLS: of the listener, and towards servers that somebody else runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, model_validator

from manager.domain.template import Refusal
from manager.settings.section import Section, refuse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("expected a path")
    return value


_File = Annotated[Path, BeforeValidator(_not_empty)]


class _Pair(Section):
    """A certificate and its key: both or neither."""

    certificate: _File | None = None
    key: _File | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if self.certificate is None and self.key is not None:
            refuse([Refusal(key=("certificate",), message="missing beside key; expected both or neither")])
        if self.key is None and self.certificate is not None:
            refuse([Refusal(key=("key",), message="missing beside certificate; expected both or neither")])
        return self

    @property
    def files(self) -> tuple[Path, Path] | None:
        """Certificate and key."""
        if self.certificate is None or self.key is None:
            return None
        return self.certificate, self.key


class ListenerTlsSettings(_Pair):
    """The listener speaks TLS if both files are set, plain HTTP otherwise."""


class ClientTlsSettings(_Pair):
    """The authorities that sign a server's certificate, and the certificate that this daemon shows there."""

    ca: _File | None = None


def client_tls_refusals(
    url: str | None, tls: ClientTlsSettings | None, *, has_container: bool
) -> Iterator[Refusal]:
    """Refusals of `tls` of one instance."""
    if tls is None:
        return
    if has_container:
        yield Refusal(key=("tls",), message="only for servers that somebody else runs (driver external)")
    elif url is not None and urlsplit(url).scheme != "https":
        yield Refusal(key=("tls",), message=f"only for a url with https://; the url is {url}")
    elif tls.ca is None and tls.files is None:
        yield Refusal(key=("tls",), message="says nothing; expected ca, or certificate and key, or all three")


def unequal_tls_refusals(instances: Mapping[str, Any]) -> Iterator[Refusal]:
    """Refusals of instances at one server that differ in `tls`: connections there are shared."""
    first: dict[str, tuple[str, ClientTlsSettings | None]] = {}
    for id_, instance in instances.items():
        if instance.url is None or not instance.url.startswith("https:"):
            continue
        other, tls = first.setdefault(origin_of(instance.url), (id_, instance.tls))
        if tls != instance.tls:
            message = f"differs from that of {other}, which is at the same server; expected the same"
            yield Refusal(key=("instances", id_, "tls"), message=message)


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
