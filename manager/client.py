"""For other Python programs: which model each role has, asked of the daemon now and then.

    settings = ModelSettingsClient("http://127.0.0.1:11435")
    settings.model_for("embedding")

It needs nothing of this package but this module, and `requests`.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import requests

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

URL_VARIABLE = "SETTINGS_API_URL"
CA_VARIABLE = "OLLAMA_MANAGER_CA"
_DEFAULT_URL = "http://127.0.0.1:11435"
_PATH = "/api/settings/models/effective"
# After a failure the daemon is left alone for so long, or for the TTL if that is shorter.
_RETRY_S = 5.0


class SettingsUnavailableError(Exception):
    """The daemon cannot be asked, and never could since this client exists."""


class ModelSettingsClient:
    """Settings of models with a cache, for any number of threads.

    What was read is used for `ttl_s`. After that the daemon is asked again; while it cannot be, the last
    known values are used on, and `stale` says so.

    Args:
        url: where the daemon is, `http://HOST:PORT`; None for what `$SETTINGS_API_URL` says, or else
            `http://127.0.0.1:11435`.
        key: one of the daemon with the scope `read`, where it needs one.
        ca: a file with the authorities that sign its certificate; None for what `$OLLAMA_MANAGER_CA` or
            `$SSL_CERT_FILE` says, or else those that `requests` knows.
        ttl_s: how old values may be before they are read anew; 0 reads them each time.
        timeout_s: how long one question may take, for the connection and for each part of the answer.
        now: a monotonic clock in seconds.

    Raises:
        ValueError: that is no url.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        ttl_s: float = 30.0,
        *,
        ca: str | None = None,
        timeout_s: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        base = (url or os.environ.get(URL_VARIABLE, "").strip() or _DEFAULT_URL).strip().rstrip("/")
        if not base.startswith(("http://", "https://")):
            raise ValueError(
                f"{base!r} is no url; expected http://HOST:PORT, given here or in ${URL_VARIABLE}"
            )
        self.url = base
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._now = now
        self._asking = threading.Lock()
        self._known: dict[str, Any] | None = None
        self._read_at = float("-inf")
        self._ask_again_at = float("-inf")
        self._trouble: str | None = None
        self._failures = 0
        self._session = requests.Session()
        # Neither a proxy nor a password file is meant for a service of one's own network.
        self._session.trust_env = False
        authorities = (
            ca,
            os.environ.get(CA_VARIABLE, "").strip(),
            os.environ.get("SSL_CERT_FILE", "").strip(),
        )
        self._session.verify = next(filter(None, authorities), True)
        if key is not None:
            self._session.headers["Authorization"] = f"Bearer {key}"

    @property
    def stale(self) -> bool:
        """Whether the daemon could not be asked when it was last tried: values are those last known."""
        return self._trouble is not None

    @property
    def trouble(self) -> str | None:
        """The error of the last request to the daemon; None if there was none."""
        return self._trouble

    def effective(self) -> dict[str, Any]:
        """Return the answer of `GET /api/settings/models/effective`: every value with its source. A copy.

        Raises:
            SettingsUnavailableError: the daemon cannot be asked, and nothing is known of it.
        """
        return copy.deepcopy(self._current())

    def model_for(self, role: str) -> str | None:
        """The model of a role, None when none is set.

        Raises:
            KeyError: there is no such role.
            SettingsUnavailableError: the daemon cannot be asked, and nothing is known of it.
        """
        roles = self._current()["roles"]
        if role not in roles:
            raise KeyError(f"there is no role {role!r}; there is: {', '.join(roles)}")
        model: str | None = roles[role]["model"]["value"]
        return model

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _current(self) -> dict[str, Any]:
        failures = self._failures
        with self._asking:
            known, now = self._known, self._now()
            if known is not None and (now - self._read_at < self._ttl_s or now < self._ask_again_at):
                return known
            # Whoever waited for a question that failed does not ask the same at once.
            if known is None and self._failures != failures:
                raise self._unavailable()
            try:
                known = self._ask()
            except (requests.RequestException, ValueError) as error:
                self._trouble = f"{self.url} cannot be asked: {error}"
                self._failures += 1
                self._ask_again_at = self._now() + min(self._ttl_s, _RETRY_S)
                if self._known is None:
                    raise self._unavailable() from error
                return self._known
            self._known, self._read_at, self._trouble = known, self._now(), None
            return known

    def _unavailable(self) -> SettingsUnavailableError:
        return SettingsUnavailableError(f"{self._trouble}; nothing was ever known of its settings")

    def _ask(self) -> dict[str, Any]:
        """The daemon's answer.

        Raises:
            requests.RequestException: there is none.
            ValueError: it is another one than expected.
        """
        with self._session.get(self.url + _PATH, timeout=self._timeout_s, allow_redirects=False) as answer:
            if answer.status_code != requests.codes.ok:
                raise ValueError(f"it answered {answer.status_code}: {_message(answer)}")
            body = answer.json()
        if not _is_effective(body):
            raise ValueError("it answered something else than settings of models")
        found: dict[str, Any] = body
        return found


def _message(answer: requests.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return answer.reason


def _is_effective(body: Any) -> bool:
    roles = body.get("roles") if isinstance(body, dict) else None
    return isinstance(roles, dict) and all(
        isinstance(role, dict)
        and isinstance(role.get("model"), dict)
        and isinstance(role["model"].get("value", 0), str | None)
        for role in roles.values()
    )
