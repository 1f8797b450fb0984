"""`doctor` on machines that lack something; what it finds where all is well needs a real engine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.collections.file import create
from manager.adapters.locks import StateDirLock
from manager.adapters.owner import ManagerIdLock
from manager.adapters.registry.postgres import prepare
from manager.adapters.registry.tables import HEAD
from manager.cli.doctor_engine import Needs, card_finding, runtime_finding
from manager.cli.findings import Verdict
from manager.domain.gpu import Gpu, GpuProcess, unmeasured
from manager.errors import GpuQueryError
from manager.services.ports import EngineInfo
from tests.unit.cli.stand_in import Answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.support.postgres import Postgres
    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

UUID = "GPU-6f4b3a52-0000-4000-8000-000000000001"
CARD = Gpu(UUID, 0, "00000000:01:00.0", "NVIDIA H200", 140 * 2**30, 0, 140 * 2**30)
SECOND = replace(CARD, uuid="GPU-2", index=1, pci_bus_id="00000000:02:00.0")


def checks(result: Result) -> dict[str, dict[str, Any]]:
    return {one["check"]: one for one in json.loads(result.stdout)["checks"]}


@pytest.fixture
def port(tmp_path: Path) -> int:
    """A free port, which the configuration in the current directory names."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = int(probe.getsockname()[1])
    (tmp_path / "ollama-manager.yaml").write_text(f"server: {{port: {number}}}\nstate: {{dir: state}}\n")
    return number


def test_without_an_engine_it_says_what_is_broken_and_what_to_do_and_changes_nothing(
    port: int, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock"}
    argv = [sys.executable, "-m", "manager", "doctor"]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    broken = next(number for number, line in enumerate(lines) if line.startswith("✗ engine"))
    assert "No such file or directory" in lines[broken]
    assert "-> start it (`systemctl start docker`)" in lines[broken + 1]
    assert any(line.startswith("✓ configuration") for line in lines)
    assert any(line.startswith("✓ templates") for line in lines)
    assert lines[-1].startswith("1 fault")
    assert sorted(tmp_path.rglob("*")) == before


EXTERNAL = "instances: {nas: {driver: external, url: 'http://127.0.0.1:1'}}\n"


@pytest.mark.parametrize(
    ("more", "cards", "verdict"),
    [
        (EXTERNAL, (), "ok"),
        (EXTERNAL + "gpus: none\n", (CARD,), "ok"),
        (EXTERNAL, (CARD,), "broken"),
        ("instances: {cpu: {template: none-such}}\n", (), "broken"),
    ],
)
def test_an_engine_is_needed_only_where_an_instance_has_a_container(
    run: Run,
    port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    more: str,
    cards: Any,
    verdict: str,
) -> None:
    monkeypatch.setattr("manager.cli.doctor.read_cards", lambda: (cards, None))
    file = tmp_path / "ollama-manager.yaml"
    file.write_text(file.read_text() + more)
    found = checks(run("doctor", "--json"))
    assert found["engine"]["verdict"] == verdict
    assert found["engine"]["message"].startswith("not needed: no instance has a container") == (
        verdict == "ok"
    )
    assert ("containers" in found) == (verdict == "broken")


def test_a_daemon_on_another_port_is_not_judged_by_the_configured_one(
    run: Run, port: int, tmp_path: Path, daemon: StandInDaemon
) -> None:
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url=daemon.url)
        with socket.create_server(("127.0.0.1", port)):
            found = checks(run("doctor", "--json"))["port"]
    finally:
        lock.release()
    assert found["verdict"] == "ok"
    assert found["message"] == f"our daemon listens at {daemon.url}; configured is 127.0.0.1:{port}"


