from __future__ import annotations

import pytest

from tests.support.gpu_machine import Machine


@pytest.fixture
def machine() -> Machine:
    return Machine()
