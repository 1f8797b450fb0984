"""What the documents tell people to type works: each line of their `sh` blocks is of a kind tested here.

A line of a kind that is not known fails, so that a new one gets a test.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import requests
import yaml
from starlette.routing import Match

from manager.settings import load_settings, load_templates, resolve_instances
from manager.web.app import application
from manager.wire.access import Access
from manager.wire.routes import INFERENCE
from tests.support.daemon import ROOT, free_port, wait_for
from tests.support.engine import PrivateEngine, private_engine_obstacles, unconnected
from tests.support.swarm import swarm_obstacles

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENTS = (ROOT / "README.md", ROOT / "compose" / "README.md")
SWARM = ROOT / "docs" / "swarm.md"
README = DOCUMENTS[0].read_text(encoding="utf-8")
# Lines around ours; what they prepare is what test_compose.py prepares.
PREPARATIONS = re.compile(
    r"cd compose|echo \"DOCKER_GID=.* > \.env|\(umask 027; openssl .* > operator\.key\)"
    r"|umask 027|openssl rand -hex 16 > grafana\.password"
    r"|sudo chown root:docker (operator\.key|monitoring\.key grafana\.password)|\. \.venv/bin/activate"
    r"|export OLLAMA_HOST=http://127\.0\.0\.1:11435"
    r"|export DOCKER_GID=\$\(stat -c %g /var/run/docker\.sock\)"
    r"|export OPENAI_BASE_URL=http://127\.0\.0\.1:11435/v1 OPENAI_API_KEY=unused"
)


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command line of every `sh` block, without its comment."""
    lines = [
        re.sub(r"\s+#\s.*", "", line).strip()
        for path in DOCUMENTS
        for block in blocks(path.read_text(encoding="utf-8"), "sh")
        for line in block.splitlines()
    ]
    return sorted({line for line in lines if line})


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manager", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_documents_is_one_that_exists(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        assert words[1] in make_targets()
    elif words[0] == "ollama-manager":
        the_command_has_the_options(words[1:])
    elif words[0] == "curl":
        the_api_has(line)
    elif words[:2] in (["docker", "compose"], ["docker", "stack"]):
        named = [Path(word) for before, word in pairwise(words) if before in ("-f", "-c")]
        assert all((ROOT / "compose" / file).is_file() for file in named)
        assert {"up", "exec", "deploy"} & set(words)
        if "exec" in words:
            the_command_has_the_options(words[words.index("ollama-manager") + 1 :])
    else:
        assert PREPARATIONS.fullmatch(line), f"no test for: {line}"


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE))


def the_command_has_the_options(words: list[str]) -> None:
    names = [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)]
    groups = {"breaker", "config", "keys", "requests", "roles", "rollout", "runs", "templates", "tiers"}
    path = names[:2] if names[0] in groups else names[:1]
    answer = program(*path, "--help")
    assert answer.returncode == 0, answer.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in answer.stdout


def the_api_has(line: str) -> None:
    found = re.search(r"http://127\.0\.0\.1:11435(/\S*)", line)
    assert found, line
    method = "POST" if "-X POST" in line or " -d " in line else "GET"
    if method == "POST" and (found[1].encode() in INFERENCE or found[1] == "/api/pull"):
        return  # Ollama's own, which the contract suite looks at
    app = application(Mock(), access=Access(allowed_hosts=()))  # only asked for its paths
    scope: dict[str, Any] = {
        "type": "http",
        "path": found[1],
        "method": method,
        "headers": [],
        "root_path": "",
    }
    assert any(route.matches(scope)[0] is Match.FULL for route in app.routes)


def test_every_command_in_the_table_has_its_options() -> None:
    first_cells = re.findall(r"^\| `ollama-manager (.+?)` \|", README, re.MULTILINE)
    rows = [row for cell in first_cells for row in cell.split("`, `")]
    listed = {re.findall(r"[a-z-]+", row)[0] for row in rows}
    helped = re.search(r"Commands:\n(.*)", program("--help").stdout, re.DOTALL)
    assert helped
    assert listed == set(re.findall(r"^  ([a-z-]+) ", helped[1], re.MULTILINE))
    for row in rows:
        the_command_has_the_options(re.sub(r"[\[\]]", " ", row).split())


