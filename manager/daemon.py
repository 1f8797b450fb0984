"""Runs a daemon: until it is stopped or replaced, or for one clean-up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from manager import __version__
from manager.adapters.tls import WatchedTls, listener_tls_of, own_tls_of
from manager.claims import id_lock_of
from manager.errors import ForeignOwnerError, ManagerIdChangedError
from manager.handover import CLAIMS_WITHIN_S, Giving, Heir, Predecessor, Succession, replace_daemon
from manager.relay.connections import ConnectionLimit
from manager.relay.front import listening_with
from manager.relay.relay import Limits, Relay
from manager.reloading import Reloader, log_weak_key
from manager.remaining import Elsewhere, Remaining
from manager.services.world import no_step
from manager.serving import (
    DescriptorWatch,
    Secure,
    Server,
    connection_budget,
    inherited_listener,
    listening,
    raise_descriptor_limit,
    serve_until_stopped,
    server_config,
    tune_interpreter,
    url_of,
)
from manager.settings import (
    key_weaknesses,
    load_templates,
    read_keys,
    resolve_instances,
    template_warnings,
)
from manager.settings.addresses import is_loopback
from manager.web.app import application
from manager.wire.access import Access

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from manager.adapters.log_writer import LogWriter
    from manager.api.backend import Backend
    from manager.services.instances.sweeps import Swept
    from manager.settings import LoadedSettings, Settings
    from manager.settings.changes import Changes
    from manager.settings.model import LogSettings

from manager.app import Daemon, open_daemon

_log = structlog.get_logger("daemon")

# Begins what is for the ledger of the daemon that goes on; all else is for its history.
_CLOSINGS = b"closings "


async def serve(
    loaded: LoadedSettings,
    *,
    log: LogWriter | None = None,
    read_again: Callable[[], LoadedSettings] | None = None,
    configure_log: Callable[[LogSettings, tuple[str, ...]], None] = lambda _settings, _keys: None,
    on_step: Callable[[str, str], Awaitable[None]] = no_step,
    stop_instances: bool = False,
    take_over: bool = False,
    replaces: bool = False,
) -> None:
    """Run the daemon until SIGTERM or SIGINT. Containers keep running and are adopted by the next one.

    SIGHUP has the configuration read again (`manager.reloading`). Another daemon may replace this one
    meanwhile (`manager.handover`).

    Args:
        loaded: the configuration.
        log: takes one line a request; None: requests are not logged.
        read_again: reads the configuration for a reload.
        configure_log: changes the level of the log, and has it hide new keys.
        on_step: see `World`.
        stop_instances: stop the containers too, once the last stream has ended.
        take_over: see `takes_over` of `open_daemon`.
        replaces: replace the daemon that runs, if one does.

    Raises:
        ManagerError: it could not be started.
        BaseExceptionGroup: something that must go on for ever ended; the daemon is stopped then.
    """
    keys = _keys_of(loaded.settings)
    tls = await asyncio.to_thread(_listener_tls, loaded.settings)
    host, port = loaded.settings.server.host, loaded.settings.server.port
    listener = inherited_listener(host, port)
    predecessor = await _predecessor(loaded) if replaces else None
    if predecessor is not None:
        _log.info("replacing", pid=predecessor.pid)
        passed = predecessor.usable_listener(host, port)
        listener = listener or passed
    serves = partial(
        _serve_once,
        log=log,
        read_again=read_again,
        configure_log=configure_log,
        on_step=on_step,
        stop_instances=stop_instances,
        take_over=take_over,
        tls=tls,
    )
    elsewhere = Elsewhere(None if predecessor is None else predecessor.line)
    start = _Start(loaded, keys, listener, predecessor, elsewhere=elsewhere)
    ending: list[asyncio.Task[None]] = []
    while True:
        failed: asyncio.Future[_Start] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(serves(start, failed))
        either: list[asyncio.Future[Any]] = [task, failed]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not failed.done():
            break
        _log.error("not_replaced", hint="the new daemon has ended; this one serves again")
        ending.append(task)
        start = failed.result()
    try:
        await task
    finally:
        start.elsewhere.close()
        for earlier in ending:
            await earlier
    _log.info("ended")


@dataclass(frozen=True, slots=True)
class _Start:
    """The things that a daemon begins to serve with.

    Attributes:
        loaded: the configuration.
        keys: those of the operator's files.
        listener: None: it makes one.
        predecessor: the daemon of another process that it replaces.
        earlier: the server of this process that was not replaced after all, and who takes its connections.
        elsewhere: the open requests of either.
    """

    loaded: LoadedSettings
    keys: tuple[str, ...]
    listener: socket.socket | None = None
    predecessor: Predecessor | None = None
    earlier: tuple[Server, Heir] | None = None
    elsewhere: Elsewhere = field(default_factory=Elsewhere)


async def _serve_once(
    start: _Start,
    failed: asyncio.Future[_Start],
    *,
    log: LogWriter | None,
    read_again: Callable[[], LoadedSettings] | None,
    configure_log: Callable[[LogSettings, tuple[str, ...]], None],
    on_step: Callable[[str, str], Awaitable[None]],
    stop_instances: bool,
    take_over: bool,
    tls: WatchedTls | None,
) -> None:
    """Run the daemon until it is to end, or was replaced; as `serve`.

    Where the daemon that was to replace it ends before it serves, `failed` gets what the next one begins
    with, and this one ends its answers.
    """
    loaded, predecessor = start.loaded, start.predecessor
    settings = loaded.settings
    async with open_daemon(
        loaded,
        log=log,
        on_step=on_step,
        takes_over=take_over,
        claims_within_s=0.0 if predecessor is None else CLAIMS_WITHIN_S,
        others_work=partial(_works_unseen, start),
    ) as daemon:
        _warn(loaded)
        with start.listener or listening(settings.server.host, settings.server.port) as listener:
            url = url_of(settings.server.host, settings.server.port, tls=tls is not None)
            daemon.state_lock.describe(url=url, config=loaded.file_name)
            access = _access_of(daemon, settings, start.keys)
            relay = relay_of(daemon, settings, access)
            budget = connection_budget(raise_descriptor_limit(), len(settings.instances))
            connections = ConnectionLimit(budget.most, budget.spare)
            watch = DescriptorWatch(relay.loop, lambda: connections.close_quiet() + relay.close_idle())
            server = Server(
                server_config(
                    application(daemon.backend, access=access),
                    listening_with(relay, connections),
                ),
                (relay.drain, daemon.backend.passing.passages.drain, daemon.backend.runs.drain),
                settings.gateway.drain_timeout_s,
                secure=None if tls is None else Secure(lambda: tls.current, connections),
            )

            new_keys = partial(_new_keys, daemon, configure_log)

            def apply(changed: Changes, keys: tuple[str, ...]) -> None:
                now = changed.loaded.settings
                new_keys(now, keys)
                access.configure(**access_rules(now))
                relay.limits = replace(relay.limits, keep_alive_s=now.gateway.keep_alive_s)
                daemon.reconfigure(changed)

            async def let_go() -> None:
                succession.close()
                await daemon.let_go()

            def serve_again(listener: socket.socket, heir: Heir) -> None:
                failed.set_result(
                    _Start(
                        reloader.in_force[0],
                        reloader.in_force[1],
                        listener,
                        earlier=(server, heir),
                        elsewhere=remaining.begin_here(),
                    )
                )

            reloader = Reloader(
                loaded, daemon.templates, start.keys, read=read_again, apply=apply, new_keys=new_keys
            )
            daemon.loops.update(
                {"reload": reloader.run} if tls is None else {"reload": reloader.run, "tls": tls.run}
            )
            tune_interpreter()
            remaining = await _joined(daemon, start.elsewhere)
            running = asyncio.ensure_future(daemon.run())
            giving = Giving(
                server,
                relay,
                listener,
                remaining,
                running,
                is_busy=lambda: daemon.busy or (predecessor is not None and not predecessor.has_ended),
                runs=daemon.backend.runs,
                freeze=daemon.backend.passing.routing.placement.freeze,
                let_go=let_go,
                patience_s=settings.gateway.drain_timeout_s,
                failed=serve_again,
            )
            succession = Succession(daemon.id_claim, settings.state.dir, giving.begin)
            greeting = asyncio.ensure_future(_greet(server, start, partial(_inherit, daemon.backend)))
            _log.info(
                "serving",
                url=url,
                version=__version__,
                state_dir=str(settings.state.dir),
                most_connections=budget.most,
            )
            try:
                await serve_until_stopped(
                    server,
                    listener,
                    running,
                    before_end=daemon.parts.capacity.stop_all if stop_instances else None,
                    on_hangup=reloader.ask,
                )
            except BaseExceptionGroup as group:
                refusal, _ = group.split((ForeignOwnerError, ManagerIdChangedError))
                if refusal is None:
                    raise
                raise _innermost(refusal) from group
            finally:
                greeting.cancel()
                await giving.end(partial(_hand_over, daemon.backend))
                succession.close()
                watch.stop()
                await relay.close()


def _keys_of(settings: Settings) -> tuple[str, ...]:
    files = settings.server.key_files
    keys = read_keys(files)
    log_weak_key(key_weaknesses(files, keys))
    return keys


def _new_keys(
    daemon: Daemon,
    configure_log: Callable[[LogSettings, tuple[str, ...]], None],
    settings: Settings,
    keys: tuple[str, ...],
) -> None:
    configure_log(settings.log, keys)
    daemon.backend.keyring.use_files(keys)


async def _hand_over(backend: Backend, take: Callable[[bytes], bool]) -> None:
    """Give the daemon that goes on what ended here: requests for its history, closings for its ledger."""
    await backend.history.hand_over(take)
    if backend.ledger.unwritten:
        take(_CLOSINGS + backend.ledger.hand_over())


def _inherit(backend: Backend, encoded: bytes) -> None:
    """Take what `_hand_over` of the daemon before this one gives."""
    if encoded.startswith(_CLOSINGS):
        backend.ledger.inherit(encoded.removeprefix(_CLOSINGS))
    else:
        backend.history.inherit(encoded)


def _warn(loaded: LoadedSettings) -> None:
    for danger in template_warnings(loaded):
        _log.warning("dangerous_template_setting", detail=danger)


def _works_unseen(start: _Start) -> bool:
    """Return whether the replaced daemon still ends requests and does not tell what they use."""
    predecessor = start.predecessor
    return predecessor is not None and not (predecessor.has_ended or start.elsewhere.is_open)


async def _joined(daemon: Daemon, elsewhere: Elsewhere) -> Remaining:
    """Take over what requests elsewhere use; return the open requests of this daemon."""
    fleet, passing = daemon.fleet, daemon.backend.passing
    slots, open_requests = passing.routing.slots, passing.passages.open_requests
    open_requests.elsewhere = elsewhere
    await elsewhere.begin(slots, lambda id_: fleet.get(id_).lease_elsewhere())
    return Remaining(slots, open_requests, daemon.backend.router.load())


def _listener_tls(settings: Settings) -> WatchedTls | None:
    """Read the files of `server.tls`, and try those of `instances.*.tls`.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    own_tls_of(settings)
    return listener_tls_of(settings)


