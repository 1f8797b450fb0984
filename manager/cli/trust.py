"""The trust of the command line in the certificate of a daemon."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Any

from requests.adapters import HTTPAdapter

from manager.adapters.certificates import first_certificate
from manager.cli.failures import MISUSED, CommandError
from manager.cli.locate import CA_VARIABLE

if TYPE_CHECKING:
    import requests

    from manager.cli.locate import Endpoint


class _Trusting(HTTPAdapter):
    """Verifies servers with a context of our own; requests would use a bundle of its own."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        options |= {
            "ssl_context": self._context,
            "assert_hostname": None if self._context.check_hostname else False,
        }
        super().init_poolmanager(*args, **options)

    def cert_verify(self, *_: Any, **__: Any) -> None:
        """Add no authorities to those of the context."""

    def build_connection_pool_key_attributes(self, *args: Any, **options: Any) -> Any:
        host, _ = super().build_connection_pool_key_attributes(*args, **options)
        return host, {"ssl_context": self._context}


def trust(session: requests.Session, endpoint: Endpoint) -> None:
    """Have a session verify the daemon's certificate.

    `$OLLAMA_MANAGER_CA` comes first. A daemon of our own configuration shows the certificate that is in it:
    exactly that one is trusted, and then its names do not matter. All others are verified as by any client.

    Raises:
        CommandError: the file of the variable cannot be used.
    """
    ca = os.environ.get(CA_VARIABLE, "").strip()
    context = None if ca or endpoint.certificate is None else _pinned(endpoint)
    if context is None:
        try:
            context = ssl.create_default_context(cafile=ca or None)
        except OSError as error:
            why = "no certificates in PEM form" if isinstance(error, ssl.SSLError) else error.strerror
            raise CommandError(f"{CA_VARIABLE}: {ca!r} cannot be used ({why})", exit_code=MISUSED) from error
    session.mount("https://", _Trusting(context))


def untrusted(error: BaseException) -> tuple[str, str] | None:
    """Return the fault of a certificate and its remedy; None for all other errors."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        if isinstance(cause, ssl.SSLCertVerificationError):
            step = f"name the file of its authority in ${CA_VARIABLE}, and the daemon as its certificate does"
            return f"its certificate is not trusted: {cause.verify_message}", step
        if isinstance(cause, ssl.SSLError) and "WRONG_VERSION" in (cause.reason or ""):
            return "it does not speak TLS", "name it with http://"
        inner = getattr(cause, "reason", None) or next(iter(cause.args), None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__ or cause.__context__
    return None


def _pinned(endpoint: Endpoint) -> ssl.SSLContext | None:
    """Trust exactly the daemon's own certificate; None where its file cannot be read by this user."""
    assert endpoint.certificate is not None  # noqa: S101  (the caller has looked)
    try:
        own = first_certificate(endpoint.certificate.read_bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=own)
    except (OSError, ValueError, TypeError):
        return None
    return context
