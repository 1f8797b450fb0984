"""What Ollama's log says of its device, in lines of real servers."""

from __future__ import annotations

import pytest

from manager.wire.ollama_log import fell_back_to_cpu

LISTENING = (
    "time=2026-01-02T03:04:05.678Z level=INFO source=routes.go:1810 "
    'msg="Listening on [::]:11434 (version 0.24.0)"'
)
DISCOVERING = (
    'time=2026-01-02T03:04:05.679Z level=INFO source=runner.go:67 msg="discovering available GPUs..."'
)
ON_GPU = (
    'time=2026-01-02T03:04:06.001Z level=INFO source=types.go:42 msg="inference compute" '
    'id=GPU-6f4b3a52-0000-4000-8000-000000000001 filter_id="" library=CUDA compute=8.9 name=CUDA0 '
    'description="NVIDIA GeForce RTX 4090" libdirs=ollama,cuda_v13 driver=13.0 pci_id=0000:01:00.0 '
    'type=discrete total="24.0 GiB" available="23.5 GiB"'
)
ON_CPU = (
    'time=2026-01-02T03:04:06.001Z level=INFO source=types.go:60 msg="inference compute" id=cpu library=cpu '
    'compute="" name=cpu description=cpu libdirs=ollama driver="" pci_id="" type="" total="31.3 GiB" '
    'available="30.4 GiB"'
)
ON_CPU_OLDER = (
    'time=2025-01-02T03:04:06.001Z level=INFO source=types.go:131 msg="inference compute" id=0 library=cpu '
    'variant="" compute="" driver=0.0 name="" total="31.3 GiB" available="30.4 GiB"'
)
REQUEST = '[GIN] 2026/01/02 - 03:04:07 | 200 |   532µs | 172.18.0.1 | GET "/api/version"'


@pytest.mark.parametrize("lines", [[], [LISTENING, DISCOVERING], [LISTENING, REQUEST, "id=cpu library=cpu"]])
def test_before_discovery_has_ended_nothing_is_known(lines: list[str]) -> None:
    assert fell_back_to_cpu(lines) is None


@pytest.mark.parametrize("line", [ON_CPU, ON_CPU_OLDER])
def test_the_cpu_as_the_only_device_is_a_fallback(line: str) -> None:
    assert fell_back_to_cpu([LISTENING, DISCOVERING, line, REQUEST]) is True


@pytest.mark.parametrize("devices", [[ON_GPU], [ON_GPU, ON_GPU], [ON_GPU, ON_CPU]])
def test_with_a_gpu_among_the_devices_it_is_none(devices: list[str]) -> None:
    assert fell_back_to_cpu([LISTENING, DISCOVERING, *devices, REQUEST]) is False
