"""The words of real engines, Docker and Podman, and what they mean."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from manager.adapters import docker_answers as answers
from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER
from manager.errors import ContainerGoneError, EngineError, NetworkMissingError, Reason
from manager.services.ports import ContainerCounters, EngineEvent, EngineInfo, PullProgress

ID = "0123456789abcdef" * 4

_IN_USE = (
    f'Conflict. The container name "/m-ollama-cpu" is already in use by container "{ID}". '
    "You have to remove (or rename) that container to be able to reuse that name."
)
_NO_CONNECTIVITY = "driver failed programming external connectivity on endpoint m-ollama-cpu (5f3e): "
_DENIED = (
    "pull access denied for nobody/nothing, repository does not exist or may require 'docker login': "
    "denied: requested access to the resource is denied"
)
_HOOK_FAILED = (
    "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container "
    "process: error during container init: error running hook #0: error running hook: exit status 1, "
    "stdout: , stderr: Auto-detected mode as 'legacy'\nnvidia-container-cli: device error: GPU-1: "
)
_PODMAN_IN_USE = (
    'container create: creating container storage: the container name "m-ollama-cpu" is already in use by '
    f"{ID}. "
    "You have to remove that container to be able to reuse that name: that name is already in use"
)
_LISTEN = "listen tcp4 127.0.0.1:11500: bind: address already in use"

# As engines from 20.10 to 29 and the NVIDIA container toolkit say it.
REFUSALS = [
    (404, "No such image: ollama/ollama:0.32.15", Reason.IMAGE_MISSING),
    (404, "manifest for ollama/ollama:nope not found: manifest unknown", Reason.IMAGE_MISSING),
    (404, _DENIED, Reason.IMAGE_MISSING),
    (409, _IN_USE, Reason.NAME_CONFLICT),
    (500, f"{_NO_CONNECTIVITY}Bind for 127.0.0.1:1 failed: port is already allocated", Reason.PORT_TAKEN),
    (500, f"{_NO_CONNECTIVITY}Error starting userland proxy: {_LISTEN}", Reason.PORT_TAKEN),
    (500, "failed to bind host port 127.0.0.1:11500/tcp: address already in use", Reason.PORT_TAKEN),
    (500, f"Ports are not available: exposing port TCP 127.0.0.1:1: {_LISTEN}", Reason.PORT_TAKEN),
    (500, "Ports are not available: /forwards/expose returned status: 500", Reason.PORT_TAKEN),
    (500, 'could not select device driver "nvidia" with capabilities: [[gpu]]', Reason.GPU_MISSING),
    (500, f"{_HOOK_FAILED}unknown device: unknown", Reason.GPU_MISSING),
    (500, "nvidia-container-cli: nvml error: driver not loaded: unknown", Reason.GPU_MISSING),
    (500, "failed to inject CDI devices: unresolvable CDI devices nvidia.com/gpu=1", Reason.GPU_MISSING),
    (500, "mkdir /var/lib/docker/overlay2/3b1f: no space left on device", Reason.START_FAILED),
    (404, "page not found", Reason.START_FAILED),
    (400, "invalid reference format", Reason.START_FAILED),
    (409, "removal of container 0123 is already in progress", Reason.START_FAILED),
    (409, "Container 0123 is not running", Reason.START_FAILED),
    (500, "network ollama-manager not found", Reason.START_FAILED),
    (503, "", Reason.START_FAILED),
    (500, _PODMAN_IN_USE, Reason.NAME_CONFLICT),
    (404, "no such image: docker.io/nope/nope:1: image not known", Reason.IMAGE_MISSING),
    (404, "failed to find image nope/nope:1: docker.io/nope/nope:1: No such image", Reason.IMAGE_MISSING),
    (500, f"cannot listen on the TCP port: {_LISTEN}", Reason.PORT_TAKEN),
    (500, "setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=GPU-1", Reason.GPU_MISSING),
    (500, "network name net already used: network already exists", Reason.START_FAILED),
    (None, "  \n", Reason.START_FAILED),
]


@pytest.mark.parametrize(("status", "said", "reason"), REFUSALS)
def test_a_refusal_has_the_nearest_reason_and_the_engine_s_words(
    status: int | None, said: str, reason: Reason
) -> None:
    error = answers.refusal(status, said)
    assert type(error) is EngineError
    assert error.reason is reason
    assert error.message.startswith(said.strip() or "the engine refused without a word")


_PODMAN_NO_NETWORK = "container create: unable to find network with name or ID net: network not found"


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (404, "network ollama-manager not found", NetworkMissingError),
        (404, "could not find a network matching network mode x: network x not found", NetworkMissingError),
        (500, _PODMAN_NO_NETWORK, NetworkMissingError),
        (404, _PODMAN_NO_NETWORK, NetworkMissingError),
        (404, f"No such container: {ID}", ContainerGoneError),
        (404, 'no container with name or ID "m-ollama-cpu" found: no such container', ContainerGoneError),
        (404, 'no container with name or ID "network-1" found: no such container', ContainerGoneError),
        (404, f"container {ID} does not exist in database: no such container", ContainerGoneError),
    ],
)
def test_a_missing_network_and_a_missing_container_are_told_apart(
    status: int, said: str, kind: type[EngineError]
) -> None:
    assert type(answers.refusal(status, said)) is kind


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (409, f"Cannot kill container: {ID}: Container {ID} is not running"),
        (409, f"can only kill running containers. {ID} is in state exited: container state improper"),
        (500, f"can only kill running containers. {ID} is in state created: container state improper"),
    ],
)
def test_a_signal_to_a_container_that_does_not_run_is_recognised(status: int, said: str) -> None:
    assert answers.is_not_running(answers.refusal(status, said))
    assert not answers.is_not_running(answers.refusal(status, "the runtime failed"))


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (409, "network with name net already exists"),
        (500, "network name net already used: network already exists"),  # Podman 4.3
        (409, "network name net already used: network already exists"),  # Podman 5.8
    ],
)
def test_a_network_that_exists_is_recognised(status: int, said: str) -> None:
    assert answers.exists_already(answers.refusal(status, said))
    assert not answers.exists_already(answers.refusal(status, "no free address"))


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("No such image: a:b", "ollama-manager pull"),
        ("could not select device driver", "NVIDIA container toolkit"),
        ("unknown device", "nvidia-smi -L"),
        ("write /x: no space left on device", "free some disk space"),
        ("port is already allocated", "another container"),
        ("bind: address already in use", "another program"),
    ],
)
def test_where_something_can_be_done_the_message_says_what(said: str, remedy: str) -> None:
    assert remedy in answers.refusal(500, said).message


def inspected(**state: Any) -> dict[str, Any]:
    return {
        "Id": ID,
        "Name": "/m-ollama-cpu",
        "Config": {"Image": "ollama/ollama:0.32.15", "Labels": {LABEL_INSTANCE: "cpu"}},
        "State": state,
        "NetworkSettings": {"Networks": {"none": {"IPAddress": ""}, "net": {"IPAddress": "172.18.0.2"}}},
    }


def test_a_running_container_is_read_from_its_inspection() -> None:
    facts = answers.inspected(
        inspected(
            Status="running",
            Pid=4711,
            ExitCode=0,
            OOMKilled=False,
            StartedAt="2026-01-02T03:04:05.123456789Z",
        )
    )
    assert (facts.id, facts.name, facts.image) == (ID, "m-ollama-cpu", "ollama/ollama:0.32.15")
    assert (facts.status, facts.pid, facts.exit_code, facts.out_of_memory) == ("running", 4711, None, False)
    assert facts.address == "172.18.0.2"
    assert facts.labels == {LABEL_INSTANCE: "cpu"}
    assert facts.started_at == datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)


def test_a_container_that_ended_is_read_with_its_exit_and_its_error() -> None:
    facts = answers.inspected(
        inspected(Status="exited", Pid=0, ExitCode=137, OOMKilled=True, Error="it broke", StartedAt="")
    )
    assert (facts.status, facts.pid, facts.exit_code) == ("exited", None, 137)
    assert (facts.out_of_memory, facts.error, facts.started_at) == (True, "it broke", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05.5Z", datetime(2026, 1, 2, 3, 4, 5, 500_000, tzinfo=UTC)),
        (
            "2026-01-02T03:04:05.123456789+02:00",
            datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=timezone(timedelta(hours=2))),
        ),
        ("0001-01-01T00:00:00Z", None),  # never
        ("", None),
        (None, None),
        ("yesterday", None),
    ],
)
def test_times_are_read_in_every_zone_and_never_is_none(text: str | None, expected: datetime | None) -> None:
    assert answers.inspected(inspected(Status="exited", StartedAt=text)).started_at == expected


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("created", "created"),
        ("running", "running"),
        ("Running", "running"),
        ("paused", "paused"),
        ("restarting", "exited"),
        ("removing", "exited"),
        ("exited", "exited"),
        ("dead", "exited"),
        ("stopping", "exited"),
        ("", "exited"),
        (None, "exited"),
    ],
)
def test_every_state_means_one_of_four_and_an_unknown_one_is_looked_into(
    said: str | None, meant: str
) -> None:
    assert answers.inspected(inspected(Status=said)).status == meant
    assert answers.listed({"Id": ID, "State": said}).status == meant


def test_a_container_is_read_from_a_listing() -> None:
    facts = answers.listed(
        {
            "Id": ID,
            "Names": ["/m-ollama-cpu"],
            "Image": "ollama/ollama:0.32.15",
            "State": "exited",
            "Status": "Exited (137) 2 minutes ago",
            "Labels": {LABEL_MANAGER: "m", LABEL_INSTANCE: "cpu"},
            "NetworkSettings": {"Networks": {"net": {"IPAddress": "172.18.0.2"}}},
        }
    )
    assert (facts.name, facts.image) == ("m-ollama-cpu", "ollama/ollama:0.32.15")
    assert (facts.status, facts.exit_code) == ("exited", 137)
    assert facts.address == "172.18.0.2"
    assert facts.labels == {LABEL_MANAGER: "m", LABEL_INSTANCE: "cpu"}


def test_what_a_listing_leaves_out_is_unknown() -> None:
    facts = answers.listed({"Id": ID, "Names": None, "Labels": None, "State": "running", "Status": "Up 1 s"})
    assert (facts.name, facts.image, facts.exit_code, facts.address, facts.labels) == ("", "", None, None, {})
    assert answers.inspected({"Id": ID}).status == "exited"


EVENT = {
    "Type": "container",
    "Action": "die",
    "Actor": {"ID": ID, "Attributes": {LABEL_INSTANCE: "cpu", "exitCode": "137", "name": "m-ollama-cpu"}},
    "timeNano": 1,
}


def test_an_event_names_instance_container_action_and_exit_code() -> None:
    assert answers.event(EVENT) == EngineEvent("die", ID, "cpu", 137)


def test_podman_s_word_for_a_removal_means_the_same() -> None:
    assert answers.event({**EVENT, "Action": "remove"}) == EngineEvent("destroy", ID, "cpu", 137)


@pytest.mark.parametrize("exit_code", [None, "", "none"])
def test_an_event_without_an_exit_code_has_none(exit_code: object) -> None:
    actor = {"ID": ID, "Attributes": {LABEL_INSTANCE: "cpu", "exitCode": exit_code}}
    assert answers.event({**EVENT, "Action": "oom", "Actor": actor}) == EngineEvent("oom", ID, "cpu", None)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"Type": "container", "Action": "die"},
        {"Type": "container", "Action": "die", "Actor": {"ID": ID, "Attributes": None}},
        {**EVENT, "Type": "network"},
    ],
)
def test_an_event_of_anything_else_is_left_out(entry: dict[str, Any]) -> None:
    assert answers.event(entry) is None


def test_the_engine_is_described_by_what_decides_something() -> None:
    assert answers.engine_info(
        {
            "ServerVersion": "28.2.2",
            "OperatingSystem": "Docker Desktop",
            "SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless"],
            "Runtimes": {"runc": {}, "nvidia": {}},
        },
        None,
    ) == EngineInfo(version="28.2.2", desktop=True, rootless=True, runtimes=("runc", "nvidia"))
    assert answers.engine_info({"SecurityOptions": None}, None) == EngineInfo("", False, False, ())


@pytest.mark.parametrize(
    ("version", "gives_cards"), [((4, 3), False), ((5, 3), False), ((5, 4), True), ((6, 0), True)]
)
def test_podman_gives_cards_since_its_api_knows_cdi(version: tuple[int, int], gives_cards: bool) -> None:
    info = answers.engine_info({"ServerVersion": "x"}, version)
    assert (info.podman, info.gives_cards) == (True, gives_cards)


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ([{"Name": "Podman Engine", "Version": "4.3.1"}, {"Name": "Conmon", "Version": "2.1.6"}], (4, 3)),
        ([{"Name": "Podman Engine", "Version": "5.10.0-dev"}], (5, 10)),
        ([{"Name": "Podman Engine", "Version": None}], (0, 0)),
        ([{"Name": "Engine", "Version": "28.5.2"}, {"Name": "containerd", "Version": "2.1.9"}], None),
        ([], None),
        (None, None),
    ],
)
def test_podman_is_recognised_by_its_component(components: object, expected: object) -> None:
    assert answers.podman_version({"Version": "9.9", "Components": components}) == expected


def test_counters_are_sums_over_networks_and_seconds_of_a_processor() -> None:
    stats = {
        "networks": {"eth0": {"rx_bytes": 1, "tx_bytes": 20}, "eth1": {"rx_bytes": 300}},
        "cpu_stats": {"cpu_usage": {"total_usage": 1_500_000_000}},
    }
    assert answers.counters(stats) == ContainerCounters(network_bytes=321, cpu_s=1.5)


@pytest.mark.parametrize(
    "stats", [{}, {"networks": None, "cpu_stats": None}, {"cpu_stats": {"cpu_usage": {}}}]
)
def test_counters_of_a_container_that_has_ended_are_zero(stats: dict[str, Any]) -> None:
    assert answers.counters(stats) == ContainerCounters(network_bytes=0, cpu_s=0)


def test_a_line_of_a_pull_tells_its_layer_and_how_far_it_is() -> None:
    line = {
        "status": "Downloading",
        "id": "abc",
        "progressDetail": {"current": 5, "total": 10},
        "progress": "=",
    }
    assert answers.pull_progress("a:b", line) == PullProgress("Downloading", "abc", 5, 10)
    assert answers.pull_progress("a:b", {"status": "Pulling"}) == PullProgress("Pulling")


def test_a_pull_that_failed_is_a_missing_image_whatever_was_said() -> None:
    with pytest.raises(EngineError, match=r"a:b could not be pulled: dial tcp: lookup nowhere") as caught:
        answers.pull_progress("a:b", {"error": "dial tcp: lookup nowhere", "errorDetail": {}})
    assert caught.value.reason is Reason.IMAGE_MISSING


def test_the_name_of_an_image_is_not_told_again_where_the_engine_told_it() -> None:
    said = "manifest for a:b not found: manifest unknown"
    assert answers.not_pulled("a:b", said).message.count("a:b") == 1
    assert answers.not_pulled("a:b", said).message.startswith(f"could not be pulled: {said}; ")


def frame(output: int, text: bytes) -> bytes:
    return bytes([output, 0, 0, 0]) + len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", b""),
        (frame(1, b"one\n") + frame(2, b"two\n"), b"one\ntwo\n"),
        (frame(1, b"") + frame(1, b"after nothing\n"), b"after nothing\n"),
        (frame(1, "geöffnet".encode()[:4]) + frame(1, "geöffnet".encode()[4:]), "geöffnet".encode()),
        (frame(1, b"cut off")[:-3], b"cut "),
        (b"of a terminal\n", b"of a terminal\n"),
    ],
)
def test_logs_are_read_whatever_they_come_in(raw: bytes, text: bytes) -> None:
    assert answers.demultiplexed(raw) == text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"message": "No such image"}', "No such image"),
        (b'{"message": 7}', '{"message": 7}'),
        (b"[]", "[]"),
        (b"a proxy's own words \xff", "a proxy's own words \ufffd"),
    ],
)
def test_a_refusal_is_told_in_the_words_it_came_in(body: bytes, said: str) -> None:
    assert answers.said(body) == said