@pytest.mark.parametrize("text", blocks(README, "yaml"))
def test_a_configuration_of_the_readme_can_be_used(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    loaded = load_settings(file, environ={"HOME": str(tmp_path)})
    specs = resolve_instances(loaded, load_templates(loaded.settings))
    assert [spec.id for spec in specs] == list(yaml.safe_load(text)["instances"])


@pytest.mark.parametrize("text", blocks(SWARM.read_text(encoding="utf-8"), "yaml"))
def test_a_configuration_for_a_swarm_can_be_used(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    loaded = load_settings(file, environ={"HOME": str(tmp_path)})
    assert loaded.settings.uses_swarm
    assert resolve_instances(loaded, load_templates(loaded.settings))


@pytest.mark.parametrize("name", ["config.yaml", "swarm-config.yaml"])
def test_the_configuration_of_the_container_can_be_used(name: str, tmp_path: Path) -> None:
    loaded = load_settings(ROOT / "compose" / name, environ={"HOME": str(tmp_path)})
    assert loaded.settings.server.host == "0.0.0.0"
    assert loaded.settings.server.key_files == (Path("/run/secrets/operator-key"),)


@pytest.mark.parametrize("path", [*DOCUMENTS, SWARM], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_within_the_repository_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("number", "target"), [(0, "demo"), (1, "demo-swarm")])
def test_a_demo_does_what_its_document_shows_and_leaves_nothing(number: int, target: str) -> None:
    if target == "demo-swarm" and (obstacles := swarm_obstacles()):
        pytest.skip("; ".join(obstacles))
    with nothing_left() as environment:
        # The environment is the one that runs this test: it is not made anew in the middle of it.
        result = subprocess.run(
            ["make", "--old-file=setup", f"BIN={Path(sys.executable).parent}", target],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    shown = blocks((ROOT / "docs" / "demo.md").read_text(encoding="utf-8"), "text")[number]
    assert headings(shown) == headings(result.stdout)
    assert shell_lines(shown) == shell_lines(result.stdout)


@pytest.mark.timeout(300)
def test_an_interrupted_demo_leaves_nothing() -> None:
    with (
        nothing_left() as environment,
        subprocess.Popen(
            [sys.executable, "-m", "tests.tools.demo"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as demo,
    ):
        assert demo.stdout is not None
        for line in demo.stdout:
            if "X-Instance: cpu" in line:
                demo.terminate()
                break
        demo.stdout.read()
        assert demo.wait() == 130


@pytest.mark.timeout(300)
def test_make_run_serves_the_simulated_ollama_and_says_so_where_the_real_one_cannot_be_had(
    unconnected_engine: PrivateEngine, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # Under `make test` a make of its own would say where it is.
    left_out = ("OLLAMA_MANAGER_", "MAKE", "MFLAGS")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(left_out)},
        "DOCKER_HOST": unconnected_engine.url,
        "XDG_STATE_HOME": str(tmp_path),
    }
    log = tmp_path / "log"
    # A signal to make alone would not reach what it has begun, as Ctrl-C does.
    make = [
        "make",
        "-n",
        "--old-file=setup",
        f"BIN={Path(sys.executable).parent}",
        "run",
        f"ARGS=--port {port}",
    ]
    made = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    with log.open("wb") as sink:
        process = subprocess.Popen(
            shlex.split(made.removeprefix("exec ")),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: process.poll() is not None or answers(f"{url}/readyz"), within_s=90)
        assert "SIMULATED OLLAMA" in log.read_text(encoding="utf-8")
        for command in ("start", "stop"):
            answer = program("--url", url, command, "cpu")
            assert answer.returncode == 0, answer.stderr + log.read_text(encoding="utf-8")
        process.send_signal(signal.SIGINT)  # Ctrl-C
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
    assert unconnected_engine.client().containers.list(all=True) == []


@pytest.fixture
def unconnected_engine() -> Iterator[PrivateEngine]:
    """An engine that reaches no registry, whatever this machine does: nothing listens at its proxy."""
    if private_engine_obstacles():
        pytest.skip("; ".join(private_engine_obstacles()))
    with unconnected() as engine:
        yield engine


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def headings(transcript: str) -> list[str]:
    return re.findall(r"^\d+\. .*$", transcript, re.MULTILINE)


def shell_lines(transcript: str) -> list[str]:
    """The commands that are shown; addresses differ from run to run."""
    lines = re.findall(r"^ +\$ (.*)$", transcript, re.MULTILINE)
    return [re.sub(r"\d+\.\d+\.\d+\.\d+:\d+", "ADDRESS", line) for line in lines]


@contextmanager
def nothing_left() -> Iterator[dict[str, str]]:
    """The environment for a demo, which must leave no process, mount and file of its own behind.

    Its temporary directory, and so its engine's and its daemon's, is one that nobody else has.
    """
    with tempfile.TemporaryDirectory(prefix="oem-demo-", dir="/tmp") as directory:
        yield {**os.environ, "TMPDIR": directory}
        assert list(processes_with(directory)) == []
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        assert [line for line in mounts if directory in line] == []
        assert [path.name for path in Path(directory).iterdir() if path.name != "oem-engine.lock"] == []


def processes_with(directory: str) -> Iterator[str]:
    """Processes that name the directory in their command or their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(folder / name).read_bytes() for name in ("cmdline", "environ")]
        except OSError:
            continue
        if any(directory.encode() in text for text in texts):
            yield f"{folder.name}: {texts[0].decode(errors='replace')}"
