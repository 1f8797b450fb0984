"""A real Docker Swarm on one machine: engines on hosts of their own, which one bridge connects.

A host has a network namespace, a host name and an engine. The test, and a daemon that it starts, are on the
bridge too: a port that a task publishes in host mode answers at `http://ADDRESS:PORT` of its host.
"""

from __future__ import annotations

import secrets
import socketserver
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Self

from docker.errors import APIError

from tests.simulated.image import ensure_simulated_image
from tests.support.daemon import wait_for
from tests.support.engine import PrivateEngine, private_engine_obstacles
from tests.support.engine_kinds import is_podman
from tests.support.host import HostError, claim_network, command

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    import docker
    from docker.models.networks import Network
    from docker.models.services import Service

CARD_KIND = "NVIDIA-GPU"
"""The kind of generic resource that a host announces its cards as."""

_HEARTBEAT_NS = 10**9  # a node that misses three of them is down
_LAN_BITS = 24
_DNS_PORT = 53
_POLL_S = 0.05
_BRIDGED_TRAFFIC_IS_FILTERED = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


def swarm_obstacles() -> list[str]:
    """Why a Swarm cannot run here; nothing when it can."""
    return ["Podman has no swarm"] if is_podman() else private_engine_obstacles()


class SwarmHost(PrivateEngine):
    """A host of a `Swarm`: an engine with a network namespace and a host name of its own.

    Args:
        swarm: what it is part of.
        hostname: its name; the node in the swarm has the same.
        address: its address on the bridge of the swarm.
        cards: UUIDs that it announces as generic resources.
    """

    _namespaces = ("--net", "--uts")

    def __init__(
        self, swarm: Swarm, hostname: str, address: ipaddress.IPv4Address, cards: Sequence[str]
    ) -> None:
        arguments = ["--iptables=true", "--dns", swarm.address]  # the firewall is that of the namespace
        super().__init__([*arguments, *(f"--node-generic-resource={CARD_KIND}={card}" for card in cards)])
        self._swarm = swarm
        self._link = f"{self._name}l"  # the bridge's end of its cable
        self.hostname = hostname
        self.address = str(address)
        self.cards = tuple(cards)
        self.node_id = ""

    @property
    def state(self) -> str:
        """The state of the node as the manager has it: `ready`, `down`, `unknown`, `disconnected`."""
        return str(self.node()["Status"]["State"])

    def node(self) -> dict[str, Any]:
        """The node as the manager has it."""
        found: dict[str, Any] = self._swarm.client().api.inspect_node(self.node_id)
        return found

    def wait_for_state(self, state: str, within_s: float = 30.0) -> None:
        wait_for(lambda: self.state, state.__eq__, within_s=within_s)

    def cut_network(self) -> None:
        """Pull the cable out. What is sent to the host, or by it, is lost without a word.

        Overlay networks reach the host again up to a minute after the network is mended; the same holds after
        a restart of the manager.
        """
        command("ip", "link", "set", self._link, "down")

    def mend_network(self) -> None:
        command("ip", "link", "set", self._link, "up")

    def drain(self) -> None:
        """Have the swarm end the tasks of the node, and give it no others."""
        self._change(lambda spec: spec.update(Availability="drain"))

    def activate(self) -> None:
        self._change(lambda spec: spec.update(Availability="active"))

    def label(self, **labels: str) -> None:
        """Set labels of the node, beside those that it has."""
        self._change(lambda spec: spec.setdefault("Labels", {}).update(labels))

    def inside(self, *arguments: str) -> str:
        """The output of a command with the network and the name of the host. Raises HostError."""
        assert self._holder is not None
        # The programs are those of this machine: the engine's root may have none but its own.
        return command("nsenter", "--target", str(self._holder.pid), *self._namespaces, "--", *arguments)

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change what the manager has of the node, however often the node itself changes meanwhile."""

        def changed() -> bool:
            node = self.node()
            change(node["Spec"])
            try:
                self._swarm.client().api.update_node(self.node_id, node["Version"]["Index"], node["Spec"])
            except APIError as error:
                if "out of sequence" not in str(error):
                    raise
                return False
            return True

        wait_for(changed)

    def _claimed(self) -> ipaddress.IPv4Network:
        return self._swarm.network  # hosts have the same default bridge, each in its own namespace

    def _connect(self, holder: int) -> None:
        network = self._swarm.network
        other_end = ("peer", "name", "eth0", "netns", str(holder))
        command("ip", "link", "add", self._link, "type", "veth", *other_end)
        command("ip", "link", "set", self._link, "master", self._swarm.bridge, "up")
        default_bridge = f"{list(network.subnets(new_prefix=_LAN_BITS))[1][1]}/{_LAN_BITS}"
        script = f"""set -e
            ip link set lo up
            ip address add {self.address}/{_LAN_BITS} dev eth0
            ip link set eth0 up
            ip link add {self._name} type bridge
            ip address add {default_bridge} dev {self._name}
            ip link set {self._name} up
            echo 1 > /proc/sys/net/ipv4/ip_forward
            echo {self.hostname} > /proc/sys/kernel/hostname"""
        self.inside("sh", "-c", script)

    def _interfaces(self) -> list[str]:
        return [self._link] if _has_interface(self._link) else []


class _NoNames(socketserver.BaseRequestHandler):
    """A resolver that knows no name. Engines ask it for what is not the name of a container or service."""

    def handle(self) -> None:
        question, connection = self.request
        no_such_name = b"\x81\x83" + b"\x00\x01" + bytes(6)  # flags, then how many of each section follow
        end = question.index(b"\0", 12) + 5  # of the first question: a name, a type and a class
        connection.sendto(question[:2] + no_such_name + question[12:end], self.client_address)


class Swarm:
    """A swarm, as a context manager. `swarm_obstacles` says what it needs.

    The first host, `manager`, is its only manager; the others are `worker`, `worker2` and so on. Each has the
    simulated Ollama's image, and none reaches anything outside. A node whose engine is silent is down within
    five seconds.

    The virtual addresses of services and the ingress network need the kernel's IPVS, which may be missing:
    services of tests have the endpoint mode `dnsrr` and publish their ports in host mode.

    Args:
        hosts: how many there are.
        cards: UUIDs of the cards that a host announces, by its name.
    """

    def __init__(self, hosts: int = 2, cards: Mapping[str, Sequence[str]] | None = None) -> None:
        self._names = ["manager", "worker", *(f"worker{number}" for number in range(2, hosts))][:hosts]
        self._cards = cards or {}
        self._network: ipaddress.IPv4Network | None = None
        self._resolver: socketserver.UDPServer | None = None
        self.bridge = f"oem{secrets.token_hex(4)}"
        self.hosts: tuple[SwarmHost, ...] = ()

    @property
    def manager(self) -> SwarmHost:
        return self.hosts[0]

    @property
    def worker(self) -> SwarmHost:
        return self.hosts[1]

    @property
    def network(self) -> ipaddress.IPv4Network:
        """All addresses in and on the hosts. The first of them is that of the bridge."""
        assert self._network is not None
        return self._network

    @property
    def address(self) -> str:
        """The address at which hosts and their containers reach what listens in the test."""
        return str(self.network[1])

    def __enter__(self) -> Self:
        try:
            self._set_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def client(self) -> docker.DockerClient:
        """The one client of the manager that the swarm itself uses."""
        return self._client

    def overlay(self, name: str) -> Network:
        """A new overlay network that containers may be attached to."""
        return self.client().networks.create(name, driver="overlay", attachable=True)

    def tasks(self, service: Service | str, **filters: Any) -> list[dict[str, Any]]:
        """Tasks of a service as the manager has them, the newest first."""
        id_ = service if isinstance(service, str) else service.id
        api: Any = self.client().api
        found = api.tasks({"service": id_, **filters})
        return sorted(found, key=lambda task: str(task["CreatedAt"]), reverse=True)

    def stop(self) -> None:
        """End all hosts, in whatever state they are; a second call does nothing."""
        if self.hosts:
            with ThreadPoolExecutor(len(self.hosts)) as pool:
                list(pool.map(SwarmHost.stop, self.hosts))
        if self._resolver is not None:
            self._resolver.shutdown()
            self._resolver.server_close()
            self._resolver = None
        if _has_interface(self.bridge):
            command("ip", "link", "delete", self.bridge)
        if self._lets_through():
            _iptables("--delete", *self._rule)

    def assert_clean(self) -> None:
        """Raises AssertionError that lists what the swarm has left on the machine."""
        for host in self.hosts:
            host.assert_clean()
        assert not _has_interface(self.bridge), f"interface {self.bridge} left behind"
        assert not self._lets_through(), f"firewall rule {self._rule} left behind"

    @property
    def _rule(self) -> tuple[str, ...]:
        return ("FORWARD", "--in-interface", self.bridge, "--out-interface", self.bridge, "--jump", "ACCEPT")

    def _lets_through(self) -> bool:
        return _iptables("--check", *self._rule)

    def _set_up(self) -> None:
        self._network = claim_network(self.bridge)
        # The firewall of a machine with a Docker Engine drops what one port of a bridge sends to another.
        if _BRIDGED_TRAFFIC_IS_FILTERED.exists() and not _iptables("--insert", *self._rule):
            raise HostError("iptables does not let the hosts of a swarm reach each other")
        self._resolver = socketserver.UDPServer((self.address, _DNS_PORT), _NoNames)
        Thread(target=self._resolver.serve_forever, args=(_POLL_S,), daemon=True).start()
        self.hosts = tuple(
            SwarmHost(self, name, self._network[number], self._cards.get(name, ()))
            for number, name in enumerate(self._names, 2)
        )
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            list(pool.map(SwarmHost.__enter__, self.hosts))
        self._client = self.manager.client()
        self._spread_image()
        self._client.swarm.init(
            advertise_addr=self.manager.address,
            listen_addr=f"{self.manager.address}:2377",
            default_addr_pool=[str(list(self._network.subnets(new_prefix=22))[1])],
            subnet_size=27,
            dispatcher_heartbeat_period=_HEARTBEAT_NS,
        )
        token = self._client.swarm.attrs["JoinTokens"]["Worker"]
        for host in self.hosts:
            with closing(host.client()) as client:
                if host is not self.manager:
                    client.swarm.join(
                        remote_addrs=[self.manager.address],
                        join_token=token,
                        advertise_addr=host.address,
                        listen_addr=f"{host.address}:2377",
                    )
                host.node_id = str(client.info()["Swarm"]["NodeID"])
        for host in self.hosts:
            host.wait_for_state("ready")

    def _spread_image(self) -> None:
        """Have the simulated Ollama's image in all engines, with the same id, as if it were pulled."""
        archive = b"".join(self._client.images.get(ensure_simulated_image(self._client)).save(named=True))
        for host in self.hosts[1:]:
            with closing(host.client()) as client:
                client.images.load(archive)


def _has_interface(name: str) -> bool:
    return subprocess.run(["ip", "link", "show", name], check=False, capture_output=True).returncode == 0


def _iptables(*arguments: str) -> bool:
    """Return whether it worked: a rule that is looked for is there."""
    with suppress(FileNotFoundError):
        result = subprocess.run(["iptables", "--wait", *arguments], check=False, capture_output=True)
        return result.returncode == 0
    return False
