"""The end of a certificate. Python's ssl tells it only of a peer that it has verified."""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime

_FIRST = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSION = 0xA0
_UTC_TIME = 0x17
_LONG = 0x80


def first_certificate(pem: bytes) -> str | None:
    """Return the first certificate of a file in PEM form: a chain begins with the server's own."""
    found = _FIRST.search(pem)
    return None if found is None else found[0].decode("ascii", "replace")


def expiry(pem: bytes) -> datetime | None:
    """Return when the first certificate of a file in PEM form ends; None where that cannot be read."""
    first = first_certificate(pem)
    if first is None:
        return None
    try:
        return _not_after(ssl.PEM_cert_to_DER_cert(first))
    except (ValueError, IndexError):
        return None


def _not_after(der: bytes) -> datetime:
    """Return `notAfter`, as RFC 5280 section 4.1 places it."""
    _, certificate, _ = _element(der, 0)
    _, at, _ = _element(der, certificate)
    tag, _, end = _element(der, at)
    if tag == _VERSION:
        at = end
    for _ in ("serialNumber", "signature", "issuer"):
        _, _, at = _element(der, at)
    _, not_before, _ = _element(der, at)
    _, _, at = _element(der, not_before)
    tag, start, end = _element(der, at)
    form = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(der[start:end].decode("ascii"), form).replace(tzinfo=UTC)


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return tag, begin and end of the content of the element at an offset."""
    tag, length, start = der[at], der[at + 1], at + 2
    if length & _LONG:
        size = length & ~_LONG
        length = int.from_bytes(der[start : start + size], "big")
        start += size
    return tag, start, start + length
