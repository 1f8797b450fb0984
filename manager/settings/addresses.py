"""Addresses in the configuration: what is one, and who can reach it."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`; an unknown name is taken as open."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def engine_url(url: str) -> str:
    expected = "expected unix:///SOCKET, tcp://HOST:PORT, http://HOST:PORT or https://HOST:PORT"
    scheme, separator, rest = url.partition("://")
    if scheme == "unix" and separator and rest.startswith("/") and rest.strip("/"):
        return url
    if scheme not in {"tcp", "http", "https"} or not _has_host(url) or urlsplit(url).port is None:
        raise ValueError(expected)
    return url


def http_url(url: str) -> str:
    parts = urlsplit(url) if _has_host(url) else None
    if parts is None or parts.scheme not in {"http", "https"}:
        raise ValueError("expected http://HOST[:PORT] or https://HOST[:PORT]")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("expected a URL without credentials, query and fragment")
    return url.rstrip("/")


def _has_host(url: str) -> bool:
    # urlsplit drops line breaks and tabs silently.
    if re.search(r"[\s\x00-\x1f\x7f\\]", url):
        return False
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def listen_host(host: str) -> str:
    name = host.removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", name):
        raise ValueError("expected an address or a host name, without a port")
    if ":" in name:
        try:
            ipaddress.ip_address(name)
        except ValueError as error:
            raise ValueError("expected an address or a host name, without a port") from error
    return name


def without_credentials(text: str) -> str:
    """The text with what stands before the @ of an address left out, whatever characters that has."""
    return _CREDENTIALS.sub("…@", text)


def host_header(host: str) -> str:
    name = listen_host(host).lower()
    return f"[{name}]" if ":" in name else name
