"""Where settings come from, which source wins, and what a wrong one is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manager.errors import ConfigurationError
from manager.settings import LoadedSettings, Settings, load
from manager.settings.load import load_settings

HOME = {"HOME": "/home/someone"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of this machine plays a part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "SYSTEM_FILE", tmp_path / "etc" / "config.yaml")


def write(text: str, name: str = "ollama-manager.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def loaded(
    text: str = "", environ: dict[str, str] | None = None, overrides: dict[str, Any] | None = None
) -> LoadedSettings:
    write(text)
    return load_settings(overrides=overrides, environ=HOME | (environ or {}))


def problems(
    text: str = "", environ: dict[str, str] | None = None, overrides: dict[str, Any] | None = None
) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        loaded(text, environ, overrides)
    return caught.value.message.splitlines()


def test_no_file_is_fine_and_everything_has_its_default() -> None:
    found = load_settings(environ=HOME)
    assert found.file is None
    settings = found.settings
    assert settings == Settings.model_validate(
        {"state": {"dir": "/home/someone/.local/state/ollama-manager"}}
    )
    assert (settings.server.host, settings.server.port, settings.server.key_file) == (
        "127.0.0.1",
        11435,
        None,
    )
    assert settings.server.allowed_hosts == ("localhost", "127.0.0.1", "[::1]")
    assert settings.engine.url == "unix:///var/run/docker.sock"
    assert settings.engine.timeout_s == 30
    assert {name: one.template for name, one in settings.instances.items()} == {"cpu": "ollama-cpu"}
    assert (settings.manager_id, settings.gpus, settings.schedules) == ("default", "auto", ())
    assert settings.lifecycle.model_dump() == {
        "ttl_s": 900,
        "start_timeout_s": 300,
        "stop_timeout_s": 30,
        "drain_timeout_s": 60,
        "probe_interval_s": 2,
        "resync_interval_s": 15,
        "vram_wait_s": 20,
        "max_running": None,
    }
    assert settings.allow.model_dump() == {
        "images": ("ollama/ollama:*", "ollama-manager/simulated:*"),
        "env": (
            "OLLAMA_*",
            "CUDA_VISIBLE_DEVICES",
            "NVIDIA_VISIBLE_DEVICES",
            "NVIDIA_DRIVER_CAPABILITIES",
        ),
        "networks": ("ollama-manager",),
        "volumes": ("ollama-models",),
        "binds": (),
    }
    assert settings.log.model_dump() == {"format": "auto", "level": "info"}
    assert found.source_of("server.port") == found.source_of("state.dir") == "default"


def test_building_settings_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUS", "none")
    monkeypatch.setenv("MANAGER_ID", "from-outside")
    assert (Settings().gpus, Settings().manager_id) == ("auto", "default")


def test_settings_cannot_be_changed() -> None:
    settings = load_settings(environ=HOME).settings
    with pytest.raises(ValueError, match="frozen"):
        settings.gpus = "none"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1  # type: ignore[misc]


def test_the_file_is_looked_for_in_the_documented_order() -> None:
    system = write("manager_id: system", "etc/config.yaml")
    assert load_settings(environ=HOME).file == Path.cwd() / system
    local = write("manager_id: local")
    assert load_settings(environ=HOME).file == local
    named = write("manager_id: named", "conf/named.yaml")
    environ = HOME | {"OLLAMA_MANAGER_CONFIG": f" {named} "}
    assert load_settings(environ=environ).settings.manager_id == "named"
    asked = write("manager_id: asked", "conf/asked.yaml")
    assert load_settings(asked, environ=environ).settings.manager_id == "asked"
    assert load_settings(environ=HOME | {"OLLAMA_MANAGER_CONFIG": ""}).settings.manager_id == "local"


def test_a_named_file_that_is_missing_is_an_error() -> None:
    write("manager_id: local")
    with pytest.raises(ConfigurationError, match=r"^--config: 'gone\.yaml'; cannot be read \(No such file"):
        load_settings(Path("gone.yaml"), environ=HOME)
    with pytest.raises(ConfigurationError, match=r"^OLLAMA_MANAGER_CONFIG: 'gone\.yaml'; cannot be read"):
        load_settings(environ=HOME | {"OLLAMA_MANAGER_CONFIG": "gone.yaml"})


def test_a_file_that_is_there_but_unreadable_is_not_skipped() -> None:
    Path("ollama-manager.yaml").mkdir()
    with pytest.raises(ConfigurationError, match=r"^ollama-manager\.yaml: cannot be read \(Is a directory\)"):
        load_settings(environ=HOME)


def test_command_line_beats_environment_beats_file_beats_default() -> None:
    text = "server: {port: 1}\nmanager_id: file\n"
    environ = {"OLLAMA_MANAGER_SERVER__PORT": "2"}
    both = loaded(text, environ, {"server": {"port": 3, "host": None}})
    assert both.settings.server.port == 3
    assert both.source_of("server.port") == "command line"
    assert both.source_of("server.host") == "default"
    second = loaded(text, environ)
    assert second.settings.server.port == 2
    assert second.source_of("server.port") == "environment OLLAMA_MANAGER_SERVER__PORT"
    third = loaded(text)
    assert third.settings.server.port == 1
    assert third.source_of("server.port") == "file ollama-manager.yaml:1"
    assert third.source_of("manager_id") == "file ollama-manager.yaml:2"
    assert third.source_of("server.key_file") == "default"


def test_mappings_are_merged_key_by_key_and_lists_are_replaced() -> None:
    text = """
