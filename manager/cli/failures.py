"""The end of a command: the exit codes, and one clear line for every error. No traceback reaches a person."""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from manager.errors import (
    ConfigurationError,
    ConflictError,
    EngineUnreachableError,
    ForeignOwnerError,
    ManagerError,
    ManagerIdChangedError,
    ManagerIdHeldError,
    StateDirHeldError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

DONE = 0
FAILED = 1
MISUSED = 2
UNREACHABLE = 3
REFUSED = 4
INTERRUPTED = 130

# Terminal sequences, and whatever else moves a cursor; line breaks and tabs are no danger.
_CONTROL = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class CommandError(Exception):
    """Ends a command: `error: …`, what belongs to it, and what to do next, all on stderr.

    Args:
        message: what is wrong.
        exit_code: one of the codes above.
        next_step: what a person can do about it.
        lines: shown below the message as they are, such as the end of a log.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int = FAILED,
        next_step: str | None = None,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.next_step = next_step
        self.lines = tuple(lines)


class Program(click.Group):
    """A group of commands that ends with the documented exit codes, whatever happens inside."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002  (we always end the process)
        **extra: Any,
    ) -> NoReturn:
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            code = result if isinstance(result, int) else DONE
        except (KeyboardInterrupt, click.Abort):
            code = INTERRUPTED
        except BaseExceptionGroup as group:
            code = explain(group)
        except Exception as error:  # noqa: BLE001  (a person sees a line, never a traceback)
            code = explain(error)
        sys.exit(code)


def explain(error: BaseException) -> int:
    """Tell a person what went wrong, on stderr, and return the exit code."""
    if isinstance(error, CommandError):
        complain(error.message, error.next_step, error.lines)
        return error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()  # nothing was asked for: what there is to ask for is all that can be said
        return error.exit_code
    if isinstance(error, click.ClickException):
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        complain(_in_one_line(error.format_message()))
        return error.exit_code
    if isinstance(error, ManagerError):
        complain(error.message, _next_step(error))
        return _exit_code(error)
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        complain(f"{said}: {error.filename}" if error.filename else said)
        return FAILED
    complain(f"unexpected: {innermost(error)}", "this is a defect of ollama-manager; please report it")
    return FAILED


def _in_one_line(message: str) -> str:
    """Return a message of click: a list of choices has lines there, and a number with bounds is a `range`."""
    words = " ".join(message.split())
    return words.replace("a valid integer range", "a whole number").replace("a valid float range", "a number")


def complain(message: str, next_step: str | None = None, lines: Sequence[str] = ()) -> None:
    first, *more = printable(message).splitlines() or [""]
    if more:  # a list of problems, one a line
        click.echo(f"{_red('error:')} {len(more) + 1} problems", err=True)
        for line in (first, *more):
            click.echo(f"  {line}", err=True)
    else:
        click.echo(f"{_red('error:')} {first}", err=True)
    for line in lines:
        click.echo(f"  | {printable(line)}", err=True)
    if next_step:
        click.echo(f"  {printable(next_step)}", err=True)


def warn(message: str) -> None:
    """One line on stderr about what works and should not stay as it is."""
    word = "warning:"
    word = click.style(word, fg="yellow", bold=True) if coloured(sys.stderr) else word
    click.echo(f"{word} {printable(message)}", err=True)


def printable(text: str) -> str:
    """Text from elsewhere, such as a container's log, without what would act on a terminal."""
    return _CONTROL.sub("", text)


def innermost(error: BaseException) -> str:
    """The first real error inside groups of them, as `Kind: message`."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _exit_code(error: ManagerError) -> int:
    if isinstance(error, ConfigurationError):
        return MISUSED
    return REFUSED if isinstance(error, ConflictError) else FAILED


def _next_step(error: ManagerError) -> str | None:
    if isinstance(error, ForeignOwnerError):
        return (
            "give this daemon a manager_id of its own; only if that state directory is lost for good, "
            "run `ollama-manager serve --take-over` once"
        )
    if isinstance(error, ManagerIdChangedError):
        return str(error.details["remedy"])
    if isinstance(error, StateDirHeldError | ManagerIdHeldError):
        return (
            "stop that one first, serve in its place with `ollama-manager serve --replace`, "
            "or give this one a state.dir and a manager_id of its own"
        )
    if isinstance(error, EngineUnreachableError):
        return "`ollama-manager doctor` says more"
    return _next_step_after(error.__cause__)


def _next_step_after(cause: BaseException | None) -> str | None:
    if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
        return "choose another port with --port or server.port; `ss -ltnp` shows who holds this one"
    if isinstance(cause, OSError) and cause.errno == errno.EADDRNOTAVAIL:
        return "it is no address of this machine; choose another one with --host or server.host"
    return None


def _red(text: str) -> str:
    return click.style(text, fg="red", bold=True) if coloured(sys.stderr) else text


def coloured(stream: Any) -> bool:
    """Whether colours may be written to a stream; https://no-color.org."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
