"""Addresses of servers."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Address:
    """A server's address. `prefix` precedes every path, `host` is the value of the Host header."""

    name: str
    port: int
    tls: bool
    prefix: bytes
    host: bytes

    @property
    def origin(self) -> str:
        """Scheme, host and port, as the URL has them."""
        return f"{'https' if self.tls else 'http'}://{self.host.decode()}"

    @classmethod
    def of(cls, endpoint: str) -> Address:
        parts = urlsplit(endpoint)
        tls = parts.scheme == "https"
        return cls(
            name=parts.hostname or "",
            port=parts.port or (443 if tls else 80),
            tls=tls,
            prefix=parts.path.rstrip("/").encode(),
            host=parts.netloc.encode(),
        )
