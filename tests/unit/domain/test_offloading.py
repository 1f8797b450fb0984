"""The advice to hand small jobs to a model."""

from __future__ import annotations

from typing import Any

import pytest

from manager.domain.classification import Tier
from manager.domain.offloading import offload_hint

SMALL: dict[str, Any] = {
    "capabilities": ("completion",),
    "parameters": "7.6B",
    "tier": None,
    "remote_host": "",
    "is_available": True,
}


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({}, (True, "7.6B parameters are at most 14b")),
        ({"parameters": " 14.8B "}, (True, "14.8B parameters are at most 14b")),
        ({"parameters": "15B"}, (False, "15B parameters are more than 14b")),
        ({"parameters": "32B", "tier": Tier.FAST}, (True, "its tier is fast")),
        ({"parameters": "32B", "tier": Tier.COMPLEX}, (False, "32B parameters are more than 14b")),
        ({"tier": Tier.COMPLEX}, (True, "7.6B parameters are at most 14b")),
        ({"parameters": ""}, (False, "neither a fast tier nor its size is known")),
        ({"parameters": "big"}, (False, "neither a fast tier nor its size is known")),
        ({"capabilities": None}, (True, "7.6B parameters are at most 14b")),
        ({"capabilities": ("embedding",)}, (False, "it generates no text")),
        ({"remote_host": "https://ollama.com"}, (False, "it runs at https://ollama.com")),
        ({"is_available": False, "tier": Tier.FAST}, (False, "no instance that has it can answer now")),
    ],
)
def test_a_small_local_model_that_can_answer_takes_small_jobs(
    values: dict[str, Any], hint: tuple[bool, str]
) -> None:
    assert offload_hint(**SMALL | values) == hint
