"""Models that an instance is not to run: by their names, and by their number of parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, TypeAlias

from manager.domain.models import model_key, parameter_count, parameter_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_WILDCARDS = frozenset("*?[")
# More than the models of all volumes and the instances with rules together are likely to be.
_MOST_KNOWN = 4096

Sizes: TypeAlias = "Mapping[str, int]"


@dataclass(frozen=True)
class DenyRules:
    """The rules of one instance.

    Args:
        patterns: globs over keys of models. One without a wildcard is a name, and has the default tag.
        max_parameters: the largest number of parameters, None for any. It is compared at the precision of its
            shortest form: 14b admits what has fewer than 15 billion, for a "14b" model calls itself 14.8B.
    """

    patterns: tuple[str, ...] = ()
    max_parameters: int | None = None

    def __bool__(self) -> bool:
        return bool(self.patterns) or self.max_parameters is not None

    def rule(self, key: str, sizes: Sizes) -> str:
        """Return the rule that denies a model, in the words of the configuration; empty where none does.

        Args:
            key: of the model.
            sizes: the number of parameters of each model by its key, where it is known.
        """
        pattern = denying(self.patterns, key)
        if pattern:
            return f"deny_models {pattern}"
        count = sizes.get(key)
        if count is None or self.max_parameters is None or count < self._beyond:
            return ""
        return f"max_parameters {parameter_text(self.max_parameters)}"

    @cached_property
    def _beyond(self) -> int:
        """The least number of parameters that is denied."""
        count = self.max_parameters or 0
        written = parameter_text(count)
        decimals = len(written.rstrip("kmbt").partition(".")[2])
        unit = parameter_count(f"1{written.lstrip('0123456789.')}")
        step = int(10**decimals)
        return count + max(1, unit // step)


@dataclass(frozen=True, slots=True)
class Denials:
    """The rules of one instance, and the sizes of the models that it may have."""

    rules: DenyRules
    sizes: Sizes

    def rule(self, key: str) -> str:
        """As `DenyRules.rule`."""
        return self.rules.rule(key, self.sizes)


@lru_cache(maxsize=_MOST_KNOWN)
def denying(patterns: tuple[str, ...], key: str) -> str:
    """Return the first pattern that a key matches, empty where none does."""
    for pattern in patterns:
        folded = pattern.strip().lower()
        if not _WILDCARDS.intersection(folded):
            folded = model_key(folded)
        if _compiled(folded).match(key):
            return pattern
    return ""


@lru_cache(maxsize=_MOST_KNOWN)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))
