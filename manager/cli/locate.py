"""The address of the daemon that a command talks to, and its key."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from manager.cli.failures import MISUSED, CommandError
from manager.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manager.adapters.locks import Holder
    from manager.settings import LoadedSettings

KEY_VARIABLE = "OLLAMA_MANAGER_KEY"
URL_VARIABLE = "OLLAMA_MANAGER_URL"
CA_VARIABLE = "OLLAMA_MANAGER_CA"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A daemon's address. The key appears in no repr, so that it appears in no message either.

    `certificate` is the file of the daemon's own certificate: exactly that one is trusted, whatever name it
    has. None: a certificate of an authority that `$OLLAMA_MANAGER_CA`, or else the system, trusts.
    """

    url: str
    key: str | None = None
    certificate: Path | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, key={'…' if self.key else None})"


def find_daemon(url: str | None, config: Path | None) -> Endpoint:
    """The daemon that was named, else the one that holds our state directory, else where one would listen.

    Raises:
        CommandError, ConfigurationError: the address or the configuration cannot be used.
    """
    if url:
        return Endpoint(_checked(url), _key())
    return configured_daemon(load(config))


def load(config: Path | None, *, overrides: Mapping[str, object] | None = None) -> LoadedSettings:
    """The configuration of this command; see `manager.settings.load_settings`."""
    from manager.cli.logs import silence  # noqa: PLC0415

    silence()
    from manager.settings import load_settings  # noqa: PLC0415  (half the cost of a command without --url)

    return load_settings(config, overrides=overrides)


def configured_daemon(loaded: LoadedSettings) -> Endpoint:
    """The daemon that holds the state directory of a configuration, else where it would listen.

    An address in files that others may have written is not used: a key would go there.
    """
    settings = loaded.settings
    tls = settings.server.tls
    try:
        holder = current_holder(settings.state.dir)
    except ConfigurationError:  # another user's: its address may still be the configured one
        holder = None
    if holder is not None and holder.url is not None and holder.owner_uid is not None:
        key = _configured_key(loaded, holder.owner_uid)
        if key is not None or _is_trusted(holder.owner_uid):
            return Endpoint(_reachable(holder.url), _key() or key, tls.certificate)
    host = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    scheme = "http" if tls.files is None else "https"
    return Endpoint(_reachable(f"{scheme}://{host}:{settings.server.port}"), _key(), tls.certificate)


def current_holder(state_dir: Path) -> Holder | None:
    """The holder of the state directory now; see `manager.adapters.locks.read_holder`."""
    from manager.adapters.locks import read_holder  # noqa: PLC0415

    return read_holder(state_dir)


def file_of_daemon(loaded: LoadedSettings, holder: Holder) -> str | None:
    """Return which other configuration file the daemon runs with, as a sentence; None for the same."""
    if holder.config is None or holder.config == loaded.file_name:
        return None
    theirs = f"the file {holder.config}" if holder.config else "no configuration file"
    return f"the daemon runs with {theirs}, this command with {loaded.file_name or 'none'}"


def _is_trusted(uid: int) -> bool:
    from manager.settings.ownership import is_trusted  # noqa: PLC0415

    return is_trusted(uid)


def _configured_key(loaded: LoadedSettings, daemon_uid: int) -> str | None:
    """The key of the daemon whose lock we have just seen held, if that daemon may have it."""
    from manager.settings import read_keys  # noqa: PLC0415

    files = loaded.settings.server.key_files
    if not files:
        return None
    try:
        return read_keys(files, daemon_uid=daemon_uid)[0]
    except ConfigurationError:
        return None  # it is not for everybody: the daemon will ask for the key


def _key() -> str | None:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise CommandError(
            f"{KEY_VARIABLE} holds a space or something that is not ASCII; a key has neither",
            exit_code=MISUSED,
        )
    return key


def _checked(url: str) -> str:
    url = url.strip()
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    else:
        usable = usable and parts.username is None and not (parts.query or parts.fragment)
    if not usable or re.search(r"[\s\x00-\x1f\x7f\\]", url):
        raise CommandError(
            f"the address of the daemon is {_shown(url)}; expected http://HOST:PORT or https://HOST:PORT",
            exit_code=MISUSED,
            next_step=f"check --url and ${URL_VARIABLE}; a key goes into ${KEY_VARIABLE}",
        )
    return _reachable(url.rstrip("/"))


def _shown(url: str) -> str:
    """An address as it was given, without the parts that may hold a password or a key."""
    from manager.settings.problems import shown  # noqa: PLC0415  (half the cost of a command)

    return shown(re.sub(r"[^/]*@", "…@", re.split(r"[?#]", url, maxsplit=1)[0]))


def _reachable(url: str) -> str:
    """The address for a client: one that listens everywhere is asked on loopback, a name it accepts."""
    return re.sub(r"^(https?://)(?:(0\.0\.0\.0)|\[::\])(?=[:/]|$)", _on_loopback, url)


def _on_loopback(match: re.Match[str]) -> str:
    return match[1] + ("127.0.0.1" if match[2] else "[::1]")
