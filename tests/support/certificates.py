"""Certificates of an authority of the tests, made by openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates; `certificate` is its own."""

    def __init__(self, home: Path, name: str = "authority") -> None:
        home.mkdir(exist_ok=True)
        self._home = home
        self.certificate, self._key = home / f"{name}.pem", home / f"{name}.key"
        _openssl(
            *("req", "-x509", *_CURVE, "-days", "3650", "-subj", f"/CN={name}"),
            *("-keyout", str(self._key), "-out", str(self.certificate)),
        )

    def sign(self, name: str, *, names: str = "DNS:localhost,IP:127.0.0.1", days: int = 365) -> Pair:
        """Sign a certificate for these names; its files are called `name`."""
        pair = Pair(self._home / f"{name}.pem", self._home / f"{name}.key")
        request, extensions = self._home / f"{name}.csr", self._home / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n")
        _openssl(
            *("req", "-new", *_CURVE, "-subj", f"/CN={name}"),
            *("-keyout", str(pair.key), "-out", str(request)),
        )
        _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self._key)),
            *("-CAcreateserial", "-days", str(days), "-extfile", str(extensions)),
            *("-out", str(pair.certificate)),
        )
        return pair


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
