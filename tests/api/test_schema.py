"""The daemon does what its own description says, with data that fits it and data that does not.

schemathesis makes the requests: the same ones in every run. Nothing of the API is left out; some things are
helped along:

- Ids are made from those there are as well as at random, or hardly a request would get past 404.
- Headers that nobody declared are no mistake in HTTP: requests that are wrong in nothing else are not made.
- The streams of events and of the live channel, and a log that is followed, have no end: they are read until
  they fall silent.
- Roles, and what they are set to, are such that none contradicts another: a test of its own has those.
- Collections have the model of the role.
- Reports of benchmarks have no beginning.
- Runs have a request that fits every route, and a lane that there is.
- Images are made from those that are allowed as well as at random. They are on no registry, so that a pull
  ends in its documented 503; that one succeeds is a test of its own.
"""

from __future__ import annotations

import re
import stat
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from manager.web.app import application
from manager.wire.access import Access
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.keys import keys
from tests.support.ollama import running_ollama

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine

KEY = "correct-horse-battery-staple-0123456789"
IDS = ["cpu", "nas", "gone"]
ALLOWED_IMAGE = "^ollama-manager/simulated:[a-z0-9]{1,20}$"
SPAN = r"^[0-9]{1,9}(\.[0-9]{1,6})?[smhd]?$"
SILENCE_S = 0.3
MODEL_NAME = re.compile(r"[a-z0-9]{1,80}(:[a-z0-9]{1,20})?")
EXAMPLES = 60
KEPT_S = 1000
UNKNOWN_HEADER = "x-schemathesis-unknown-property"


def description() -> dict[str, Any]:
    """What the daemon says of itself; it does not depend on what is configured, but for the key."""
    return application(Mock(), access=Access(allowed_hosts=(), keys=keys(KEY))).openapi()


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """What no schema can know: ids, times, which images are allowed, and what contradicts what."""
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                narrow(parameter)
    image = {"anyOf": [{"type": "string", "pattern": ALLOWED_IMAGE}, {"type": "null"}]}
    schemas = document["components"]["schemas"]
    schemas["PullRequest"]["properties"]["image"] = image
    key = schemas["KeyRequest"]["properties"]
    key["roles"] = {"type": "null"}
    key["instances"] = {"enum": [["cpu"], ["nas", "cpu"], None]}
    key |= {name: {"enum": [1, 60, None]} for name in ("concurrency", "rpm", "tokens_per_day")}
    key["usd_per_month"] = {"enum": [0, 1.5, 20, None]}
    for request in ("LoadRequest", "UnloadRequest"):
        schemas[request]["properties"]["model"] = {"enum": ["tiny", "minilm", "nope"]}
    schemas["LoadRequest"]["properties"]["keep_alive"] = {"enum": [300, -1, 1.5, "5m", "-1s", None]}
    schemas["LiftRequest"]["properties"]["until"] = {"enum": ["2999-01-01T00:00:00Z"]}
    schemas["DrainRequest"]["properties"]["until"] = {"enum": ["2999-01-01T00:00:00Z", None]}
    schemas["UpgradeRequest"]["properties"]["image"] = {"type": "string", "pattern": ALLOWED_IMAGE}
    target = {"enum": ["auto", "cpu", "", None]}
    schemas["RoleChange"]["properties"] |= {
        "target": target,
        "kind": {"enum": ["", None]},
        "fallbacks": {"enum": [[], None]},
    }
    schemas["FallbackChange"]["properties"]["order"] = {"enum": [[], None]}
    schemas["RolloutChange"]["properties"] |= {
        "stage": {"enum": ["all", None]},
        "lanes": {"enum": [[], None]},
        "raw_url": {"enum": ["http://127.0.0.1:9", None]},
    }
    schemas["RoleRoutingChange"]["properties"]["target"] = target
    # One value can be said in several ways: here each has roles of its own.
    models = schemas["ModelsChange"]["properties"]
    models["roles"] = by_role(models["roles"], "thinking", "control")
    models["layer_routing"] = by_role({"patternProperties": {"": target}}, "output", "tool_selector")
    models["embedding_target_instance"] = target
    submission = document["paths"]["/api/v1/runs"]["post"]["requestBody"]["content"]["application/json"]
    submission["schema"]["properties"] |= {
        "body": {"const": {"model": "tiny", "prompt": "hi", "messages": [], "input": "hi", "max_tokens": 5}},
        "path": {"enum": ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages"]},
        "lane": {"enum": ["output", None]},
        "expires_s": {
            "anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": KEPT_S}, {"type": "null"}]
        },
    }
    # Any possible name of a model will do, which no schema can say; without one it is that of the role.
    del schemas["CollectionRequest"]["properties"]["model"]
    for request in ("CollectionRequest", "BackfillRequest"):
        schemas[request]["properties"]["dimensions"] = {"enum": [1, 384, None]}
    # The end must not come before the beginning, which no schema can say.
    del schemas["ReportRequest"]["properties"]["started_at"]
    routing = schemas["RoutingChange"]["properties"]
    routing["roles"] = by_role(routing["roles"], "thinking", "embedding")
    return document


