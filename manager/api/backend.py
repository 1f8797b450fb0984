"""The running daemon, as the routes see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from manager.api.granted import grant_of
from manager.api.passage import Passage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import Receive, Scope, Send

    from manager.api.passage import PassageLimits, Passages
    from manager.domain.roles import RequestKind
    from manager.domain.routing import Decision, Ranks, RequestFacts, Snapshot
    from manager.services.accounts.keyring import Keyring
    from manager.services.accounts.ledger import Ledger
    from manager.services.benchmarks.benchmarks import Benchmarks
    from manager.services.bodies import BodyBudget
    from manager.services.embeddings.collections import Collections
    from manager.services.following import Following
    from manager.services.gpus import GpuHistory
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.engine_link import EngineLink
    from manager.services.instances.first_look import FirstLook
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.lifts import Lifts
    from manager.services.instances.nodes import Nodes
    from manager.services.instances.service import Service
    from manager.services.instances.sweeps import Sweeps
    from manager.services.instances.upgrades import Upgrades
    from manager.services.journal import Journal
    from manager.services.llm import Llm
    from manager.services.models.catalogue import Catalogue
    from manager.services.models.fitting import Fitting
    from manager.services.models.keeping import Keeper
    from manager.services.models.loading import Loading
    from manager.services.models.model_settings import ModelSettings
    from manager.services.models.pulls import Pulls
    from manager.services.models.use import ModelUses
    from manager.services.models.volumes import Volumes
    from manager.services.overview import Overviews
    from manager.services.ports import Engine, ModelServer
    from manager.services.refusals import Refusals
    from manager.services.requests import Requests
    from manager.services.requests_history import History
    from manager.services.routing.attempting import Routing
    from manager.services.routing.model_status import ModelStatus
    from manager.services.routing.ranking import Ranking
    from manager.services.routing.stages import RolloutControl
    from manager.services.runs.runs import Runs


class Router(Protocol):
    """The routing of requests, to ask without making one."""

    def decide(self, facts: RequestFacts) -> Decision:
        """The decision for a request. Starts nothing and asks nobody."""
        ...

    def load(self) -> Mapping[str, int]:
        """Requests in flight by instance."""
        ...

    def snapshot(self) -> Snapshot:
        """All instances as routing sees them."""
        ...

    def ranks(self, decision: Decision) -> Ranks | None:
        """The comparison of the instances of a decision where a strategy orders them. Takes no turn."""
        ...

    @property
    def ranking(self) -> Ranking:
        """The signals of instances."""
        ...


@dataclass(frozen=True, slots=True)
class Passing:
    """The parts that requests to instances need."""

    routing: Routing
    catalogue: Catalogue
    volumes: Volumes
    pulls: Pulls
    server: ModelServer
    requests: Requests
    bodies: BodyBudget
    limits: PassageLimits
    passages: Passages

    def passage(
        self, scope: Scope, receive: Receive, send: Send, route: str, kind: RequestKind | None
    ) -> Passage:
        """Begin a request that is served on ASGI.

        Args:
            scope: of ASGI.
            receive: of ASGI.
            send: of ASGI.
            route: as it is logged.
            kind: None for requests that manage models.
        """
        grant = grant_of(scope)
        passage = Passage(
            scope,
            receive,
            send,
            begun=self.requests.begin(route, kind, scope["headers"], grant),
            routing=self.routing,
            bodies=self.bodies,
            limits=self.limits,
            by_model=kind is not None,
        )
        passage.attempting.grant = grant
        return passage


@dataclass(frozen=True, slots=True)
class Backend:
    """Handed to every router by `app.py`.

    `may_pull` says whether the operator allows an image. `nodes` are those of the swarm, None without one.
    """

    fleet: Fleet
    capacity: Capacity
    sweeps: Sweeps
    service: Service
    upgrades: Upgrades
    link: EngineLink
    first_look: FirstLook
    overviews: Overviews
    gpu_history: GpuHistory
    journal: Journal
    engine: Engine
    passing: Passing
    model_settings: ModelSettings
    loading: Loading
    uses: ModelUses
    fitting: Fitting
    status: ModelStatus
    keeper: Keeper
    lifts: Lifts
    router: Router
    may_pull: Callable[[str], bool]
    render_metrics: Callable[[], bytes]
    refusals: Refusals
    history: History
    keyring: Keyring
    following: Following | None
    ledger: Ledger
    runs: Runs
    collections: Collections
    llm: Llm
    benchmarks: Benchmarks
    rollout: RolloutControl
    nodes: Nodes | None = None
