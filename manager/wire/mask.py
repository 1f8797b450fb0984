"""Hides secrets in what a server sends back: some repeat the headers of a request in their errors. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

_HIDDEN = b"*"
# Shorter ones, such as `none`, are no secrets, and occur in any answer.
_LEAST_LENGTH = 16


class Mask:
    """Hides secrets in a stream, also where they are split; the number of bytes stays as it is.

    At most one byte less than the longest secret is held back.

    Args:
        secrets: ASCII texts; short ones are not hidden.
    """

    def __init__(self, secrets: Collection[bytes]) -> None:
        self._secrets = tuple(secret for secret in secrets if len(secret) >= _LEAST_LENGTH)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return what may be shown now."""
        if not self._secrets:
            return data
        data = self._hidden(self._held + data)
        held = max(_overlap(data, secret) for secret in self._secrets)
        self._held = data[len(data) - held :]
        return data[: len(data) - held]

    def end(self) -> bytes:
        """Return what was held back, once nothing follows."""
        held, self._held = self._held, b""
        return held

    def text(self, text: str) -> str:
        """Return a whole text with the secrets hidden."""
        for secret in self._secrets:
            text = text.replace(secret.decode(), _HIDDEN.decode() * len(secret))
        return text

    def _hidden(self, data: bytes) -> bytes:
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, _HIDDEN * len(secret))
        return data


def _overlap(data: bytes, secret: bytes) -> int:
    """Return how many bytes at the end of `data` may be the beginning of a secret."""
    at = len(data) - len(secret) + 1
    at = data.find(secret[:1], max(0, at))
    while at >= 0:
        if secret.startswith(data[at:]):
            return len(data) - at
        at = data.find(secret[:1], at + 1)
    return 0
