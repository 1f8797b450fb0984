"""The command line of the simulated Ollama: `serve`, `list`, `--version`.

Run it as `python -m tests.simulated.ollama serve`, or in the image that `tests.simulated.image` builds. See
`knobs.py` for what it can be made to do.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Returns the exit status."""
    # From here on no SIGTERM is lost. A program that is process 1 ignores it as long as it has no handler.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # blocked by the launcher until now
    match sys.argv[1:]:
        case ["serve"]:
            return _serve()
        case ["list" | "ls"]:
            return _list()
        case ["--version" | "-v"]:
            sys.stdout.write(f"ollama version is {os.environ.get('OLLAMA_SIM_VERSION', '0.24.0')}\n")
            return 0
        case _:
            sys.stderr.write("Usage: ollama serve|list|--version\n")
            return 1


def _serve() -> int:
    from .knobs import BadKnobError  # noqa: PLC0415
    from .server import serve  # noqa: PLC0415

    try:
        serve()
    except BadKnobError as error:
        sys.stderr.write(f"Error: {error}\n")
    return 1


def _list() -> int:
    """Print the models. Imports little: a health check runs it every few seconds."""
    import json  # noqa: PLC0415
    import socket  # noqa: PLC0415

    host, _, port = os.environ.get("OLLAMA_HOST", "").rpartition("://")[2].rpartition(":")
    host = "127.0.0.1" if host in ("", "0.0.0.0", "[::]") else host
    try:
        with socket.create_connection((host, int(port or 11434))) as connection:
            connection.sendall(b"GET /api/tags HTTP/1.0\r\n\r\n")
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    except OSError:
        head = b""
    if b" 200 " not in head.split(b"\r\n")[0]:
        sys.stderr.write("Error: could not connect to ollama server, run 'ollama serve' to start it\n")
        return 1
    rows = [("NAME", "ID", "SIZE", "MODIFIED")]
    rows += [
        (model["name"], model["digest"][:12], f"{model['size'] / 1e6:.1f} MB", model["modified_at"][:10])
        for model in json.loads(body)["models"]
    ]
    for row in rows:
        sys.stdout.write("    ".join(cell.ljust(20) for cell in row).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
