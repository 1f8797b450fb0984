"""Answers of the two exporters of cards, as their documentation and their own test data show them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from manager.domain.gpu_metrics import Sample

FIRST = "GPU-5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"
SECOND = "GPU-c0ffee00-1111-2222-3333-444455556666"
SLICED = "MIG-292b7eb0-0beb-5abe-04b8-475f1ff17b99"
MIB = 2**20

_DCGM_LABELS = (
    'gpu="{index}",UUID="{uuid}",pci_bus_id="00000000:{bus}:00.0",device="nvidia{index}",'
    'modelName="NVIDIA H200",Hostname="node-1",DCGM_FI_DRIVER_VERSION="590.48.01"'
)


def dcgm(**values: object) -> str:
    """An answer of the DCGM exporter about `FIRST`, with the values of `DCGM_FI_DEV_<name>`."""
    labels = _DCGM_LABELS.format(index=0, uuid=FIRST, bus="3B")
    return "".join(f"DCGM_FI_DEV_{name}{{{labels}}} {value}\n" for name, value in values.items())


def smi(uuid: str = FIRST, **values: object) -> str:
    """An answer of nvidia_gpu_exporter about a card, with the values of `nvidia_smi_<name>`."""
    bare = uuid.removeprefix("GPU-")
    return "".join(f'nvidia_smi_{name}{{uuid="{bare}"}} {value}\n' for name, value in values.items())


def _dcgm_family(name: str, text: str, first: object, second: object) -> str:
    lines = [f"# HELP DCGM_FI_DEV_{name} {text}", f"# TYPE DCGM_FI_DEV_{name} gauge"]
    for index, uuid, bus, value in ((0, FIRST, "3B", first), (1, SECOND, "5E", second)):
        lines.append(f"DCGM_FI_DEV_{name}{{{_DCGM_LABELS.format(index=index, uuid=uuid, bus=bus)}}} {value}")
    return "\n".join(lines) + "\n"


# Its defaults tell no total and no limit of power. A blank value of DCGM is near 2^63.
DCGM = (
    _dcgm_family("SM_CLOCK", "SM clock frequency (in MHz).", 1980, 345)
    + _dcgm_family("MEMORY_TEMP", "Memory temperature (in C).", 39, 9223372036854775794)
    + _dcgm_family("GPU_TEMP", "GPU temperature (in C).", 52, 31)
    + _dcgm_family("POWER_USAGE", "Power draw (in W).", "627.400000", "71.250000")
    + _dcgm_family("GPU_UTIL", "GPU utilization (in %).", 100, 0)
    + _dcgm_family("FB_FREE", "Framebuffer memory free (in MiB).", 110796, 143155)
    + _dcgm_family("FB_USED", "Framebuffer memory used (in MiB).", 32361, 0)
    + _dcgm_family("FB_RESERVED", "Framebuffer memory reserved (in MiB).", 614, 616)
)

# Of a card in slices: the samples have the UUID of the card, and the number of the instance.
DCGM_SLICED = "".join(
    f'DCGM_FI_DEV_{name}{{gpu="0",UUID="{FIRST}",pci_bus_id="00000000:3B:00.0",device="nvidia0",'
    f'modelName="NVIDIA H200",GPU_I_PROFILE="1g.18gb",GPU_I_ID="{part}",Hostname="node-1"}} {value}\n'
    for name, value in (("FB_FREE", 17000), ("FB_USED", 1200), ("FB_RESERVED", 90))
    for part in (7, 8)
)

SMI = """\
# HELP go_goroutines Number of goroutines that currently exist.
# TYPE go_goroutines gauge
go_goroutines 9
# HELP nvidia_smi_clocks_current_memory_clock_hz clocks.current.memory [MHz]
# TYPE nvidia_smi_clocks_current_memory_clock_hz gauge
nvidia_smi_clocks_current_memory_clock_hz{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 1.1251e+10
# HELP nvidia_smi_command_exit_code Exit code of the most recent nvidia-smi run
# TYPE nvidia_smi_command_exit_code gauge
nvidia_smi_command_exit_code 0
# HELP nvidia_smi_enforced_power_limit_watts enforced.power.limit [W]
# TYPE nvidia_smi_enforced_power_limit_watts gauge
nvidia_smi_enforced_power_limit_watts{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 320
# HELP nvidia_smi_gpu_info A metric with a constant '1' value labeled by gpu uuid, name and so on.
# TYPE nvidia_smi_gpu_info gauge
nvidia_smi_gpu_info{compute_cap="8.9",cuda_version="13.2",driver_model_current="[N/A]",driver_model_pending=\
"[N/A]",driver_version="595.71.05",index="0",name="NVIDIA GeForce RTX 4080 SUPER",pci_bus_id=\
"00000000:01:00.0",pci_sub_device_id="0x51101462",serial="[N/A]",uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e",\
vbios_version="95.03.44.00.B2"} 1
# HELP nvidia_smi_last_collect_success Whether the most recent collection succeeded (1) or not (0)
# TYPE nvidia_smi_last_collect_success gauge
nvidia_smi_last_collect_success 1
# HELP nvidia_smi_memory_free_bytes memory.free [MiB]
# TYPE nvidia_smi_memory_free_bytes gauge
nvidia_smi_memory_free_bytes{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 1.517289472e+10
# HELP nvidia_smi_memory_reserved_bytes memory.reserved [MiB]
# TYPE nvidia_smi_memory_reserved_bytes gauge
nvidia_smi_memory_reserved_bytes{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 4.55081984e+08
# HELP nvidia_smi_memory_total_bytes memory.total [MiB]
# TYPE nvidia_smi_memory_total_bytes gauge
nvidia_smi_memory_total_bytes{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 1.7171480576e+10
# HELP nvidia_smi_memory_used_bytes memory.used [MiB]
# TYPE nvidia_smi_memory_used_bytes gauge
nvidia_smi_memory_used_bytes{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 1.545601024e+09
# HELP nvidia_smi_power_draw_watts power.draw [W]
# TYPE nvidia_smi_power_draw_watts gauge
nvidia_smi_power_draw_watts{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 84.24
# HELP nvidia_smi_temperature_gpu temperature.gpu
# TYPE nvidia_smi_temperature_gpu gauge
nvidia_smi_temperature_gpu{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 46
# HELP nvidia_smi_utilization_gpu_ratio utilization.gpu [%]
# TYPE nvidia_smi_utilization_gpu_ratio gauge
nvidia_smi_utilization_gpu_ratio{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 0.07
# HELP nvidia_smi_utilization_memory_ratio utilization.memory [%]
# TYPE nvidia_smi_utilization_memory_ratio gauge
nvidia_smi_utilization_memory_ratio{uuid="5a1e0d3c-7c44-4b0e-9a7e-1f2a3b4c5d6e"} 0.02
"""

# Its NVML build, of a card with one slice.
SMI_SLICED = "".join(
    f'nvidia_smi_{name}{{{labels}uuid="{FIRST.removeprefix("GPU-")}"}} {value}\n'
    for name, labels, value in (
        ("gpu_info", 'index="0",name="NVIDIA H200",pci_bus_id="00000000:3B:00.0",', 1),
        (
            "mig_info",
            f'gpu_instance_id="2",mig_uuid="{SLICED.removeprefix("MIG-")}",profile="3g.71gb",',
            1,
        ),
        ("mig_memory_free_bytes", 'gpu_instance_id="2",', "3.2971181613e+10"),
        ("mig_memory_reserved_bytes", 'gpu_instance_id="2",', "3.81178347e+08"),
        ("mig_memory_total_bytes", 'gpu_instance_id="2",', "7.6235669504e+10"),
        ("mig_memory_used_bytes", 'gpu_instance_id="2",', "4.2883309544e+10"),
        ("power_draw_watts", "", 295.01),
        ("temperature_gpu", "", 36),
    )
)


def samples(text: str) -> list[Sample]:
    """All samples of an answer."""
    return [
        Sample(one.name, one.labels, one.value)
        for family in text_string_to_metric_families(text)
        for one in family.samples
    ]