instances:
  gpu0: {template: ollama-gpu, ttl_s: 60}
allow: {volumes: [a, b]}
"""
    environ = {
        "OLLAMA_MANAGER_INSTANCES__GPU0__TTL_S": "0",
        "OLLAMA_MANAGER_INSTANCES__CPU": '{"template": "ollama-cpu"}',
        "OLLAMA_MANAGER_ALLOW__VOLUMES": '["c"]',
    }
    found = loaded(text, environ)
    gpu0, cpu = found.settings.instances["gpu0"], found.settings.instances["cpu"]
    assert (gpu0.template, gpu0.ttl_s, cpu.template) == ("ollama-gpu", 0, "ollama-cpu")
    assert found.settings.allow.volumes == ("c",)
    assert found.source_of("instances.gpu0.template") == "file ollama-manager.yaml:3"
    assert found.source_of("instances.gpu0.ttl_s") == "environment OLLAMA_MANAGER_INSTANCES__GPU0__TTL_S"
    assert found.source_of("allow.volumes.0") == "environment OLLAMA_MANAGER_ALLOW__VOLUMES"
    assert found.source_of("allow.volumes.1") == "default"


def test_a_single_variable_is_more_exact_than_one_for_its_whole_section() -> None:
    environ = {
        "OLLAMA_MANAGER_SERVER": '{"port": 1, "allowed_hosts": ["a"]}',
        "OLLAMA_MANAGER_SERVER__PORT": "2",
    }
    server = loaded("", environ).settings.server
    assert (server.port, server.allowed_hosts) == (2, ("a",))


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("SERVER__PORT", " 80\n", "server.port", 80),
        ("MANAGER_ID", " lab ", "manager_id", "lab"),
        ("MANAGER_ID", "42", "manager_id", "42"),
        ("GPUS", "none", "gpus", "none"),
        ("ENGINE__TIMEOUT_S", "2.5", "engine.timeout_s", 2.5),
        ("LIFECYCLE__MAX_RUNNING", "3", "lifecycle.max_running", 3),
        ("LIFECYCLE__MAX_RUNNING", "null", "lifecycle.max_running", None),
        ("LOG__LEVEL", "debug", "log.level", "debug"),
        ("INSTANCES__CPU__PINNED", "true", "instances.cpu.pinned", True),
        ("INSTANCES__CPU__PREWARM", "1", "instances.cpu.prewarm", True),
        ("INSTANCES__CPU__PRIORITY", "-5", "instances.cpu.priority", -5),
        ("INSTANCES__BIG_ONE__TEMPLATE", "x", "instances.big-one.template", "x"),
        ("ALLOW__BINDS", '["/srv:rw"]', "allow.binds", ("/srv:rw",)),
        ("SCHEDULES", '[{"cron": "0 8 * * *", "action": "reap"}]', "schedules.0.action", "reap"),
    ],
)
def test_variables_are_read_as_their_setting_needs_it(name: str, text: str, path: str, value: object) -> None:
    found = loaded("instances: {cpu: {template: a}}", {f"OLLAMA_MANAGER_{name}": text})
    here: Any = found.settings.model_dump()
    for key in path.split("."):
        here = here[int(key) if key.isdigit() else key]
    assert here == value
    assert found.source_of(path) == f"environment OLLAMA_MANAGER_{name}"


def test_whitespace_around_text_is_stripped_everywhere() -> None:
    found = loaded(
        'manager_id: " lab "\nallow: {volumes: [" models "]}\nstate: {dir: " /var/lib/x "}',
        overrides={"server": {"host": " localhost "}},
    )
    assert found.settings.manager_id == "lab"
    assert found.settings.allow.volumes == ("models",)
    assert found.settings.state.dir == Path("/var/lib/x")
    assert found.settings.server.host == "localhost"


def test_an_empty_variable_counts_as_not_set() -> None:
    found = loaded("", {"OLLAMA_MANAGER_SERVER__PORT": " ", "DOCKER_HOST": "", "XDG_STATE_HOME": ""})
    assert found.settings.server.port == 11435
    assert found.source_of("server.port") == "default"


def test_docker_host_is_a_variable_for_the_engine_url_and_ours_wins_over_it() -> None:
    text = "engine: {url: unix:///run/file.sock}"
    environ = {"DOCKER_HOST": "tcp://engine:2375"}
    found = loaded(text, environ)
    assert found.settings.engine.url == "tcp://engine:2375"
    assert found.source_of("engine.url") == "environment DOCKER_HOST"
    ours = loaded(text, environ | {"OLLAMA_MANAGER_ENGINE__URL": "unix:///run/ours.sock"})
    assert ours.settings.engine.url == "unix:///run/ours.sock"
    assert ours.source_of("engine.url") == "environment OLLAMA_MANAGER_ENGINE__URL"
    assert loaded(text).settings.engine.url == "unix:///run/file.sock"
    assert problems("", {"DOCKER_HOST": "ssh://host"}) == [
        f"DOCKER_HOST: engine.url: 'ssh://host'; {ENGINE_URLS}"
    ]


def test_null_means_the_default_where_a_setting_cannot_be_null() -> None:
    found = loaded("engine: {url: null}\nstate: {dir: null}")
    assert found.settings.engine.url == "unix:///var/run/docker.sock"
    assert found.settings.state.dir == Path("/home/someone/.local/state/ollama-manager")
    over = loaded("engine: {url: tcp://a:1}", {"OLLAMA_MANAGER_ENGINE__URL": "null"})
    assert over.settings.engine.url == "unix:///var/run/docker.sock"


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"XDG_STATE_HOME": "/var/state"}, "/var/state/ollama-manager"),
        ({"XDG_STATE_HOME": "relative"}, "/home/someone/.local/state/ollama-manager"),
        ({}, "/home/someone/.local/state/ollama-manager"),
    ],
)
def test_the_state_directory_follows_xdg(environ: dict[str, str], directory: str) -> None:
    assert loaded("", environ).settings.state.dir == Path(directory)


def test_without_a_home_the_state_directory_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    with pytest.raises(
        ConfigurationError, match=r"state\.dir: nothing; expected a directory: there is no home"
    ):
        load_settings(environ={})
    environ = {"OLLAMA_MANAGER_STATE__DIR": "/var/lib/x"}
    assert load_settings(environ=environ).settings.state.dir == Path("/var/lib/x")


def test_relative_paths_in_the_file_are_relative_to_the_file() -> None:
    write("server: {key_file: key}\nstate: {dir: ../state}\ntemplates: {dir: /abs}", "conf/a.yaml")
    environ = HOME | {"OLLAMA_MANAGER_SERVER__KEY_FILE": "here"}
    settings = load_settings(Path("conf/a.yaml"), environ=HOME).settings
    assert settings.server.key_files == (Path.cwd() / "conf" / "key",)
    assert settings.state.dir == Path.cwd() / "conf" / ".." / "state"
    assert settings.templates.dir == Path("/abs")
    settings = load_settings(Path("conf/a.yaml"), environ=environ).settings
    assert settings.server.key_files == (Path.cwd() / "here",)
    settings = load_settings(environ=HOME, overrides={"templates": {"dir": Path("t")}}).settings
    assert settings.templates.dir == Path.cwd() / "t"


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    text = "state: {dir: ~/state}\nserver: {key_file: ~nobody-of-that-name/key}"
    settings = loaded(text).settings
    assert settings.state.dir == Path("/home/someone/state")
    assert settings.server.key_files == (Path.cwd() / "~nobody-of-that-name" / "key",)


def test_an_instance_is_there_by_default_only_when_the_key_is_absent() -> None:
    assert list(loaded("gpus: none").settings.instances) == ["cpu"]
    assert loaded("instances: {}").settings.instances == {}


ENGINE_URLS = "expected unix:///SOCKET, tcp://HOST:PORT, http://HOST:PORT or https://HOST:PORT"
ALLOWED_NAMES = (
    "allowed: OLLAMA_MANAGER_<SECTION>__<KEY>, with the sections server, state, manager_id, engine, "
    "templates, allow, instances, gpus, lifecycle, schedules, roles, models, gateway, runs, breaker, "
    "fallback, log, audit, budgets, rollout, routing, discovery, swarm"
)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("SEVER__PORT", "SERVER__PORT"),
        ("SERVER__PROT", "SERVER__PORT"),
        ("SERVER_PORT", "SERVER__PORT"),
        ("server__port", "SERVER__PORT"),
        ("SERVER__PORT__X", "SERVER__PORT"),
        ("INSTANCES__GPU0__TLL_S", "INSTANCES__GPU0__TTL_S"),
        ("INSTANCES__", "INSTANCES__ID"),
        ("ALLOW__IMAGES__0", "ALLOW__IMAGES"),
        ("GPU", "GPUS"),
    ],
)
def test_an_unknown_variable_is_an_error_with_the_nearest_known_one(name: str, near: str) -> None:
    (problem,) = problems("", {f"OLLAMA_MANAGER_{name}": ""})
    assert problem == (
        f"OLLAMA_MANAGER_{name}: unknown variable; did you mean 'OLLAMA_MANAGER_{near}'? {ALLOWED_NAMES}"
    )


def test_the_variables_of_the_client_commands_and_of_others_are_left_alone() -> None:
    environ = {
        "OLLAMA_MANAGER_URL": "http://127.0.0.1:1",
        "OLLAMA_MANAGER_KEY": "secret",
        "OLLAMA_HOST": "x",
        "OLLAMA_MANAGERS": "x",
    }
    assert loaded("", environ).settings == loaded().settings


SERVER_KEYS = "allowed: host, port, key_file, tls, allowed_hosts, allowed_origins"
NO_TEMPLATE = "missing; an instance of driver docker needs a template"


@pytest.mark.parametrize(
    ("text", "environ", "problem"),
    [
        ("", {"SERVER__PORT": "x"}, "OLLAMA_MANAGER_SERVER__PORT: server.port: 'x'; expected a whole number"),
        ("", {"GPUS": "all"}, "OLLAMA_MANAGER_GPUS: gpus: 'all'; expected 'auto' or 'none'"),
        (
            "",
            {"ALLOW__IMAGES": "a,b"},
            "OLLAMA_MANAGER_ALLOW__IMAGES: allow.images: 'a,b'; expected a list, as JSON",
        ),
        (
            "",
            {"SERVER": "[1", "SERVER__PORT": "2"},
            "OLLAMA_MANAGER_SERVER: server: '[1'; expected a mapping, as JSON",
        ),
        ("", {"SERVER": "1"}, "OLLAMA_MANAGER_SERVER: server: 1; expected a mapping"),
        (
            "",
            {"SERVER": '{"prot": 1}'},
            f"OLLAMA_MANAGER_SERVER: server.prot: unknown key; did you mean 'port'? {SERVER_KEYS}",
        ),
        (
            "schedules: [{cron: '0 8 * * *', action: start, instance: cpu}]",
            {"SCHEDULES": '[{"cron": "0 8 * * *", "action": "start"}]'},
            "OLLAMA_MANAGER_SCHEDULES: schedules.0.instance: missing; start needs the id of an instance",
        ),
        (
            "instances:\n  gpu0: {ttl_s: 1}",
            {},
            f"ollama-manager.yaml:2: instances.gpu0.template: {NO_TEMPLATE}",
        ),
    ],
)
def test_a_problem_names_the_source_it_came_from(text: str, environ: dict[str, str], problem: str) -> None:
    named = {f"OLLAMA_MANAGER_{name}": value for name, value in environ.items()}
    assert problems(text, named) == [problem]


def test_a_wrong_option_is_named_as_it_is_written() -> None:
    assert problems(overrides={"server": {"port": 70000}}) == [
        "--port: server.port: 70000; expected a port, 1-65535"
    ]
    assert problems("server: {port: 1}", overrides={"server": {"key_file": ""}}) == [
        "--key-file: server.key_file: ''; expected a path"
    ]


def test_every_problem_is_said_at_once_each_on_its_line() -> None:
    text = """\
