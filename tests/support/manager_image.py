"""The daemon's own image in an engine of the tests: compose/Dockerfile on a base that needs no registry."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

from tests.support.host import in_outer_network
from tests.tools.base import PYTHON, ensure_python_image

if TYPE_CHECKING:
    from tests.support.engine import Engine

TAG = "ollama-endpoint-manager:test"


def ensure_manager_image(engine: Engine) -> str:
    """Build the image in `engine`; returns its name."""
    with closing(engine.client()) as client:
        base = ensure_python_image(client)
    # The wheels come from where the machine has its packages from.
    in_outer_network(
        *("env", f"DOCKER_HOST={engine.url}", sys.executable, "compose/build.py"),
        *("--base", base, "--python", PYTHON, "--tag", TAG),
    )
    return TAG
