"""Overlays: a file of an environment such as dev, staging or prod, beside the configuration file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from manager.settings.problems import Problem, configuration_error
from manager.settings.yaml_file import Document, read_document

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

VARIABLE = "OLLAMA_MANAGER_ENV"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


def read_overlay(
    file: Path | None, environ: Mapping[str, str], *, check: Callable[[Path], object] | None = None
) -> Document | None:
    """Read `ollama-manager.NAME.yaml` beside the configuration file; None where no environment is named.

    Args:
        file: the configuration file.
        environ: `$OLLAMA_MANAGER_ENV` has the name, which `--env` sets.
        check: raises where the overlay must not be trusted.

    Raises:
        ConfigurationError: it was named and cannot be read.
    """
    name = environ.get(VARIABLE, "").strip()
    if not name:
        return None
    if not _NAME.fullmatch(name):
        raise _refused(f"{name!r}; expected a name such as prod: letters, digits, _ and -, at most 32")
    if file is None:
        raise _refused(
            f"{name!r}; there is no configuration file that ollama-manager.{name}.yaml could overlay"
        )
    overlay = file.parent / f"ollama-manager.{name}.yaml"
    try:
        if check is not None:
            check(overlay)
        return read_document(overlay, regular=True)
    except OSError as error:
        raise _refused(
            f"{name!r}; {overlay} cannot be read ({error.strerror}); expected a YAML file beside {file}"
        ) from error


def _refused(text: str) -> Exception:
    return configuration_error([Problem(f"--env or ${VARIABLE}", "", text)])
