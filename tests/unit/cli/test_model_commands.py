"""`load` and `unload`, against an HTTP server that answers like a daemon."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli.stand_in import API, Answer, error, instance, ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]


def sent(daemon: StandInDaemon, verb: str) -> Any:
    (body,) = [one.body for one in daemon.seen if one.path == f"{API}/instances/cpu/{verb}"]
    return json.loads(body)


@pytest.mark.parametrize(
    ("option", "keep_alive"),
    [
        ((), {}),
        (("--keep-alive", "30m"), {"keep_alive": "30m"}),
        (("--keep-alive", "-1"), {"keep_alive": -1}),
    ],
)
def test_load_names_the_model_and_how_long_it_stays(
    daemon: StandInDaemon, run: Run, option: tuple[str, ...], keep_alive: dict[str, Any]
) -> None:
    daemon.answers[f"POST {API}/instances/cpu/load"] = Answer({"instance": ready("cpu"), "changed": True})
    result = run("load", "cpu", "thinking", *option, "--url", daemon.url)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("thinking is loaded on cpu (")
    assert sent(daemon, "load") == {"model": "thinking", **keep_alive}


def test_load_of_a_loaded_model_says_so(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}/instances/cpu/load"] = Answer({"instance": ready("cpu"), "changed": False})
    assert run("load", "cpu", "tiny", "--url", daemon.url).stdout == "tiny was loaded already on cpu\n"


@pytest.mark.parametrize(
    ("changed", "words"), [(True, "tiny is unloaded from cpu\n"), (False, "tiny was not loaded on cpu\n")]
)
def test_unload_says_whether_there_was_anything_to_do(
    daemon: StandInDaemon, run: Run, changed: bool, words: str
) -> None:
    daemon.answers[f"POST {API}/instances/cpu/unload"] = Answer(
        {"instance": ready("cpu"), "changed": changed}
    )
    result = run("unload", "cpu", "tiny", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (0, words)
    assert sent(daemon, "unload") == {"model": "tiny"}


def test_a_load_that_failed_says_why(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu"))
    body = error("model_load_failed", "cpu did not load tiny: out of memory")
    daemon.answers[f"POST {API}/instances/cpu/load"] = Answer(body, 503)
    result = run("load", "cpu", "tiny", "--url", daemon.url)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cpu did not load the model: cpu did not load tiny: out of memory")
