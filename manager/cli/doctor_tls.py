"""Findings of `doctor` about certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.cli.findings import broken, fine, warning
from manager.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from manager.cli.findings import Finding
    from manager.settings import Settings


def tls_findings(settings: Settings) -> Iterator[Finding]:
    """One finding for the listener, if it speaks TLS, and one for each server with files of its own."""
    from manager.adapters.tls import client_tls, listener_tls  # noqa: PLC0415  (imports ssl and asyncio)

    files = settings.server.tls.files
    if files is not None:
        try:
            listener_tls(*files)
        except ConfigurationError as error:
            yield broken(
                "tls", error.message, "correct server.tls; a running daemon uses the files read before"
            )
        else:
            yield _ends("tls", files[0])
    for id_, instance in settings.instances.items():
        if instance.tls is None:
            continue
        try:
            client_tls(f"instances.{id_}.tls", instance.tls)
        except ConfigurationError as error:
            yield broken(f"tls of {id_}", error.message, f"correct instances.{id_}.tls")
        else:
            if instance.tls.certificate is not None:
                yield _ends(f"tls of {id_}", instance.tls.certificate)


def _ends(check: str, certificate: Path) -> Finding:
    from manager.adapters.tls import WARN_DAYS, days_left  # noqa: PLC0415

    days = days_left(certificate)
    if days is None or days >= WARN_DAYS:
        return fine(check, f"{certificate}, valid for {days} days")
    remedy = "renew it: new files are read while the daemon runs"
    if days < 0:
        return broken(check, f"{certificate} has ended {-days} days ago", remedy)
    return warning(check, f"{certificate} ends in {days} days", remedy)
