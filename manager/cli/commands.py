"""The commands: their options, and which file does the work. Heavy imports wait until they are needed."""

from __future__ import annotations

import functools
import gc
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from manager import __version__
from manager.cli.failures import DONE, FAILED, Program, complain, innermost, warn
from manager.cli.options import seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.adapters.log_writer import LogWriter
    from manager.settings import LoadedSettings

    Command = TypeVar("Command", bound=Callable[..., Any])

_NAME = "ollama-manager"
_ENV_VARIABLE = "OLLAMA_MANAGER_ENV"

_CONFIG_FILE = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The configuration file (else $OLLAMA_MANAGER_CONFIG, ./ollama-manager.yaml, "
    "/etc/ollama-manager/config.yaml).",
)


def _set_environment(context: click.Context, _option: click.Parameter, name: str | None) -> None:
    """Have this command read the configuration with an overlay, also when it reads it again."""
    if name is None:
        return
    before = os.environ.get(_ENV_VARIABLE)
    os.environ[_ENV_VARIABLE] = name

    def restore() -> None:
        if before is None:
            os.environ.pop(_ENV_VARIABLE, None)
        else:
            os.environ[_ENV_VARIABLE] = before

    context.call_on_close(restore)


_ENV = click.option(
    "--env",
    callback=_set_environment,
    expose_value=False,
    metavar="NAME",
    help="Overlay ollama-manager.NAME.yaml beside the configuration file (else $OLLAMA_MANAGER_ENV).",
)


def _CONFIG(command: Command) -> Command:  # noqa: N802  (used as the options beside it)
    return _CONFIG_FILE(_ENV(command))


