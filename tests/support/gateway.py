"""A daemon in front of servers that somebody else runs: the gateway alone, without an engine."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tests.support.daemon import Daemon, wait_for
from tests.support.fixtures import new_manager_id
from tests.support.ollama import RunningOllama, running_ollama

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

NO_ENGINE = "unix:///nonexistent/docker.sock"


class Gateway(Daemon):
    """The daemon, and the servers behind it by the ids of their instances."""

    servers: dict[str, RunningOllama]

    def wait_until_usable(self, *ids: str) -> None:
        """Returns once these instances, or all, are ready and their models have been read."""
        wanted = ids or tuple(self.servers)
        for instance in wanted:
            self.wait_for_phase(instance, "ready")
            wait_for(lambda instance=instance: self._has_listed(instance))  # type: ignore[misc]

    def _has_listed(self, instance: str) -> bool:
        data = self.call("GET", "/v1/models").json()["data"]
        return any(instance in entry["instances"] for entry in data)


@contextmanager
def gateway_over(
    home: Path,
    ids: Sequence[str] = ("one",),
    *,
    knobs: Mapping[str, Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
    instances: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Gateway]:
    """A daemon with one external instance for each id, in front of a simulated Ollama of its own.

    Args:
        home: a directory of its own.
        ids: of the instances.
        knobs: of their servers, by id.
        config: sections of the configuration beside `instances`.
        instances: keys of instances beside driver and url, by id; an id that is not in `ids` is one without a
            server.
    """
    with ExitStack() as stack:
        servers = {id_: stack.enter_context(running_ollama(**(knobs or {}).get(id_, {}))) for id_ in ids}
        written = {
            id_: {"driver": "external", "url": server.url, **(instances or {}).get(id_, {})}
            for id_, server in servers.items()
        }
        full = {
            "manager_id": new_manager_id(),
            "gpus": "none",
            "instances": {**written, **{i: one for i, one in (instances or {}).items() if i not in ids}},
            "lifecycle": {"probe_interval_s": 0.5, "resync_interval_s": 1},
            **(config or {}),
        }
        daemon = Gateway(home, full, engine_url=NO_ENGINE)
        daemon.servers = servers
        stack.enter_context(daemon)
        daemon.start(until_ready=False)
        daemon.wait_until_alive()
        daemon.wait_until_usable()
        yield daemon
