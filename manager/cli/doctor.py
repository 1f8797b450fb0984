"""`doctor`: looks at everything that a daemon needs, changes nothing, says what to do about each fault."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manager.cli import findings
from manager.cli.client import Daemon, DaemonUnreachableError, RefusalError
from manager.cli.doctor_collections import collections_finding
from manager.cli.doctor_database import database_finding
from manager.cli.doctor_engine import Needs, card_finding, engine_findings, read_cards
from manager.cli.doctor_raw import raw_server
from manager.cli.doctor_swarm import swarm_findings
from manager.cli.doctor_tls import tls_findings
from manager.cli.failures import DONE, FAILED
from manager.cli.findings import Finding, Verdict, broken, fine, skipped, warning
from manager.cli.locate import configured_daemon
from manager.cli.model_list import PULL_AGAIN, differing_models
from manager.domain.gpu import AUTO
from manager.domain.instance import DeviceKind, Driver
from manager.domain.wording import digests_text, listed
from manager.errors import ConfigurationError, RegistryCorruptError, RegistryUnwritableError
from manager.settings import (
    key_weaknesses,
    load_settings,
    load_templates,
    missing_binds,
    packaged_templates,
    read_keys,
    resolve_instances,
    template_warnings,
)
from manager.settings.model import GPU_TEMPLATE
from manager.settings.ownership import directory_problem, is_trusted, user

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.adapters.locks import Holder
    from manager.domain.gpu import Gpu
    from manager.settings import LoadedSettings, Settings

_LITTLE_SPACE = 100 * 2**20
_OLLAMA_PORT = 11434
# File systems on which flock(2) may hold nobody off.
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "fuse.sshfs", "afs"})


def doctor(config: Path | None, *, as_json: bool) -> int:
    """Returns the exit code: 1 when something is broken; warnings are no failure."""
    found: list[Finding] = []
    for finding in examine(config):
        found.append(finding)
        if not as_json:
            findings.show(finding)
    click.echo(findings.as_json(found) if as_json else f"\n{findings.conclusion(found)}")
    return FAILED if findings.any_broken(found) else DONE


def examine(config: Path | None) -> Iterator[Finding]:
    """All findings, each as soon as it is known. What depends on something broken is skipped, and says so."""
    cards, refused = read_cards()
    try:
        loaded = load_settings(config)
    except ConfigurationError as error:
        yield broken(
            "configuration", error.message, "correct it; every key and what is allowed is named above"
        )
        yield card_finding(cards, refused, Needs())
        yield skipped("all others", "not looked at: they depend on the configuration")
        return
    settings = loaded.settings
    yield fine("configuration", _files(loaded))
    for file in settings.server.key_files:
        yield _key(file)
    yield from tls_findings(settings)
    needs, finding = _templates(loaded, cards)
    yield finding
    yield from engine_findings(settings, needs, cards)
    yield from swarm_findings(settings, needs.services)
    if settings.rollout.raw_url is not None:
        yield raw_server(settings.rollout.raw_url, settings.gateway.connect_timeout_s)
    yield card_finding(cards, refused, needs)
    yield from _state(loaded)


def _files(loaded: LoadedSettings) -> str:
    if loaded.file is None:
        return "no file: defaults, and what the environment says"
    return f"{loaded.file}, overlaid by {loaded.overlay}" if loaded.overlay else str(loaded.file)


def _key(file: Path) -> Finding:
    try:
        weaknesses = key_weaknesses((file,), read_keys((file,)))
    except ConfigurationError as error:
        return broken("key", str(error), f"put a key there: umask 077; openssl rand -hex 24 > {file}")
    if weaknesses:
        message, _, remedy = weaknesses[0].partition("; ")
        return warning("key", message, remedy)
    return fine("key", f"{file}, closed to others")


def _templates(loaded: LoadedSettings, cards: tuple[Gpu, ...]) -> tuple[Needs, Finding]:
    """The needs of the instances, as far as the templates can be used."""
    settings = loaded.settings
    directory = settings.templates.dir or packaged_templates()
    try:
        templates = load_templates(settings)
        specs = resolve_instances(loaded, templates)
    except ConfigurationError as error:
        remedy = (
            "correct the template, or allow it under `allow`; `ollama-manager templates check` looks again"
        )
        needs = Needs(
            instances=tuple(id_ for id_, one in settings.instances.items() if one.driver is Driver.DOCKER),
            uses_swarm=settings.uses_swarm,
        )
        return needs, broken("templates", error.message, remedy)
    # The nodes of a swarm have images and networks of their own.
    local = [spec for spec in specs if spec.driver is Driver.DOCKER]
    used = [spec.template for spec in local if spec.template is not None]
    gpu_ids = tuple(spec.id for spec in local if spec.device_kind is DeviceKind.GPU)
    found_cards = settings.gpus == "auto" and bool(cards)
    if found_cards and GPU_TEMPLATE in templates:
        used.append(templates[GPU_TEMPLATE])
    needs = Needs(
        gpu_instances=gpu_ids,
        selectors=tuple(
            (spec.id, spec.devices or (spec.device or AUTO,)) for spec in specs if spec.id in gpu_ids
        ),
        images=tuple(dict.fromkeys(template.image for template in used)),
        networks=tuple(dict.fromkeys(template.network for template in used)),
        instances=tuple(spec.id for spec in local),
        finds_cards=settings.gpus == "auto",
        uses_swarm=settings.uses_swarm,
        services=tuple(spec for spec in specs if spec.driver is Driver.SWARM),
    )
    if found_cards and (
        GPU_TEMPLATE not in templates or templates[GPU_TEMPLATE].device is not DeviceKind.GPU
    ):
        return needs, broken(
            "templates",
            f"{directory} has no template {GPU_TEMPLATE} with device: gpu, and there are GPUs for gpus: auto",
            f"add {GPU_TEMPLATE}.yaml, or set gpus: none",
        )
    dangers = template_warnings(loaded)
    missing = missing_binds(
        settings, {str(spec.template_name): spec.template for spec in specs if spec.template}
    )
    remedies = []
    if dangers:
        remedies.append("allow only directories with models, and keep templates to the daemon's user or root")
    if missing:
        remedies.append("create the directory; where this runs in a container, look on the engine's machine")
    if remedies:
        return needs, warning("templates", "\n".join((*dangers, *missing)), "\n".join(remedies))
    return needs, fine("templates", f"{', '.join(templates) or 'none'} in {directory}")


def _state(loaded: LoadedSettings) -> Iterator[Finding]:
    from manager.cli.locate import current_holder, file_of_daemon  # noqa: PLC0415

    settings = loaded.settings
    yield _directory(settings.state.dir)
    try:
        holder = current_holder(settings.state.dir)
    except ConfigurationError as error:
        yield broken("lock", error.message, "run this as the user that the daemon runs as")
        for check in ("registry", "collections"):
            yield skipped(check, "not looked at: the state directory cannot be read")
        return
    found = _daemon(loaded, holder)
    yield found
    if holder is not None and (differs := file_of_daemon(loaded, holder)) is not None:
        remedy = "name that of the daemon with --config or $OLLAMA_MANAGER_CONFIG to have it examined"
        yield warning("daemon's file", differs, remedy)
    if holder is not None and found.verdict is Verdict.FINE:
        yield from _models(Daemon(configured_daemon(loaded)))
    yield _registry(settings.state.dir / "registry.sqlite3", holder)
    if settings.state.url is not None:
        yield database_finding(settings.state.url)
    yield collections_finding(settings.state.dir, is_held=holder is not None)
    yield _port(settings, holder)


def _directory(state_dir: Path) -> Finding:
    existing = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    if not existing.is_dir():
        return broken("state directory", f"{existing} is no directory", "set state.dir to a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        remedy = f"make it writable for the daemon's user (now: {os.geteuid()}), or set state.dir"
        return broken("state directory", f"{existing} is not writable", remedy)
    if problem := directory_problem(state_dir):
        return broken(
            "state directory",
            problem,
            "or set state.dir to a directory of the daemon's user, closed to others",
        )
    kind = _file_system(existing)
    if kind in _REMOTE:
        remedy = "set state.dir to a local disk"
        return warning("state directory", f"{state_dir} is on {kind}, where locks may not hold", remedy)
    free = shutil.disk_usage(existing).free
    if free < _LITTLE_SPACE:
        return warning(
            "state directory", f"{state_dir} has {free // 2**20} MiB left", "free some space on that disk"
        )
    return fine(
        "state directory",
        f"{state_dir}, writable" if existing == state_dir else f"{state_dir}, to be created",
    )


def _file_system(path: Path) -> str:
    """The type of the file system that `path` is on; empty where Linux does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    # proc_pid_mountinfo(5): the mount point is the fifth word, the type is the one after the lone dash.
    mounts = [(words[4], words[words.index("-") + 1]) for words in map(str.split, lines) if "-" in words]
    resolved = path.resolve()
    fitting = [(len(point), kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(fitting, default=(0, ""))[1]


def _daemon(loaded: LoadedSettings, holder: Holder | None) -> Finding:
    if holder is None:
        return _other_daemon(loaded.settings) or fine("daemon", "not running; the state directory is free")
    if holder.url is None:
        return warning(
            "daemon",
            f"the state directory is held by {holder}, which does not listen",
            "a daemon that just starts, or a clean-up; look again in a moment",
        )
    asked = Daemon(configured_daemon(loaded))
    try:
        reasons = asked.why_not_ready()
        lost = () if reasons else asked.lost_cards()
    except RefusalError as error:
        return warning(
            "daemon", f"running, {holder}; it does not talk to us: {error.message}", str(error.next_step)
        )
    except DaemonUnreachableError as error:
        return broken(
            "daemon",
            f"{holder} holds the state directory: {error.message}",
            "look at its log; if it hangs, end that process: instances keep running",
        )
    return _state_of_daemon(holder, reasons, lost)


def _other_daemon(settings: Settings) -> Finding | None:
    """Report a daemon that serves the manager id with another state directory: a start would be refused."""
    from manager.claims import id_lock_of  # noqa: PLC0415

    holder = id_lock_of(settings).holder()
    if holder is None:
        return None
    pid, uid = holder
    which = f"process {pid}, " if pid else ""
    message = (
        f"not running; another daemon ({which}{user(uid)}) serves manager_id {settings.manager_id!r} on this "
        f"engine with another state directory than {settings.state.dir}"
    )
    remedy = "set another manager_id, or the state.dir of that daemon"
    if is_trusted(uid):
        return broken("daemon", message, remedy)
    return warning("daemon", message, f"{remedy}; a start does not take the word of another user's process")


def _state_of_daemon(holder: Holder, reasons: tuple[str, ...], lost: tuple[str, ...]) -> Finding:
    if reasons:
        return warning("daemon", f"running, {holder}; not ready:\n" + "\n".join(reasons), "look at its log")
    if lost:
        # Of a card that has left the bus the driver tells nothing: the daemon still has its name.
        return broken(
            "daemon",
            f"running, {holder}; cards of its instances are lost:\n" + "\n".join(lost),
            "bring the card back: `nvidia-smi`, the kernel log and `ollama-manager status` say more",
        )
    return fine("daemon", f"running and ready, {holder}")


def _models(daemon: Daemon) -> Iterator[Finding]:
    """Warn of models of one name that differ between instances."""
    try:
        differing = daemon.read(differing_models, daemon.ask("GET", "/v1/models"))
    except (RefusalError, DaemonUnreachableError):
        return  # it has just been ready
    if differing:
        texts = [digests_text(name, digests) for name, digests in differing.items()]
        yield warning("models", f"not the same on all instances: {listed(texts)}", PULL_AGAIN)


def _registry(path: Path, holder: Holder | None) -> Finding:
    if holder is not None:
        return skipped("registry", f"{path} is in use; a daemon checks it when it starts")
    if not path.exists():
        return fine("registry", "none yet; the first start makes it")
    # The import costs half a second, and is only needed here.
    from manager.adapters.registry.opening import verify  # noqa: PLC0415

    try:
        revision = verify(path)
    except RegistryCorruptError as error:
        command = str(error.details.get("command", ""))
        problem = str(error.details.get("problem", error.message))
        return broken("registry", f"{path} cannot be used: {problem}", f"begin with an empty one: {command}")
    except (RegistryUnwritableError, OSError) as error:
        return broken("registry", f"{path} cannot be read: {error}", "run this as the user of the daemon")
    return fine("registry", f"{path} is whole (schema {revision})")


def _port(settings: Settings, holder: Holder | None) -> Finding:
    host, port = settings.server.host, settings.server.port
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if holder is not None and holder.url is not None:
        if holder.url.partition("://")[2] == shown:
            return fine("port", f"{shown} is our daemon's")
        # A command line says so, or the configuration has changed since; that daemon needs no other port.
        return fine("port", f"our daemon listens at {holder.url}; configured is {shown}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        remedy = {
            errno.EADDRINUSE: f"`ss -ltnp sport = :{port}` shows who holds it; or set another server.port",
            errno.EACCES: "ports below 1024 need a privilege; set server.port to a higher one",
            errno.EADDRNOTAVAIL: "it is no address of this machine; correct server.host",
        }.get(error.errno or 0, "correct server.host")
        if port == _OLLAMA_PORT and error.errno == errno.EADDRINUSE:
            remedy = f"a local Ollama uses this port; stop it, or {remedy}"
        return broken("port", f"{shown}: {error.strerror}", remedy)
    return fine("port", f"{shown} is free")
