"""Names in Host headers and in URLs of pages: which of them mean this machine."""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(
    r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?(?::[0-9]{1,5})?", re.IGNORECASE | re.ASCII
)
# No resolver of the public DNS serves names below these (RFC 6761, RFC 6762, ICANN's `internal`).
_LOCAL_DOMAINS = (".localhost", ".local", ".internal")


def host_name(host: str) -> str | None:
    """Return the name in `NAME[:PORT]` in lower case, IPv6 in brackets; None where it is malformed."""
    match = _HOST.fullmatch(host)
    return match["name"].lower() if match else None


def is_fixed(name: str) -> bool:
    """Whether no name server has a say in what a name means: an address, or a name of the loopback.

    Args:
        name: as `host_name` returns it.
    """
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        if name.startswith("["):
            ipaddress.IPv6Address(name[1:-1])
        else:
            ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True


def is_local(name: str) -> bool:
    """Whether a name cannot come from the public DNS, so that no page out there can rebind it.

    The list is that of Ollama 0.33 (`server/routes.go`, allowedHost), but for addresses: all of them are
    in, since rebinding needs a name.
    """
    return is_fixed(name) or name.endswith(_LOCAL_DOMAINS)