def narrow(parameter: dict[str, Any]) -> None:
    if parameter["in"] == "path" and parameter["schema"].get("type") != "integer":
        parameter["schema"] = {"anyOf": [{"enum": IDS}, {"type": "string", "minLength": 1}]}
    elif parameter["name"] in ("since", "from", "to"):
        parameter["schema"] = {"type": "string", "pattern": SPAN}
    elif parameter["name"] == "by":
        parameter["schema"] = {"enum": ["project", "key,role", "model,instance,day"]}


def by_role(schema: dict[str, Any], *roles: str) -> dict[str, Any]:
    (value,) = schema["patternProperties"].values()
    properties = dict.fromkeys(roles, value)
    return {"type": "object", "properties": properties, "additionalProperties": False}


def is_beyond_schemas(case: schemathesis.Case[Any]) -> bool:
    """Whether a request has what no schema can exclude.

    These are both places of `force_local`, both ends of a time, a time without length, both directions of a
    list, a category that is only space, a name that is none of a model, and a path in which an id is a list.
    """
    body, query = case.body, case.query or {}
    if any(not isinstance(part, str | int) for part in (case.path_parameters or {}).values()):
        return True
    if not isinstance(body, dict):
        is_point = not str(query.get("from", "1")).strip("0.smhd")
        return is_point or {"from", "to"} <= set(query) or {"after", "before"} <= set(query)
    names = [body.get(name) for name in ("model", "force_model")]
    categories = body.get("categories")
    return (
        {"fallback", "force_local"} <= set(body)
        or any(isinstance(name, str) and not MODEL_NAME.fullmatch(name) for name in names)
        or (isinstance(categories, list) and any(str(one).isspace() for one in categories))
    )


CONFIG = schemathesis.Config.from_dict(
    {
        "generation": {"with-security-parameters": False},
        # These two are documented where they can happen, which is another check; 500 never is.
        "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "503", "504"]}},
    }
)
schema = schemathesis.openapi.from_dict(narrowed(description()), config=CONFIG)


@pytest.fixture(scope="module")
def daemon(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("schema")
    key_file = home / "key"
    key_file.write_text(KEY)
    key_file.chmod(stat.S_IRUSR)
    with running_ollama() as nas, making_daemons(engine, home, new_manager_id()) as make:
        daemon = make(
            instances={
                "cpu": {"template": "sim"},
                "nas": {"driver": "external", "url": nas.url},
                "gone": {"driver": "external", "url": "http://127.0.0.1:9"},
            },
            config={
                "server": {"key_file": str(key_file)},
                "runs": {"retention_s": KEPT_S, "expires_s": KEPT_S},
                "roles": {"embedding": {"model": "minilm"}},
            },
        ).start(until_ready=False)
        daemon.wait_until_alive()
        yield daemon


def test_the_description_is_the_daemons_own(daemon: Daemon) -> None:
    assert daemon.call("GET", "/openapi.json", headers={"X-API-Key": KEY}).json() == description()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_the_daemon_does_what_it_says(case: schemathesis.Case[Any], daemon: Daemon) -> None:
    if UNKNOWN_HEADER in case.headers or is_beyond_schemas(case):
        return
    is_endless = case.operation.path.endswith(("/events", "/live", "/logs"))
    timeout = (5, SILENCE_S) if is_endless else 30
    case.call_and_validate(base_url=daemon.url, headers={"X-API-Key": KEY}, timeout=timeout)


def test_no_request_of_these_was_answered_with_a_defect(daemon: Daemon) -> None:
    assert "Traceback" not in daemon.log()
    assert "request_failed" not in daemon.log()