def test_a_daemon_with_the_same_manager_id_and_another_state_directory_is_a_fault(
    run: Run, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"doctor-{os.getpid()}"
    monkeypatch.setenv("OLLAMA_MANAGER_MANAGER_ID", name)
    other = ManagerIdLock(name, os.environ["DOCKER_HOST"])
    other.acquire()
    try:
        found = checks(run("doctor", "--json"))["daemon"]
        monkeypatch.setenv("OLLAMA_MANAGER_MANAGER_ID", f"{name}-other")
        of_another_id = checks(run("doctor", "--json"))["daemon"]
        monkeypatch.setenv("OLLAMA_MANAGER_MANAGER_ID", name)
        monkeypatch.setattr(ManagerIdLock, "holder", lambda _self: (4711, os.geteuid() + 1))
        of_another_user = checks(run("doctor", "--json"))["daemon"]
    finally:
        other.release()
    assert found["verdict"] == "broken"
    assert f"process {os.getpid()}" in found["message"]
    assert f"manager_id {name!r}" in found["message"]
    assert "another state directory" in found["message"]
    assert "manager_id" in found["remedy"]
    assert of_another_id["verdict"] == "ok"
    assert of_another_user["verdict"] == "warning", "a start goes ahead"


def test_as_json_every_check_has_a_verdict_and_a_remedy(run: Run, port: int) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    found = checks(result)
    assert found["engine"]["verdict"] == "broken"
    assert found["engine"]["remedy"]
    assert found["images"]["verdict"] == "skipped"
    assert found["port"] | {"message": ""} == {"check": "port", "verdict": "ok", "message": "", "remedy": ""}
    assert found["registry"]["verdict"] == "ok"
    assert found["daemon"]["message"].startswith("not running")


def test_a_state_directory_that_others_can_write_to_is_broken(run: Run, port: int, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o775)
    found = checks(run("doctor", "--json"))["state directory"]
    assert found["verdict"] == "broken"
    assert f"chmod go-w {tmp_path}/state" in found["message"]


@pytest.mark.timeout(60)
def test_a_registry_that_is_a_fifo_is_broken_and_not_waited_for(run: Run, port: int, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    os.mkfifo(tmp_path / "state" / "registry.sqlite3")
    found = checks(run("doctor", "--json"))["registry"]
    assert found["verdict"] == "broken"
    assert "is a FIFO; expected a regular file" in found["message"]


def test_a_dangerous_bind_is_a_warning(run: Run, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MANAGER_ALLOW__BINDS", '["/proc"]')
    found = checks(run("doctor", "--json"))["templates"]
    assert found["verdict"] == "warning"
    assert found["message"] == "allow.binds: '/proc' lets templates mount the host's processes"


def test_a_wrong_configuration_is_told_with_its_place(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ollama-manager.yaml").write_text("server:\n  prot: 1\n")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    found = checks(result)
    assert "ollama-manager.yaml:2: server.prot" in found["configuration"]["message"]
    assert found["all others"]["verdict"] == "skipped"
    assert "GPUs" in found


def test_a_port_that_another_program_holds_is_a_fault(run: Run, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        found = checks(run("doctor", "--json"))["port"]
    assert found["verdict"] == "broken"
    assert "Address already in use" in found["message"]
    assert f"ss -ltnp sport = :{port}" in found["remedy"]


def test_a_broken_registry_is_a_fault_and_stays_as_it_is(run: Run, port: int, tmp_path: Path) -> None:
    registry = tmp_path / "state" / "registry.sqlite3"
    registry.parent.mkdir()
    registry.write_bytes(b"this is no database")
    found = checks(run("doctor", "--json"))["registry"]
    assert found["verdict"] == "broken"
    assert f"mv -n {registry}" in found["remedy"]
    assert [file.name for file in registry.parent.iterdir()] == ["registry.sqlite3"]
    assert registry.read_bytes() == b"this is no database"


def test_the_extra_and_the_file_of_collections_are_looked_at(
    run: Run, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_installed = True

    def found() -> tuple[str, str]:
        one = checks(run("doctor", "--json"))["collections"]
        return one["verdict"], one["message"]

    monkeypatch.setattr("manager.adapters.vectors.installed", lambda: is_installed)
    assert found() == ("ok", "none yet; the first one makes their file")
    is_installed = False
    verdict, message = found()
    assert (verdict, "ollama-endpoint-manager[embeddings]" in message) == ("ok", True)
    (tmp_path / "state").mkdir(mode=0o700)
    create(tmp_path / "state/embeddings.sqlite3", 1)
    verdict, message = found()
    assert (verdict, "answer 501" in message) == ("warning", True)
    is_installed = True
    verdict, message = found()
    assert (verdict, "is whole" in message) == ("ok", True)


def test_a_broken_file_of_collections_is_a_fault_and_stays_as_it_is(
    run: Run, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.adapters.vectors.installed", lambda: True)
    path = tmp_path / "state/embeddings.sqlite3"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"no database, but long enough to have a head" * 10)
    found = checks(run("doctor", "--json"))["collections"]
    assert found["verdict"] == "broken"
    assert "mv " in found["remedy"]
    assert path.read_bytes().startswith(b"no database")


def test_too_little_space_for_another_version_is_a_warning(
    run: Run, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.adapters.vectors.installed", lambda: True)
    (tmp_path / "state").mkdir(mode=0o700)
    create(tmp_path / "state/embeddings.sqlite3", 1)
    table = tmp_path / "state/vectors/v1.lance/data.lance"
    table.parent.mkdir(parents=True)
    with table.open("wb") as file:
        file.truncate(2**43)  # a hole: it takes no space
    found = checks(run("doctor", "--json"))["collections"]
    assert (found["verdict"], "MiB are left" in found["message"]) == ("warning", True), found


def test_a_state_directory_that_is_none_is_a_fault(run: Run, port: int, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    found = checks(run("doctor", "--json"))
    assert found["state directory"]["verdict"] == "broken"


def test_a_running_daemon_is_named_and_asked_whether_it_is_ready(
    run: Run, port: int, tmp_path: Path, daemon: StandInDaemon
) -> None:
    (tmp_path / "ollama-manager.yaml").write_text(f"server: {{port: {daemon.port}}}\nstate: {{dir: state}}\n")
    daemon.answers["GET /readyz"] = Answer({"status": "not_ready", "reasons": ["engine: away"]}, 503)
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url=daemon.url)
        found = checks(run("doctor", "--json"))
    finally:
        lock.release()
    assert found["daemon"]["verdict"] == "warning"
    assert "engine: away" in found["daemon"]["message"]
    assert found["port"]["message"].endswith("is our daemon's")
    assert found["registry"]["verdict"] == "skipped"


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ("/etc/other.yaml", "the file /etc/other.yaml"),
        ("", "no configuration file"),
        (None, None),
        ("same", None),
    ],
)
def test_a_daemon_that_runs_with_another_file_is_told(
    run: Run, tmp_path: Path, daemon: StandInDaemon, config: str | None, theirs: str | None
) -> None:
    file = tmp_path / "ollama-manager.yaml"
    file.write_text(f"server: {{port: {daemon.port}}}\nstate: {{dir: state}}\n")
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url=daemon.url, config=str(file) if config == "same" else config)
        found = checks(run("doctor", "--json"))
    finally:
        lock.release()
    assert found.get("daemon's file", {}).get("message") == (
        None if theirs is None else f"the daemon runs with {theirs}, this command with {file}"
    )


def test_a_card_that_a_running_daemon_has_lost_is_a_fault(
    run: Run, port: int, tmp_path: Path, daemon: StandInDaemon
) -> None:
    (tmp_path / "ollama-manager.yaml").write_text(f"server: {{port: {daemon.port}}}\nstate: {{dir: state}}\n")
    daemon.answers["GET /readyz"] = Answer({"status": "ready", "reasons": []})
    cards: list[dict[str, Any]] = [
        {"uuid": "GPU-a", "lost": None},
        {"uuid": "GPU-b", "lost": "GPU GPU-b is lost: Xid 79"},
    ]
    daemon.answers["GET /api/runtime/compute/gpus"] = Answer({"gpus": cards, "error": None})
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url=daemon.url)
        broken = checks(run("doctor", "--json"))["daemon"]
        cards[1]["lost"] = None
        fine = checks(run("doctor", "--json"))["daemon"]
    finally:
        lock.release()
    assert broken["verdict"] == "broken"
    assert "GPU GPU-b is lost: Xid 79" in broken["message"]
    assert broken["remedy"]
    assert fine["verdict"] == "ok"


def test_models_that_differ_between_instances_are_a_warning(
    run: Run, port: int, tmp_path: Path, daemon: StandInDaemon
) -> None:
    (tmp_path / "ollama-manager.yaml").write_text(f"server: {{port: {daemon.port}}}\nstate: {{dir: state}}\n")
    daemon.answers["GET /readyz"] = Answer({"status": "ready", "reasons": []})
    daemon.answers["GET /api/runtime/compute/gpus"] = Answer({"gpus": [], "error": None})
    entry = {"id": "tiny:latest", "owned_by": "library", "digests": {"a" * 64: ["cpu"], "b" * 64: ["nas"]}}
    daemon.answers["GET /v1/models"] = Answer({"data": [entry]})
    lock = StateDirLock(tmp_path / "state", "default")
    lock.acquire()
    try:
        lock.describe(url=daemon.url)
        found = checks(run("doctor", "--json"))["models"]
        entry["digests"] = {"a" * 64: ["cpu", "nas"]}
        assert "models" not in checks(run("doctor", "--json"))
        del daemon.answers["GET /v1/models"]
        assert "models" not in checks(run("doctor", "--json"))
    finally:
        lock.release()
    assert found["verdict"] == "warning"
    assert "tiny:latest (aaaaaaaaaaaa on cpu; bbbbbbbbbbbb on nas)" in found["message"]
    assert "ollama pull NAME@INSTANCE" in found["remedy"]


def test_a_key_file_that_others_can_read_is_a_warning(run: Run, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a-key-that-nobody-may-see")
    key.chmod(0o644)
    (tmp_path / "ollama-manager.yaml").write_text("server: {key_file: key}\n")
    result = run("doctor", "--json")
    assert checks(result)["key"]["verdict"] == "warning"
    assert checks(result)["key"]["remedy"] == f"close it with chmod o= {key}"
    assert "a-key-that" not in result.output
    key.unlink()
    assert checks(run("doctor", "--json"))["key"]["verdict"] == "broken"


def test_a_template_that_is_refused_is_a_fault(run: Run, tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("image: evil/image:1\ndevice: cpu\n")
    (tmp_path / "ollama-manager.yaml").write_text("templates: {dir: .}\n")
    (tmp_path / "ollama-manager.yaml").rename(tmp_path / "c.cfg")
    found = checks(run("doctor", "--json", "--config", "c.cfg"))["templates"]
    assert found["verdict"] == "broken"
    assert "evil.yaml:1: image" in found["message"]


def refusal(kind: str) -> GpuQueryError:
    return GpuQueryError("the driver is away; load it", details={"nvml": kind})


def over_cards(*selectors: str, besides: tuple[str, ...] = ()) -> Needs:
    """An instance over these cards, and others that take any card."""
    others = tuple((instance, ("auto",)) for instance in besides)
    return Needs(gpu_instances=("both", *besides), selectors=(("both", selectors), *others))


@pytest.mark.parametrize(
    ("cards", "refused", "needs", "verdict"),
    [
        ((), refusal("library_missing"), Needs(), Verdict.FINE),
        ((), refusal("gpu_lost"), Needs(), Verdict.WARNING),
        ((), refusal("library_missing"), Needs(gpu_instances=("gpu0",)), Verdict.BROKEN),
        ((), None, Needs(), Verdict.FINE),
        ((), None, Needs(gpu_instances=("gpu0",)), Verdict.BROKEN),
        ((CARD,), None, Needs(gpu_instances=("gpu0",), selectors=(("gpu0", (UUID,)),)), Verdict.FINE),
        ((CARD,), None, Needs(gpu_instances=("gpu0",), selectors=(("gpu0", ("01:00.0",)),)), Verdict.FINE),
        ((CARD,), None, Needs(gpu_instances=("gpu0",), selectors=(("gpu0", ("02:00.0",)),)), Verdict.BROKEN),
        ((CARD,), None, Needs(gpu_instances=("gpu0", "gpu1")), Verdict.BROKEN),
        ((CARD, SECOND), None, over_cards(UUID, "02:00.0"), Verdict.FINE),
        ((CARD, SECOND), None, over_cards(UUID, "03:00.0"), Verdict.BROKEN),
        ((CARD, SECOND), None, over_cards(UUID, "01:00.0"), Verdict.BROKEN),
        ((CARD, SECOND), None, over_cards("all"), Verdict.FINE),
        ((CARD, replace(SECOND, uuid="MIG-1")), None, over_cards("all"), Verdict.BROKEN),
        ((), None, over_cards("all"), Verdict.BROKEN),
        ((CARD, SECOND), None, over_cards(UUID, "02:00.0", besides=("gpu0",)), Verdict.BROKEN),
        ((CARD, SECOND), None, over_cards("all", besides=("gpu0",)), Verdict.FINE),
    ],
)
def test_cards_are_judged_by_what_the_instances_need(
    cards: tuple[Gpu, ...], refused: GpuQueryError | None, needs: Needs, verdict: Verdict
) -> None:
    finding = card_finding(cards, refused, needs)
    assert finding.verdict is verdict
    assert bool(finding.remedy) is (verdict is not Verdict.FINE)


@pytest.mark.parametrize(
    ("info", "verdict", "words"),
    [
        (EngineInfo("28.5.2", False, False, ("runc", "nvidia")), Verdict.FINE, "has it"),
        (EngineInfo("28.5.2", False, False, ("runc",)), Verdict.WARNING, "names none"),
        (EngineInfo("4.3.1", False, False, ("runc", "nvidia"), True, False), Verdict.BROKEN, "gives no GPU"),
        (EngineInfo("5.8.6", False, False, ("runc",), True), Verdict.WARNING, "CDI"),
    ],
)
def test_whether_the_engine_can_give_cards_is_told_where_a_card_is_wanted(
    info: EngineInfo, verdict: Verdict, words: str
) -> None:
    finding = runtime_finding(info, Needs(gpu_instances=("gpu0",)), ())
    assert (finding.verdict, words in finding.message) == (verdict, True)
    only_a_card = runtime_finding(info, Needs(), (CARD,))
    assert only_a_card.verdict is (Verdict.FINE if verdict is Verdict.FINE else Verdict.WARNING)
    unneeded = runtime_finding(info, Needs(), ())
    assert unneeded.verdict is Verdict.FINE


def test_the_remedy_for_a_podman_that_does_not_run_names_its_unit(
    run: Run, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/podman.sock")
    result = run("doctor", "--json")
    assert "systemctl start podman.socket" in checks(result)["engine"]["remedy"]


def test_a_lost_card_is_a_fault_with_its_remedy() -> None:
    lost = replace(CARD, lost="it has fallen off the bus; reboot the host")
    finding = card_finding((lost,), None, Needs())
    assert finding.verdict is Verdict.BROKEN
    assert f"{UUID} is lost: it has fallen off the bus" in finding.message
    assert finding.remedy == "reboot the host"


def test_cards_are_shown_with_what_is_free_and_who_holds_the_rest() -> None:
    me = GpuProcess(os.getpid(), 2**30)
    full = replace(CARD, vram_total_bytes=3 * 2**30, vram_free_bytes=2 * 2**30, processes=(me,))
    message = card_finding((full,), None, Needs()).message
    assert "2.0 GiB of 3.0 GiB free" in message
    name = Path("/proc/self/comm").read_text().strip()
    assert f"held by {name} (pid {me.pid}) 1.0 GiB" in message
    assert "memory unknown" in card_finding((unmeasured(CARD),), None, Needs()).message
    assert "3.0 GiB, " in card_finding((replace(full, vram_free_bytes=None),), None, Needs()).message


def test_the_database_that_gateways_share_is_looked_at_and_left(
    run: Run, port: int, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database()
    monkeypatch.setenv("OLLAMA_MANAGER_STATE__URL", url)
    found = checks(run("doctor", "--json"))["database"]
    assert (found["verdict"], "is empty" in found["message"]) == ("ok", True)
    assert postgres.sql(url, "SELECT count(*) FROM pg_class WHERE relname = 'keys'") == [(0,)]
    prepare(url)
    assert f"(schema {HEAD})" in checks(run("doctor", "--json"))["database"]["message"]
    postgres.sql(url, "DROP TABLE learned_sizes")
    found = checks(run("doctor", "--json"))["database"]
    assert (found["verdict"], "some other program" in found["message"]) == ("broken", True)
    monkeypatch.setenv("OLLAMA_MANAGER_STATE__URL", "postgresql://om:s3cr3t@127.0.0.1:1/om")
    result = run("doctor", "--json")
    assert "there is no connection" in checks(result)["database"]["message"]
    assert "s3cr3t" not in result.stdout
    monkeypatch.setitem(sys.modules, "manager.adapters.registry.postgres", None)
    found = checks(run("doctor", "--json"))["database"]
    assert "pip install 'ollama-endpoint-manager[postgresql]'" in found["message"]
    assert found["message"].startswith("state.url: ")
