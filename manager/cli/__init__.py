"""The command line. Importing it is cheap: each command imports what it needs when it runs."""

from manager.cli import requests as _requests  # noqa: F401  (adds its commands)
from manager.cli.commands import main, program
from manager.cli.runs import runs_group

program.add_command(runs_group)

__all__ = ["main"]
