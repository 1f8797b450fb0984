"""What the tests need of this machine beside the product's own needs."""

from __future__ import annotations

from manager.cli.failures import CommandError
from manager.cli.machine import Need, install
from tests.tools.console import ToolError

IP = Need("ip", ("iproute2",))
COMPILER = Need("cc", ("gcc", "libc6-dev"))
COMPOSE = Need("docker-compose", ("docker-compose",))


def provide(needs: list[Need]) -> None:
    """Install what is missing of `needs`.

    Raises:
        ToolError: it cannot be installed.
    """
    try:
        install(needs)
    except CommandError as error:
        raise ToolError("\n  ".join([error.message, *error.lines])) from error