async def _predecessor(loaded: LoadedSettings) -> Predecessor | None:
    """Have the daemon that runs give way; None where none runs.

    Raises:
        ConfigurationError: this daemon could not serve; the other one was not asked.
        ManagerError: the other one goes on.
    """
    settings = loaded.settings
    resolve_instances(loaded, load_templates(settings))
    channel = id_lock_of(settings).connect()
    if channel is None:
        return None
    return await asyncio.to_thread(
        replace_daemon,
        channel,
        settings.state.dir,
        within_s=settings.gateway.drain_timeout_s + CLAIMS_WITHIN_S,
    )


async def _greet(server: Server, start: _Start, inherit: Callable[[bytes], None]) -> None:
    """Take over the connections of the daemon before, once this one accepts its own.

    `inherit` takes the requests that end there, for the history.
    """
    if start.earlier is not None and start.earlier[0].is_stopped:
        server.stop()  # the signal came while this one was being built
    await server.accepts.wait()
    if start.predecessor is not None:
        start.predecessor.serves(server.adopt, inherit)
    if start.earlier is not None:
        start.earlier[1].stand_in(server, inherit)


async def sweep_once(loaded: LoadedSettings, *, dry_run: bool) -> tuple[Swept, ...]:
    """One clean-up without a daemon, by the stored last use; holds the state directory meanwhile.

    A dry run stops nothing and stores nothing, but a registry that is missing is made.

    Raises:
        StateDirHeldError: a daemon runs; it has to be asked.
        UnavailableError: the engine does not answer.
    """
    async with open_daemon(loaded, resume_idle_clock=True, dry_run=dry_run) as daemon:
        within_s = loaded.settings.engine.timeout_s
        running = asyncio.ensure_future(daemon.run_unscheduled())
        try:
            settled = asyncio.ensure_future(daemon.parts.first_look.settled(within_s=within_s))
            await asyncio.wait({running, settled}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                settled.cancel()
                running.result()
            settled.result()
            return await daemon.parts.sweeps.reap(dry_run=dry_run)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def relay_of(daemon: Daemon, settings: Settings, access: Access) -> Relay:
    wanted, passing = settings.gateway, daemon.backend.passing
    return Relay(
        passing.routing,
        pools=daemon.pools,
        access=access,
        limits=Limits(
            connect_timeout_s=wanted.connect_timeout_s,
            idle_timeout_s=wanted.idle_timeout_s,
            most_body_bytes=wanted.max_body,
            keep_alive_s=wanted.keep_alive_s,
        ),
        bodies=passing.bodies,
        requests=passing.requests,
        refusals=daemon.backend.refusals,
        unload=passing.volumes.unload,
        open_requests=passing.passages.open_requests,
    )


def _access_of(daemon: Daemon, settings: Settings, keys: tuple[str, ...]) -> Access:
    access = Access(**access_rules(settings))
    daemon.backend.keyring.use_files(keys)
    daemon.backend.keyring.tell(access.use)
    return access


def access_rules(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `Access` but the keys.

    Where other machines reach the daemon, a key is required and clients use names that are not known here:
    every Host is allowed, unless `server.allowed_hosts` differs from its default.
    """
    server = settings.server
    usual = type(server).model_fields["allowed_hosts"].default
    host = server.host.lower()
    machine = socket.gethostname().lower()
    short = machine.partition(".")[0]
    return {
        "allowed_hosts": server.allowed_hosts,
        "allowed_origins": server.allowed_origins,
        "own_names": {f"[{host}]" if ":" in host else host, machine, short, f"{short}.local"},
        "any_host": not is_loopback(host) and server.allowed_hosts == usual,
    }
