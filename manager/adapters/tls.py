"""TLS contexts: the one that all clients of the process share, and those made of configured files."""

from __future__ import annotations

import asyncio
import ssl
import stat
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from manager.adapters.certificates import expiry, first_certificate
from manager.descriptors import has_descriptors
from manager.errors import ConfigurationError, OutOfDescriptorsError
from manager.settings.ownership import open_regular
from manager.settings.problems import Problem, configuration_error
from manager.settings.signatures import signature
from manager.settings.tls import origin_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from manager.settings import Settings
    from manager.settings.tls import ClientTlsSettings

_log = structlog.get_logger("tls")

# So often files are looked at, as the key file is.
_CHECK_S = 2.0
# A certificate that ends sooner is warned of, once a day.
WARN_DAYS = 30
_DAY_S = 86_400.0
_LARGEST_FILE = 2**20
_ALPN = ["http/1.1"]


class SharedTls:
    """A client context, built in a thread at its first use: to read the authorities takes 40 to 70 ms.

    Args:
        cafile: the authorities to trust; the system's by default.
    """

    def __init__(self, cafile: str | Path | None = None) -> None:
        self._cafile = cafile
        self._context: ssl.SSLContext | None = None
        self._building = asyncio.Lock()

    async def context(self) -> ssl.SSLContext:
        """Return the context; concurrent first uses build one.

        Raises:
            OSError: the authorities cannot be read.
            OutOfDescriptorsError: the process lacks the descriptor that reading them takes.
        """
        if self._context is None:
            async with self._building:
                if self._context is None:
                    self._context = await asyncio.to_thread(self._build)
        return self._context

    def _build(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._cafile)
        # OpenSSL skips a default store that it cannot open. Such a context trusts nobody: do not keep it.
        if not context.cert_store_stats()["x509_ca"] and not has_descriptors():
            raise OutOfDescriptorsError
        return context


class WatchedTls:
    """A context made of files, built again when they change. Broken new files keep the old context.

    Construction reads the files: call it in a thread.

    Args:
        setting: the section of the files, for messages.
        build: makes the context.
        files: all files that it reads.
        certificate: the one of them whose end is warned of, None without one.

    Raises:
        ConfigurationError: a file cannot be used; the message names it.
    """

    def __init__(
        self,
        setting: str,
        build: Callable[[], ssl.SSLContext],
        files: Sequence[Path],
        certificate: Path | None,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting = setting
        self._build = build
        self._files = tuple(files)
        self._certificate = certificate
        self._now = now
        self._checking = asyncio.Lock()
        self._seen = signature(self._files)
        self.current = build()
        self._checked_at = now()
        self._warned_at: float | None = None

    async def context(self) -> ssl.SSLContext:
        """Return the context of the files as they are, give or take two seconds."""
        if self._now() - self._checked_at >= _CHECK_S and not self._checking.locked():
            await self.check()
        return self.current

    async def run(self) -> None:
        """Look at the files every two seconds until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(_CHECK_S)

    async def check(self) -> None:
        """Build the context again if a file has changed."""
        async with self._checking:
            self._checked_at = self._now()
            seen = await asyncio.to_thread(signature, self._files)
            if seen != self._seen:
                self._seen = seen  # files that are wrong are reported once
                await self._rebuild()
            if self._warned_at is None or self._now() - self._warned_at >= _DAY_S:
                self._warned_at = self._now()
                await self._warn_of_the_end()

    async def _rebuild(self) -> None:
        try:
            self.current = await asyncio.to_thread(self._build)
        except ConfigurationError as error:
            _log.error("tls_files_refused", problem=error.message, hint="the files read before are used on")
        else:
            self._warned_at = None
            _log.info("tls_files_reread", setting=self._setting)

    async def _warn_of_the_end(self) -> None:
        if self._certificate is None:
            return
        days = await asyncio.to_thread(days_left, self._certificate)
        if days is not None and days < WARN_DAYS:
            _log.warning("certificate_expires", file=str(self._certificate), days_left=days)


def listener_tls(certificate: Path, key: Path) -> WatchedTls:
    """Return the context of the listener.

    Raises:
        ConfigurationError: a file cannot be used.
    """

    def build() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(_ALPN)
        _load_pair(context, "server.tls", certificate, key)
        return context

    return WatchedTls("server.tls", build, (certificate, key), certificate)


def client_tls(setting: str, wanted: ClientTlsSettings) -> WatchedTls:
    """Return the context for one server. The name in its certificate is always verified.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    pair = wanted.files

    def build() -> ssl.SSLContext:
        ca = wanted.ca
        context = ssl.create_default_context() if ca is None else _trusting(f"{setting}.ca", ca)
        context.set_alpn_protocols(_ALPN)
        if pair is not None:
            _load_pair(context, setting, *pair)
        return context

    files = [file for file in (wanted.ca, *(pair or ())) if file is not None]
    return WatchedTls(setting, build, files, None if pair is None else pair[0])


def own_tls_of(settings: Settings) -> dict[str, Callable[[], Awaitable[ssl.SSLContext]]]:
    """Return what gives the context of each server that has its own, by scheme, host and port.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    return {
        origin_of(instance.url): client_tls(f"instances.{id_}.tls", instance.tls).context
        for id_, instance in settings.instances.items()
        if instance.tls is not None and instance.url is not None
    }


def listener_tls_of(settings: Settings) -> WatchedTls | None:
    """Return the context of the listener, None where it speaks plain HTTP.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    files = settings.server.tls.files
    return None if files is None else listener_tls(*files)


def days_left(certificate: Path) -> int | None:
    """Whole days until a certificate ends, negative afterwards; None where that cannot be read."""
    try:
        ends = expiry(certificate.read_bytes())
    except OSError:
        return None
    return None if ends is None else (ends - datetime.now(UTC)).days


def _trusting(setting: str, file: Path) -> ssl.SSLContext:
    authorities = _read(setting, file)
    refused = _refused(setting, file, "expected certificates of authorities in PEM form")
    if first_certificate(authorities) is None:
        raise refused  # without any, the context would trust what the system trusts
    try:
        return ssl.create_default_context(cadata=authorities.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise refused from error


def _load_pair(context: ssl.SSLContext, setting: str, certificate: Path, key: Path) -> None:
    if expiry(_read(f"{setting}.certificate", certificate)) is None:
        raise _refused(f"{setting}.certificate", certificate, "expected a certificate in PEM form")
    _read(f"{setting}.key", key, secret=True)

    def no_password() -> str:
        raise _refused(f"{setting}.key", key, "is encrypted; expected a key without a passphrase")

    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            why = f"does not belong to the certificate {certificate}"
        else:
            why = f"expected a private key in PEM form ({error.reason or 'unreadable'})"
        raise _refused(f"{setting}.key", key, why) from error
    except OSError as error:
        raise _refused(f"{setting}.key", key, f"{error.strerror}; expected a readable file") from error


def _read(setting: str, file: Path, *, secret: bool = False) -> bytes:
    try:
        with open(open_regular(file), "rb") as stream:  # noqa: PTH123
            raw = stream.read(_LARGEST_FILE)
            mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a path"
        why = "not a regular file" if isinstance(error, IsADirectoryError) else why
        raise _refused(setting, file, f"{why}; expected a readable file") from error
    if secret and mode & (stat.S_IROTH | stat.S_IWOTH):
        raise _refused(setting, file, f"open to every user of this machine; close it with chmod o= {file}")
    return raw


def _refused(setting: str, file: Path, text: str) -> ConfigurationError:
    return configuration_error([Problem(str(file), setting, text)])