_URL = click.option(
    "--url", metavar="URL", help="The daemon to talk to (else $OLLAMA_MANAGER_URL, else the running one)."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _talks(command: Command) -> Command:
    """For commands that talk to the daemon: they get `url` and `config`."""
    return _URL(_CONFIG(command))


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", envvar="OLLAMA_MANAGER_URL", metavar="URL", help="The daemon to talk to.")
@click.version_option(__version__, prog_name=_NAME, message="%(prog)s %(version)s")
def program(url: str | None) -> None:
    """Start, stop and watch Ollama containers on this machine's CPU and GPUs.

    `up` prepares everything and runs the daemon, `serve` only runs it; most other commands talk to it.

    Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 daemon unreachable, 4 refused by the state.
    A key goes into $OLLAMA_MANAGER_KEY.
    """
    click.get_current_context().obj = url


def main() -> None:
    # Like an interrupt it unwinds: a hidden cursor comes back. `serve` has a handler of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    program()


@program.command()
@click.option("--host", help="Address to listen on; beyond loopback only with a server.key_file.")
@click.option("--port", type=int, help="Port to listen on.")
@click.option("--stop-instances", is_flag=True, help="Stop the containers too when the daemon ends.")
@click.option("--take-over", is_flag=True, help="Adopt the containers of a state directory that was lost.")
@click.option(
    "--replace",
    "replaces",
    is_flag=True,
    help="Replace the daemon that runs: no request is lost. It ends once its answers have ended.",
)
@_CONFIG
def serve(
    host: str | None,
    port: int | None,
    config: Path | None,
    *,
    stop_instances: bool,
    take_over: bool,
    replaces: bool,
) -> int:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C. Containers keep running after it."""
    return _serve_until_stopped(
        host, port, config, stop_instances=stop_instances, take_over=take_over, replaces=replaces
    )


@program.command()
@click.option("--yes", "-y", is_flag=True, help="Do not ask before something is changed.")
@click.option("--host", help="Address to listen on; beyond loopback only with a server.key_file.")
@click.option("--port", type=int, help="Port to listen on.")
@click.option("--stop-instances", is_flag=True, help="Stop the containers too when the daemon ends.")
@click.option("--take-over", is_flag=True, help="Adopt the containers of a state directory that was lost.")
@click.option("--without-images", metavar="COMMAND", hidden=True)
@_CONFIG
def up(
    host: str | None,
    port: int | None,
    config: Path | None,
    *,
    yes: bool,
    stop_instances: bool,
    take_over: bool,
    without_images: str | None,
) -> int:
    """Prepare the Docker Engine, the images and the volumes, then serve.

    Lists what is missing and asks before it changes anything. Where nothing is missing it is `serve`.
    """
    from manager.cli.locate import load  # noqa: PLC0415
    from manager.cli.up import ImagesMissingError, prepare  # noqa: PLC0415

    try:
        prepare(load(config, overrides={"server": {"host": host, "port": port}}), yes=yes)
    except ImagesMissingError as error:
        if without_images is None:
            raise
        # Of a clone, which has a stand-in for Ollama: `make run`.
        click.echo("\n".join((error.message, *error.lines)), err=True)
        given = {"--host": host, "--port": port, "--config": config}
        options = [f"{name}={value}" for name, value in given.items() if value is not None]
        flags = {"--stop-instances": stop_instances, "--take-over": take_over}
        options += [name for name, is_set in flags.items() if is_set]
        command = [*shlex.split(without_images), *options]
        os.execvp(command[0], command)  # noqa: S606  (the user of the option names it)
    return _serve_until_stopped(host, port, config, stop_instances=stop_instances, take_over=take_over)


def _serve_until_stopped(
    host: str | None,
    port: int | None,
    config: Path | None,
    *,
    stop_instances: bool,
    take_over: bool,
    replaces: bool = False,
) -> int:
    # Until the daemon has its own handlers, and again after them, both mean: stop what you are doing.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    # Imports make many objects and hardly any garbage; looking for it took a sixth of their time. The daemon
    # enables collections when it is built (`tune_interpreter`).
    gc.disable()
    try:
        return _serve(
            host, port, config, stop_instances=stop_instances, take_over=take_over, replaces=replaces
        )
    except KeyboardInterrupt:
        return DONE
    finally:
        gc.enable()


def _serve(
    host: str | None,
    port: int | None,
    config: Path | None,
    *,
    stop_instances: bool,
    take_over: bool,
    replaces: bool,
) -> int:
    from manager.cli.locate import load  # noqa: PLC0415
    from manager.cli.logs import configure_logging  # noqa: PLC0415
    from manager.errors import ManagerError  # noqa: PLC0415

    # The daemon's own handler comes later. A reload that is asked for before that has nothing to do.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    read = functools.partial(load, config, overrides={"server": {"host": host, "port": port}})
    loaded = read()
    from manager.settings import read_keys  # noqa: PLC0415

    log = configure_logging(loaded.settings.log, secrets=read_keys(loaded.settings.server.key_files))
    try:
        _run_daemon(loaded, log, read, stop_instances=stop_instances, take_over=take_over, replaces=replaces)
    except (ManagerError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  (the log has the traceback, the person gets one line)
        import structlog  # noqa: PLC0415

        structlog.get_logger("daemon").critical("died", exc_info=error)
        defect = error
    else:
        return DONE
    finally:
        _end_log(log)
    complain(
        f"the daemon ended because of a defect: {innermost(defect)}",
        "its log has the details; containers keep running, and a new daemon takes them over",
    )
    return FAILED


def _end_log(log: LogWriter) -> None:
    """Flush the log. Where stderr blocks, nothing that follows may be written to it: the process must end."""
    if not log.close():
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


def _run_daemon(
    loaded: LoadedSettings,
    log: LogWriter,
    read: Callable[[], LoadedSettings],
    *,
    stop_instances: bool,
    take_over: bool,
    replaces: bool,
) -> None:
    import asyncio  # noqa: PLC0415

    import uvloop  # noqa: PLC0415

    from manager import daemon  # noqa: PLC0415
    from manager.cli.logs import reconfigure_logging  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(
            daemon.serve(
                loaded,
                log=log,
                read_again=read,
                configure_log=reconfigure_logging,
                stop_instances=stop_instances,
                take_over=take_over,
                replaces=replaces,
            )
        )


@program.command()
@_JSON
@click.option("--watch", is_flag=True, help="Keep the table up to date until Ctrl-C.")
@_talks
def status(url: str | None, config: Path | None, as_json: bool, watch: bool) -> None:
    """Show all instances, and what is wrong.

    On a terminal a table, in a pipe plain columns, with --json what the API says.
    """
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.status import show_status, watch_status  # noqa: PLC0415

    locate = functools.partial(find_daemon, url or _common_url(), config)
    if watch:
        watch_status(locate, as_json=as_json)
    else:
        show_status(locate(), as_json=as_json)


@program.command()
@click.argument("instance", metavar="ID")
@_talks
def start(instance: str, url: str | None, config: Path | None) -> None:
    """Start an instance, and wait until it is ready."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.progress import start_instance  # noqa: PLC0415

    start_instance(find_daemon(url or _common_url(), config), instance)


@program.command()
@click.argument("instance", metavar="ID")
@click.option("--force", is_flag=True, help="Do not wait for requests that are under way.")
@_talks
def stop(instance: str, force: bool, url: str | None, config: Path | None) -> None:
    """Let an instance finish what it does, then stop it."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.progress import stop_instance  # noqa: PLC0415

    stop_instance(find_daemon(url or _common_url(), config), instance, force=force)


@program.group("breaker")
def breaker_group() -> None:
    """The breakers: an instance whose requests fail in a row is passed over for a while."""


@breaker_group.command("reset")
@click.argument("instance", metavar="ID")
@_talks
def breaker_reset(instance: str, url: str | None, config: Path | None) -> None:
    """Close the breaker of an instance: it gets requests again as soon as its server answers."""
    from manager.cli.breaker import reset_breaker  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    reset_breaker(find_daemon(url or _common_url(), config), instance)


@program.command()
@click.argument("instance", metavar="ID")
@click.option("--reason", metavar="TEXT", help="Why, for all who look.")
@click.option(
    "--for",
    "for_s",
    callback=seconds,
    metavar="DURATION",
    help="Put it back after that time, such as 90s, 15m, 2h, 1h30m or 30d.",
)
@click.option("--keep-running", is_flag=True, help="Do not stop its container.")
@_talks
def drain(
    instance: str,
    *,
    reason: str | None,
    for_s: float | None,
    keep_running: bool,
    url: str | None,
    config: Path | None,
) -> None:
    """Take an instance out of service.

    No new request goes there and nothing starts it until `resume`. Open requests end, then it is stopped.
    """
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.service import drain_instance  # noqa: PLC0415

    endpoint = find_daemon(url or _common_url(), config)
    drain_instance(endpoint, instance, reason=reason, for_s=for_s, keep_running=keep_running)


@program.command()
@click.argument("instance", metavar="ID")
@_talks
def resume(instance: str, url: str | None, config: Path | None) -> None:
    """Put an instance back in service."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.service import resume_instance  # noqa: PLC0415

    resume_instance(find_daemon(url or _common_url(), config), instance)


@program.command()
@click.argument("instance", metavar="ID")
@_talks
def restart(instance: str, url: str | None, config: Path | None) -> None:
    """Replace the container of an instance, once its open requests have ended."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.service import restart_instance  # noqa: PLC0415

    restart_instance(find_daemon(url or _common_url(), config), instance)


@program.command()
@click.argument("instance", metavar="ID")
@click.argument("image")
@_talks
def upgrade(instance: str, image: str, url: str | None, config: Path | None) -> None:
    """Have an instance use IMAGE, which is allowed and pulled, from now on; `rollback` goes back."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.service import upgrade_instance  # noqa: PLC0415

    upgrade_instance(find_daemon(url or _common_url(), config), instance, image)


@program.command()
@click.argument("instance", metavar="ID")
@_talks
def rollback(instance: str, url: str | None, config: Path | None) -> None:
    """Return an instance to the image before its last upgrade."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.service import roll_instance_back  # noqa: PLC0415

    roll_instance_back(find_daemon(url or _common_url(), config), instance)


@program.command()
@click.argument("instance", metavar="ID")
@click.option(
    "--for",
    "for_s",
    callback=seconds,
    metavar="DURATION",
    help="How long, such as 90s, 15m, 2h, 1h30m or 30d.",
)
@click.option("--end", "ends", is_flag=True, help="Put the rules in force again.")
@click.option("--reason", metavar="TEXT", help="Why, for all who look.")
@_talks
def lift(
    instance: str,
    for_s: float | None,
    reason: str | None,
    url: str | None,
    config: Path | None,
    *,
    ends: bool,
) -> None:
    """Lift the deny rules of an instance for a time (deny_models, max_parameters)."""
    from manager.cli.lifts import lift_rules  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    lift_rules(find_daemon(url or _common_url(), config), instance, for_s=for_s, ends=ends, reason=reason)


@program.command("load")
@click.argument("instance", metavar="ID")
@click.argument("model", metavar="MODEL")
@click.option(
    "--keep-alive", metavar="TIME", help="How long it stays after its last use, such as 30m; -1 for good."
)
@_talks
def load_command(
    instance: str, model: str, keep_alive: str | None, url: str | None, config: Path | None
) -> None:
    """Load MODEL on an instance, which is started if need be; MODEL may be a role."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.models import load_model  # noqa: PLC0415

    load_model(find_daemon(url or _common_url(), config), instance, model, keep_alive)


@program.command()
@click.argument("instance", metavar="ID")
@click.argument("model", metavar="MODEL")
@_talks
def unload(instance: str, model: str, url: str | None, config: Path | None) -> None:
    """Unload MODEL from an instance, once the requests that use it have ended; MODEL may be a role."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.models import unload_model  # noqa: PLC0415

    unload_model(find_daemon(url or _common_url(), config), instance, model)


@program.command()
@click.argument("image", required=False)
@_talks
def pull(image: str | None, url: str | None, config: Path | None) -> None:
    """Pull IMAGE, or the images of all configured instances."""
    from manager.cli.locate import find_daemon  # noqa: PLC0415
    from manager.cli.progress import pull_images  # noqa: PLC0415

    pull_images(find_daemon(url or _common_url(), config), image)


@program.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be stopped.")
@_talks
def reap(dry_run: bool, url: str | None, config: Path | None) -> int:
    """Stop what is idle past its TTL; for cron.

    One sweep, a line for every instance. The daemon does it where one runs, else this command itself.
    """
    from manager.cli.reaping import reap as sweep  # noqa: PLC0415

    return sweep(url or _common_url(), config, dry_run=dry_run)


@program.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_CONFIG
def backup(file: Path, config: Path | None) -> None:
    """Write the state (overrides, events, learned sizes) into FILE, a tar archive; the daemon may run."""
    from manager.cli.backup import back_up  # noqa: PLC0415
    from manager.cli.locate import load  # noqa: PLC0415

    names = back_up(load(config).settings, file)
    click.echo(f"{file}: {', '.join(names)}")


@program.command()
@_JSON
@_CONFIG
def doctor(as_json: bool, config: Path | None) -> int:
    """Check what a daemon needs; name remedies.

    Changes nothing. Ends with 1 when something is broken; warnings are no failure.
    """
    from manager.cli.logs import silence  # noqa: PLC0415

    silence()
    from manager.cli.doctor import doctor as examine  # noqa: PLC0415

    return examine(config, as_json=as_json)


@program.group("config")
def config_group() -> None:
    """The configuration."""


@config_group.command("show")
@_CONFIG
def config_show(config: Path | None) -> None:
    """Print the effective configuration with the source of each value, as YAML that can be loaded again.

    Includes what was changed over the API of the daemon, where one runs.
    """
    from manager.cli.effective import check_as_serve, effective_yaml, live_values  # noqa: PLC0415
    from manager.cli.locate import load  # noqa: PLC0415

    loaded = load(config)
    check_as_serve(loaded)
    click.echo(effective_yaml(loaded, live_values(loaded)), nl=False)


@program.group("templates")
def templates_group() -> None:
    """The container templates."""


@templates_group.command("check")
@_CONFIG
def templates_check(config: Path | None) -> None:
    """Check all templates, and the instances that are made of them, against what is allowed."""
    from manager.cli.locate import load  # noqa: PLC0415

    loaded = load(config)
    from manager.settings import (  # noqa: PLC0415
        load_templates,
        missing_binds,
        resolve_instances,
        template_warnings,
    )

    templates = load_templates(loaded.settings)
    resolve_instances(loaded, templates)
    for concern in (*template_warnings(loaded), *missing_binds(loaded.settings, templates)):
        warn(concern)
    for name, template in templates.items():
        click.echo(f"{name}: ok ({template.device.value}, {template.image})")


@program.command()
def version() -> None:
    """Print the version."""
    click.echo(f"{_NAME} {__version__}")


def _common_url() -> str | None:
    """The options before the command, and those of the environment."""
    url: str | None = click.get_current_context().find_root().obj
    return url
