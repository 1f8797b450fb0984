"""Origins of pages in a browser: the patterns that a configuration allows, and what they match."""

from __future__ import annotations

import re

_LABEL = r"[A-Za-z0-9_*-]+"
_PATTERN = re.compile(
    rf"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\*|\[[0-9A-Fa-f:.]+\]|{_LABEL}(?:\.{_LABEL})*)"
    r"(?::(?P<port>[0-9]{1,5}|\*))?"
)
_LITERAL = ("*", "null")
# Ollama 0.33, `envconfig/config.go` AllowedOrigins: what its server allows without configuration.
_OLLAMA = (
    *(
        f"{scheme}://{host}:*"
        for host in ("localhost", "127.0.0.1", "0.0.0.0", "[::1]")  # noqa: S104  (a page's host)
        for scheme in ("http", "https")
    ),
    "app://*",
    "file://*",
    "tauri://*",
    "vscode-webview://*",
    "vscode-file://*",
)
_ANY_HOST = r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])"
_MOST_BYTES = 512


class Origins:
    """A set of patterns.

    A pattern is `SCHEME://HOST[:PORT]`, `null` or `*`. A star matches part of one label of a host name, but
    never in its last label; or the port, or its absence; or, alone, every host of a scheme or every origin.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        """Raises ValueError: a pattern is none; `check_pattern`."""
        self._match = re.compile("|".join(map(_regex, (*_OLLAMA, *patterns)))).fullmatch

    def allow(self, origin: bytes) -> bool:
        return len(origin) <= _MOST_BYTES and self._match(origin.decode("latin-1")) is not None


def check_pattern(pattern: str) -> str:
    """Return a pattern that can be part of `Origins`.

    Raises:
        ValueError: it is none; the text says what is.
    """
    match = _PATTERN.fullmatch(pattern)
    if pattern not in _LITERAL and (match is None or _stars_at_the_end(match["host"])):
        raise ValueError(
            "expected SCHEME://HOST[:PORT], null, or * for every origin; a * may stand for a part of a name "
            "before its last dot (https://*.example.com), for the port (http://localhost:*), or for every "
            "host of a scheme (app://*)"
        )
    return pattern


def _stars_at_the_end(host: str) -> bool:
    return host != "*" and "*" in host.rpartition(".")[2]


def _regex(pattern: str) -> str:
    match = _PATTERN.fullmatch(check_pattern(pattern))
    if match is None:
        return ".*" if pattern == "*" else pattern
    scheme, host, port = re.escape(match["scheme"]), match["host"].lower(), match["port"]
    if host == "*" and port is None:
        return f"{scheme}://.*"
    # Browsers write host names in lower case.
    name = _ANY_HOST if host == "*" else re.escape(host).replace(r"\*", "[a-z0-9_-]+")
    ports = {None: "", "*": "(?::[0-9]{1,5})?"}.get(port, f":{port}")
    return f"{scheme}://{name}{ports}"
