"""How the tools talk: progress on stderr, so that stdout has the results alone."""

from __future__ import annotations

import sys


class ToolError(Exception):
    """The tool cannot go on; the message says why and what to do."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def banner(*lines: str) -> None:
    """Something that must not be overlooked."""
    width = max(map(len, lines))
    edge = "!" * (width + 8)
    body = "\n".join(f"!!  {line:<{width}}  !!" for line in lines)
    colour, plain = ("\033[1;33m", "\033[0m") if sys.stderr.isatty() else ("", "")
    say(f"\n{colour}{edge}\n{body}\n{edge}{plain}\n")
