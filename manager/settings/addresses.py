"""Addresses in the configuration: what is one, and who can reach it."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import parse_qsl, urlsplit

# The password of a database may have any characters, also those that end a host name.
_CREDENTIALS = re.compile(r"(?:(?<=postgresql://)|(?<=postgres://))\S*@|(?<=://)[^/\s]*@")
_PASSWORD = re.compile(r"(?<=[?&])((?:ssl)?password)=[^&\s]*", re.IGNORECASE)
_POSTGRESQL = "postgresql://[USER@]HOST[:PORT]/DATABASE[?KEY=VALUE…]"
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS: those that say where the
# database is and who asks. What decides how long a call takes is set by the program.
_POSTGRESQL_KEYS = (
    "channel_binding",
    "gssencmode",
    "host",
    "hostaddr",
    "krbsrvname",
    "passfile",
    "password",
    "port",
    "require_auth",
    "service",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslpassword",
    "sslrootcert",
    "target_session_attrs",
    "user",
)
_POSTGRESQL_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._%-]*)(?::[0-9]{1,5})?")


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


def postgresql_url(url: str) -> str:
    """Return the address of a database in PostgreSQL; hosts of a cluster are separated by commas.

    Raises:
        ValueError: it is none; the message shows nothing of it.
    """
    scheme, separator, rest = url.partition("://")
    if scheme not in {"postgresql", "postgres"} or not separator or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError(f"expected {_POSTGRESQL}")
    place, _, query = rest.partition("?")
    who, _, where = place.rpartition("@")
    hosts, _, database = where.partition("/")
    if not database or "/" in database or "#" in rest:
        raise ValueError(f"expected {_POSTGRESQL}, with the name of a database")
    if re.search(r"[/@]", who) or not all(map(_POSTGRESQL_HOST.fullmatch, hosts.split(","))):
        raise ValueError(f"expected {_POSTGRESQL}; a / or @ in a password is written %2F or %40")
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise ValueError(f"expected {_POSTGRESQL}") from error
    unknown = sorted({key for key, _ in given} - set(_POSTGRESQL_KEYS))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} after the ?; allowed: {', '.join(_POSTGRESQL_KEYS)}")
    return url


def without_password(url: str) -> str:
    """Return the address of a database with … in place of its passwords."""
    head, separator, rest = url.partition("://")
    place, question, query = rest.partition("?")
    who, at, where = place.rpartition("@")
    user, colon, _ = who.partition(":")
    who = f"{user}:…" if colon else user
    return _PASSWORD.sub(r"\1=…", f"{head}{separator}{who}{at}{where}{question}{query}")


def without_credentials(text: str) -> str:
    """The text with passwords, and what stands before the @ of an address, left out, whatever they have."""
    return _PASSWORD.sub(r"\1=…", _CREDENTIALS.sub("…@", text))


def host_header(host: str) -> str:
    name = listen_host(host).lower()
    return f"[{name}]" if ":" in name else name