server: {prot: 1, port: true}
gpus: all
gpus: none
lifecycle:
  ttl_s: -1
log: {level: loud}
"""
    found = problems(text, {"OLLAMA_MANAGER_X": "1"}, {"engine": {"timeout_s": "soon"}})
    assert [line.split(": ")[0] for line in found] == [
        "OLLAMA_MANAGER_X",
        "ollama-manager.yaml:3",
        "ollama-manager.yaml:1",
        "ollama-manager.yaml:1",
        "--timeout-s",
        "ollama-manager.yaml:2",
        "ollama-manager.yaml:5",
        "ollama-manager.yaml:6",
    ]


def test_the_sections_are_compared_although_another_one_is_wrong() -> None:
    gone = "'gone' is no instance; expected cpu or gpuN (gpus: auto)"
    text = "log: {level: loud}\nschedules:\n  - {cron: '0 8 * * *', action: stop, instance: gone}\n"
    assert problems(text) == [
        "ollama-manager.yaml:1: log.level: 'loud'; expected 'debug', 'info', 'warning' or 'error'",
        f"ollama-manager.yaml:3: schedules.0.instance: {gone}",
    ]


def test_the_sections_are_not_compared_with_one_that_is_wrong() -> None:
    text = (
        "instances: {Gone: {template: a}}\nschedules: [{cron: '0 8 * * *', action: stop, instance: gone}]\n"
    )
    (problem,) = problems(text)
    assert problem.startswith(
        "ollama-manager.yaml:1: instances.Gone: 'Gone' as a key; expected text that matches"
    )


def test_a_file_that_is_no_yaml_is_the_only_thing_that_is_said_of_it() -> None:
    (problem,) = problems("server: {port: 1\n", {"OLLAMA_MANAGER_INSTANCES__GPU0__TTL_S": "1"})
    assert problem.startswith(
        "ollama-manager.yaml:2: not YAML: while parsing a flow mapping, expected ',' or '}'"
    )


def test_the_error_lists_its_problems_for_programs_too() -> None:
    with pytest.raises(ConfigurationError) as caught:
        loaded("gpus: all")
    assert caught.value.details == {
        "problems": [
            {"source": "ollama-manager.yaml:1", "key": "gpus", "message": "'all'; expected 'auto' or 'none'"}
        ]
    }


@pytest.mark.parametrize(
    "text",
    [
        "server: {key: hunter2hunter2}",
        "instances: {nas: {driver: external, url: 'http://me:hunter2hunter2@nas'}}",
        "instances: {nas: {driver: external, url: 'ftp://me:hunter2hunter2@nas'}}",
        "engine: {url: 'ssh://me:hunter2hunter2@nas'}",
    ],
)
def test_no_message_shows_a_secret(text: str) -> None:
    assert "hunter2" not in "".join(problems(text))


def test_a_problem_can_be_placed_afterwards() -> None:
    found = loaded("instances:\n  cpu: {template: a}\n")
    assert str(found.problem("instances.cpu.device", "x")) == "ollama-manager.yaml:2: instances.cpu.device: x"
    assert str(found.problem(("log", "level"), "x")) == "default: log.level: x"


def test_values_in_json_may_be_deep() -> None:
    environ = {
        "OLLAMA_MANAGER_SCHEDULES": json.dumps([{"cron": "@daily", "action": "reap", "timezone": "UTC"}])
    }
    (schedule,) = loaded("", environ).settings.schedules
    assert (schedule.cron, schedule.timezone) == ("@daily", "UTC")
    assert problems("", {"OLLAMA_MANAGER_SCHEDULES": "[" * 100_000})[0].endswith("expected a list, as JSON")
