"""`config show`, `templates check`, `version`, finding the daemon, and what importing the package costs."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import yaml

from manager import __version__
from manager.adapters.locks import StateDirLock
from manager.cli.locate import Endpoint, find_daemon
from manager.settings import load_settings
from tests.support.users import give
from tests.unit.cli.conftest import NO_ENGINE
from tests.unit.cli.stand_in import API, Answer, instance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

KEY = "a-key-that-nobody-may-see"


def test_the_command_line_is_imported_without_anything_heavy() -> None:
    source = (
        "import manager.cli, sys; "
        "heavy = 'docker fastapi rich aiohttp requests pydantic structlog sqlalchemy uvicorn "
        "manager.daemon manager.app'; "
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_prints_the_version(run: Run) -> None:
    assert run("version").stdout == f"ollama-manager {__version__}\n"
    assert run("--version").stdout == f"ollama-manager {__version__}\n"


def test_config_show_names_the_source_of_every_value(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("server:\n  port: 11600\ninstances:\n  cpu: {template: ollama-cpu, ttl_s: 5}\n")
    monkeypatch.setenv("OLLAMA_MANAGER_LIFECYCLE__TTL_S", "60")
    result = run("config", "show", "--config", str(file))
    assert result.exit_code == 0
    lines = {" ".join(line.split()) for line in result.stdout.splitlines()}
    assert f"# configuration file: {file}" in lines
    assert f"port: 11600 # file {file}:2" in lines
    assert f"ttl_s: 5 # file {file}:4" in lines
    assert "ttl_s: 60 # environment OLLAMA_MANAGER_LIFECYCLE__TTL_S" in lines
    assert "host: 127.0.0.1 # default" in lines
    assert f"url: {NO_ENGINE} # environment DOCKER_HOST" in lines


def test_what_config_show_prints_can_be_loaded_and_means_the_same(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "instances:\n"
        "  cpu: {template: ollama-cpu, pinned: true}\n"
        '  gpu0: {template: ollama-gpu, device: "0000:01:00.0", ttl_s: 0.5}\n'
        "  nas: {driver: external, url: 'http://192.0.2.7:11434', device: cpu}\n"
        'schedules:\n  - {cron: "0 8 * * mon-fri", action: start, instance: gpu0, timezone: Europe/Berlin}\n'
        "allow: {binds: [/data:rw]}\n"
        "roles:\n"
        "  output: {model: 'qwen3:8b', target: gpu0, body: {defaults: {stop: [\"\\n\\n\"], n: 1.0}}}\n"
        '  own: {kind: embed, think: false, system: {text: "two\\nlines: # \\U0001f600"}}\n'
        "models: {settings: {'qwen3:8b': {body: {overrides: {a: null}}}}, writers: {ollama-models: cpu}}\n"
        "gateway: {max_body: 1.5g, access_log: 0.1}\n"
    )
    shown = tmp_path / "shown.yaml"
    shown.write_text(run("config", "show", "--config", str(file)).stdout)
    assert load_settings(shown).settings == load_settings(file).settings
    assert set(yaml.safe_load(shown.read_text())) == set(load_settings(file).settings.model_dump())


EFFECTIVE = {
    "roles": {
        "output": {
            "model": {"value": "mine", "source": "override"},
            "target": {"value": "auto", "source": "default"},
            "body": {
                "defaults": {"value": {"a": 1}, "source": "override"},
                "overrides": {"value": {}, "source": "default"},
            },
        },
        "made-here": {
            "model": {"value": "other", "source": "override"},
            "kind": {"value": "embed", "source": "override"},
            "target": {"value": "auto", "source": "default"},
        },
    }
}


def test_config_show_has_what_was_changed_over_the_api(
    run: Run, tmp_path: Path, daemon: StandInDaemon
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "state: {dir: state}\ninstances:\n  cpu: {template: ollama-cpu}\n  b: {template: ollama-cpu}\n"
    )
    daemon.has(
        instance("cpu", ttl_s=7.0, pinned=True), instance("b"), instance("nas", driver="external", ttl_s=0)
    )
    daemon.answers["GET /api/settings/models/effective"] = Answer(EFFECTIVE)
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url=daemon.url, config=str(file))
        output = run("config", "show", "--config", str(file)).stdout
        lock.describe(url=daemon.url, config="/etc/other.yaml")
        differs = run("config", "show", "--config", str(file)).stdout.splitlines()[2]
    finally:
        lock.release()
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert lines[2] == "server:"
    assert differs == (f"# warning: the daemon runs with the file /etc/other.yaml, this command with {file}")
    assert lines[1] == f"# the values with the source `override` were changed over the API of {daemon.url}"
    overridden = [line for line in lines if line.endswith(" # override")]
    assert overridden[:4] == [
        "ttl_s: 7 # override",
        "pinned: true # override",
        "model: mine # override",
        "defaults: {a: 1} # override",
    ]
    shown = tmp_path / "shown.yaml"
    shown.write_text(output)
    settings = load_settings(shown).settings
    assert settings.roles["output"].model == "mine"
    assert settings.roles["made-here"].model == "other"
    assert settings.instances["cpu"].ttl_s == 7
    assert settings.instances["b"].ttl_s is None


def test_config_show_says_when_nobody_was_asked(run: Run, tmp_path: Path) -> None:
    assert "# no daemon runs: what was changed over the API is left out" in run("config", "show").stdout


def test_config_show_works_while_the_daemon_does_not_answer(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("state: {dir: state}\n")
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url="http://127.0.0.1:1")
        result = run("config", "show", "--config", str(file))
    finally:
        lock.release()
    assert result.exit_code == 0
    assert "the daemon was not asked: the daemon at http://127.0.0.1:1 cannot be reached" in result.stdout


def test_config_show_never_shows_a_secret(run: Run, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    file = tmp_path / "c.yaml"
    file.write_text("server: {key_file: key}\nengine: {url: 'tcp://me:hunter2@engine:2375'}\n")
    result = run("config", "show", "--config", str(file))
    assert KEY not in result.output
    assert "hunter2" not in result.output
    assert f"key_file: {tmp_path}/key" in result.stdout


def test_a_wrong_configuration_is_exit_2_with_file_line_and_key(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("server:\n  prot: 1\nlifecycle: {ttl_s: soon}\n")
    for command in (("config", "show"), ("templates", "check"), ("status",), ("reap",), ("serve",)):
        result = run(*command, "--config", str(file))
        assert result.exit_code == 2, command
        assert f"{file}:2: server.prot: unknown key; did you mean 'port'?" in result.stderr
        assert f"{file}:3: lifecycle.ttl_s" in result.stderr
        assert result.stderr.startswith("error: 2 problems\n")
        assert result.stdout == ""


def test_templates_check_has_a_line_for_every_template(run: Run) -> None:
    result = run("templates", "check")
    assert result.exit_code == 0
    cpu, gpu = result.stdout.splitlines()
    assert cpu.startswith("ollama-cpu: ok (cpu, ollama/ollama:")
    assert gpu.startswith("ollama-gpu: ok (gpu, ollama/ollama:")


def test_templates_check_warns_of_what_is_allowed_and_dangerous(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MANAGER_ALLOW__BINDS", '["/", "/srv/models"]')
    result = run("templates", "check")
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: allow.binds: '/' lets templates mount the whole file system of the host\n"
    )


def test_a_bind_without_its_directory_is_a_warning_of_templates_check_and_doctor(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").mkdir()
    mount = f"{{source: {tmp_path}/gone, target: /models, read_only: true}}"
    for name in ("used", "unused"):
        (tmp_path / "t" / f"{name}.yaml").write_text(
            f"image: ollama/ollama:1\ndevice: cpu\nvolumes: [{mount}]\n"
        )
    (tmp_path / "ollama-manager.yaml").write_text(
        f"templates: {{dir: t}}\nallow: {{binds: [{tmp_path}]}}\ninstances: {{cpu: {{template: used}}}}\n"
        f"engine: {{url: 'unix://{tmp_path}/engine.sock'}}\ngpus: none\n"
    )
    monkeypatch.delenv("DOCKER_HOST")
    missing = f"volumes.0.source: there is no {tmp_path}/gone on this machine"
    result = run("templates", "check")
    assert result.exit_code == 0
    assert result.stderr.count("warning: template") == 2
    assert f"warning: template used: {missing}" in result.stderr
    (found,) = (
        one for one in json.loads(run("doctor", "--json").stdout)["checks"] if one["check"] == "templates"
    )
    assert found["verdict"] == "warning"
    assert f"template used: {missing}" in found["message"]
    assert "unused" not in found["message"]
    assert "create the directory" in found["remedy"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "instances: {cpu: {template: olama-cpu}}",
            "c.yaml:1: instances.cpu.template: 'olama-cpu' is no template",
        ),
        ("templates: {dir: gone}", "templates.dir: cannot be read"),
        (
            "instances: {g: {template: ollama-gpu}}\nroles: {thinking: {policy: cpu_only, target: g}}",
            "roles.thinking.target",
        ),
        ("server: {key_file: gone}", "server.key_file: No such file or directory"),
    ],
)
def test_config_show_reports_what_serve_reports(run: Run, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "c.yaml").write_text(text + "\n")
    results = [run(*command, "--config", "c.yaml") for command in (("config", "show"), ("serve",))]
    assert [result.exit_code for result in results] == [2, 2]
    assert problem in results[0].stderr
    assert results[0].stderr == results[1].stderr


def test_config_show_works_for_a_user_that_may_not_read_the_key(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("server: {key_file: key}\n")

    def refuse(_path: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("manager.settings.load.open_regular", refuse)
    assert run("config", "show", "--config", "c.yaml").exit_code == 0


def test_a_template_that_is_not_allowed_is_exit_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.yaml").write_text("image: evil/image:1\ndevice: cpu\nprivileged: true\n")
    monkeypatch.setenv("OLLAMA_MANAGER_TEMPLATES__DIR", str(tmp_path))
    result = run("templates", "check")
    assert result.exit_code == 2
    assert f"{tmp_path}/evil.yaml:1: image" in result.stderr
    assert f"{tmp_path}/evil.yaml:3: privileged" in result.stderr


def test_an_instance_without_its_template_is_exit_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("instances: {cpu: {template: olama-cpu}}\n")
    result = run("templates", "check", "--config", "c.yaml")
    assert result.exit_code == 2
    assert "did you mean 'ollama-cpu'?" in result.stderr


def test_a_running_daemon_is_found_by_its_state_directory_and_given_its_key(
    daemon: StandInDaemon, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "ollama-manager.yaml").write_text("server: {key_file: key}\nstate: {dir: state}\n")
    daemon.has()
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url=daemon.url)
        assert run("status").exit_code == 0
    finally:
        lock.release()
    assert daemon.seen[0].headers["Authorization"] == f"Bearer {KEY}"


def test_with_no_daemon_running_the_configured_address_is_asked_without_the_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "ollama-manager.yaml").write_text("server: {key_file: key, port: 11600}\n")
    assert find_daemon(None, None) == Endpoint("http://127.0.0.1:11600", None)


@pytest.fixture
def planted(daemon: StandInDaemon, tmp_path: Path) -> Iterator[Path]:
    """A state directory that names the stand-in as the daemon that holds it, with a key and another port."""
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o644)
    (tmp_path / "ollama-manager.yaml").write_text(
        "server: {key_file: key, port: 11600}\nstate: {dir: state}\n"
    )
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    lock.describe(url=daemon.url)
    yield tmp_path / "state"
    lock.release()


CONFIGURED = "http://127.0.0.1:11600"


@pytest.mark.parametrize(
    "names", [["", "daemon.lock", "daemon.json"], ["daemon.json"], ["daemon.lock"], [""]]
)
@pytest.mark.parametrize("variable", ["", "a-key-of-the-environment"])
def test_no_key_goes_to_an_address_in_files_of_somebody_else(
    daemon: StandInDaemon, planted: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], variable: str
) -> None:
    for name in names:
        give(planted / name)
    monkeypatch.setenv("OLLAMA_MANAGER_KEY", variable)
    assert find_daemon(None, None) == Endpoint(CONFIGURED, variable or None)
    assert daemon.seen == []


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_no_key_goes_to_an_address_that_others_can_have_written(planted: Path, mode: int) -> None:
    planted.chmod(mode)
    assert find_daemon(None, None) == Endpoint(CONFIGURED, None)


def test_root_finds_the_daemon_of_a_user_whose_own_file_the_key_is(
    daemon: StandInDaemon, planted: Path, tmp_path: Path
) -> None:
    for file in (planted, planted / "daemon.lock", planted / "daemon.json", tmp_path / "key"):
        give(file)
    assert find_daemon(None, None) == Endpoint(daemon.url, KEY)


def test_the_configuration_of_a_user_in_whose_directory_root_stands_is_not_read(
    daemon: StandInDaemon, planted: Path, run: Run, tmp_path: Path
) -> None:
    for file in (tmp_path, tmp_path / "ollama-manager.yaml", planted, *planted.iterdir()):
        give(file)
    for command in (("status",), ("reap",), ("start", "cpu"), ("config", "show"), ("serve",)):
        result = run(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ollama-manager.yaml belongs to nobody")
    assert daemon.seen == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:11435"),
        ("::", "http://[::1]:11435"),
        ("192.0.2.7", "http://192.0.2.7:11435"),
        ("::1", "http://[::1]:11435"),
    ],
)
def test_a_daemon_that_listens_everywhere_is_asked_on_loopback(tmp_path: Path, host: str, url: str) -> None:
    (tmp_path / "ollama-manager.yaml").write_text(f"server: {{key_file: key, host: '{host}'}}\n")
    assert find_daemon(None, None).url == url


def test_the_key_is_in_no_description_of_the_endpoint() -> None:
    assert KEY not in repr(Endpoint("http://a:1", KEY))


def test_reap_asks_the_daemon_that_holds_the_state_directory(
    daemon: StandInDaemon, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MANAGER_STATE__DIR", str(tmp_path / "state"))
    daemon.has()
    row = {"id": "cpu", "action": "stopped", "detail": "idle past its TTL of 900 s"}
    daemon.answers[f"POST {API}/reap"] = Answer({"instances": [row], "count": 1})
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url=daemon.url)
        result = run("reap")
    finally:
        lock.release()
    assert (result.exit_code, result.stdout) == (0, "cpu: stopped: idle past its TTL of 900 s\n")


@pytest.mark.parametrize("dry_run", [False, True])
def test_only_a_sweep_that_is_no_dry_run_leaves_events(run: Run, tmp_path: Path, *, dry_run: bool) -> None:
    (tmp_path / "c.yaml").write_text(f"state: {{dir: {tmp_path}/state}}\nengine: {{timeout_s: 0.5}}\n")
    assert run("reap", *(["--dry-run"] if dry_run else []), "--config", "c.yaml").exit_code == 1
    with closing(sqlite3.connect(tmp_path / "state" / "registry.sqlite3")) as database:
        kinds = [kind for (kind,) in database.execute("SELECT kind FROM events")]
    assert kinds == ([] if dry_run else ["engine_down"])


def test_reap_by_itself_without_an_engine_is_exit_1_even_without_home_and_terminal(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"state: {{dir: {tmp_path}/state}}\nengine: {{timeout_s: 0.5}}\n")
    done = subprocess.run(
        [sys.executable, "-m", "manager", "reap", "--config", str(tmp_path / "c.yaml")],
        env={"PATH": "/usr/bin:/bin", "DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    (first, second) = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert "doctor" in second
