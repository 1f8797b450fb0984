"""The findings of `doctor` about the raw server of a rollout."""

from __future__ import annotations

from manager.cli.findings import Finding, fine, warning

_TOPIC = "rollout.raw_url"
_REMEDY = "start that server, or correct rollout.raw_url: requests that are not managed pass there"


def raw_server(url: str, timeout_s: float) -> Finding:
    """Ask the raw server for its version. Any answer will do: it may be no Ollama."""
    import requests  # noqa: PLC0415  (half a second)

    session = requests.Session()
    session.trust_env = False  # the daemon uses no proxy
    try:
        asked = session.get(f"{url}/api/version", timeout=timeout_s, allow_redirects=False, stream=True)
        with session, asked:
            return fine(_TOPIC, f"{url} answers")
    except requests.Timeout:
        return warning(_TOPIC, f"{url} does not answer within {timeout_s:g} s", _REMEDY)
    except requests.RequestException as error:
        return warning(_TOPIC, f"{url} cannot be reached ({type(error).__name__})", _REMEDY)
