"""Readings of exporters: units, what is unknown, slices, and texts that no exporter would write."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.gpu import Gpu
from manager.domain.gpu_metrics import (
    METRICS,
    Exported,
    Sample,
    card_key,
    named,
    read_exporter,
    why_no_exporter_url,
)
from tests.support.exporters import (
    DCGM,
    DCGM_SLICED,
    FIRST,
    MIB,
    SECOND,
    SLICED,
    SMI,
    SMI_SLICED,
    dcgm,
    samples,
    smi,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


def read(text: str) -> Mapping[str, Gpu]:
    return read_exporter(samples(text)).cards


def memory(text: str) -> tuple[int | None, int | None, int | None]:
    """Total, used and free bytes of the first card."""
    gpu = read(text)[FIRST]
    return gpu.vram_total_bytes, gpu.vram_used_bytes, gpu.vram_free_bytes


def test_dcgm_exporter() -> None:
    cards = read(DCGM)

    assert list(cards) == [FIRST, SECOND]
    assert cards[FIRST] == Gpu(
        FIRST,
        0,
        "00000000:3b:00.0",
        "NVIDIA H200",
        vram_total_bytes=(110796 + 32361 + 614) * MIB,
        vram_used_bytes=32361 * MIB,
        vram_free_bytes=110796 * MIB,
        lists_processes=False,
    )
    assert cards[FIRST].sensors == (100, 52, 627.4, None)
    assert cards[SECOND].sensors == (0, 31, 71.25, None)
    assert cards[SECOND].vram_used_bytes == 0


def test_nvidia_gpu_exporter() -> None:
    exported = read_exporter(samples(SMI))

    assert exported.collects
    assert exported.cards == {
        FIRST: Gpu(
            FIRST,
            0,
            "00000000:01:00.0",
            "NVIDIA GeForce RTX 4080 SUPER",
            vram_total_bytes=17171480576,
            vram_used_bytes=1545601024,
            vram_free_bytes=15172894720,
            lists_processes=False,
        )
    }
    assert exported.cards[FIRST].sensors == (7, 46, 84.24, 320.0)


def test_an_exporter_that_could_not_read_its_cards() -> None:
    text = "nvidia_smi_last_collect_success 0\nnvidia_smi_command_exit_code 9\n"
    assert read_exporter(samples(text)) == Exported({}, collects=False)
    assert not read_exporter(samples(text + "nvidia_smi_last_collect_success 1\n")).collects


def test_dcgm_tells_total_and_limit_of_power_where_they_are_configured() -> None:
    text = dcgm(FB_TOTAL=143771, FB_USED=100, ENFORCED_POWER_LIMIT=700)
    assert memory(text) == (143771 * MIB, 100 * MIB, None)
    assert read(text)[FIRST].power_limit_watts == 700.0


@pytest.mark.parametrize("lacking", ["FB_USED", "FB_FREE", "FB_RESERVED"])
def test_the_total_of_dcgm_is_unknown_where_a_part_of_it_is(lacking: str) -> None:
    values = {"FB_USED": 10, "FB_FREE": 20, "FB_RESERVED": 30}
    del values[lacking]
    assert memory(dcgm(**values))[0] is None


def test_figures_beyond_the_total_contradict_it() -> None:
    assert memory(dcgm(FB_TOTAL=1000, FB_USED=900, FB_FREE=200)) == (None, None, None)
    assert memory(dcgm(FB_TOTAL=1000, FB_USED=900, FB_FREE=90, FB_RESERVED=300)) == (None, None, None)
    rounded = memory(dcgm(FB_TOTAL=1000, FB_USED=900, FB_FREE=101))
    assert rounded == (1000 * MIB, 900 * MIB, 101 * MIB)


def test_a_card_without_memory_of_its_own() -> None:
    assert memory(smi(memory_total_bytes=0, memory_used_bytes=0, memory_free_bytes=0)) == (None, None, None)


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf", "-Inf", "9223372036854775794", "1e300", "9" * 4000])
def test_absurd_values_are_unknown(value: str) -> None:
    gpu = read(
        dcgm(FB_FREE=value, FB_USED=value, GPU_UTIL=value, GPU_TEMP=value, POWER_USAGE=value)
        + smi(memory_total_bytes=value, enforced_power_limit_watts=value)
    )[FIRST]
    assert (gpu.vram_total_bytes, gpu.vram_used_bytes, gpu.vram_free_bytes) == (None, None, None)
    assert gpu.sensors == (None, None, None, None)


def test_a_share_is_no_percentage() -> None:
    assert read(smi(utilization_gpu_ratio=1))[FIRST].utilisation_percent == 100
    assert read(smi(utilization_gpu_ratio=55))[FIRST].utilisation_percent is None
    assert read(dcgm(GPU_UTIL=101))[FIRST].utilisation_percent is None


def test_samples_that_agree_count_once_and_others_are_unknown() -> None:
    assert memory(dcgm(FB_FREE=7) * 2)[2] == 7 * MIB
    assert memory(dcgm(FB_FREE=7) + dcgm(FB_FREE=8) + dcgm(FB_FREE=7))[2] is None
    assert memory(dcgm(FB_FREE="NaN") + dcgm(FB_FREE=8))[2] is None


def test_samples_of_dcgm_about_slices_are_not_those_of_their_card() -> None:
    assert read(DCGM_SLICED) == {}
    assert read(DCGM + DCGM_SLICED) == read(DCGM)


def test_a_slice_has_the_memory_of_its_instance_and_the_temperature_of_its_card() -> None:
    gpu = read(SMI_SLICED)[SLICED]
    assert gpu == Gpu(
        SLICED,
        0,
        "00000000:3b:00.0",
        "NVIDIA H200 MIG 3g.71gb",
        vram_total_bytes=76235669504,
        vram_used_bytes=42883309544,
        vram_free_bytes=32971181613,
        lists_processes=False,
    )
    assert gpu.sensors == (None, 36, None, None)


def test_a_slice_of_an_unknown_card_and_instance() -> None:
    gpu = read('nvidia_smi_mig_info{uuid="1",gpu_instance_id="2",mig_uuid="MIG-3"} 1\n')["MIG-3"]
    assert (gpu.name, gpu.pci_bus_id, gpu.vram_free_bytes) == ("NVIDIA GPU MIG", "", None)


def test_a_slice_that_is_placed_twice_is_unknown() -> None:
    once = 'nvidia_smi_mig_info{uuid="1",gpu_instance_id="2",mig_uuid="3"} 1\n'
    again = once.replace('"2"', '"4"')
    assert "MIG-3" in read(once * 2)
    assert "MIG-3" not in read(once + again + once)


@pytest.mark.parametrize(
    "labels",
    ["", 'uuid=""', 'UUID=""', 'gpu="0"', f'uuid="{"x" * 129}"', f'uuid="1",mig_uuid="{"x" * 129}"'],
)
def test_nothing_is_read_of_a_card_without_a_uuid(labels: str) -> None:
    names = ("nvidia_smi_mig_info", *([] if "mig_uuid" in labels else ["DCGM_FI_DEV_FB_FREE"]))
    assert read("".join(f"{name}{{{labels}}} 1\n" for name in names)) == {}


def test_other_metrics_name_no_card() -> None:
    assert read(f'up{{UUID="{FIRST}"}} 1\nDCGM_FI_DEV_SM_CLOCK{{UUID="{FIRST}"}} 1\n') == {}


def test_more_cards_than_any_machine_has_are_left_out_and_hide_no_figure_of_the_others() -> None:
    many = range(600)
    cards = read(
        "".join(smi(str(n), memory_total_bytes=8) for n in many)
        + "".join(smi(str(n), memory_used_bytes=8) for n in many)
        + "".join(f'nvidia_smi_mig_info{{uuid="1",mig_uuid="{n}"}} 1\n' for n in many)
        + "".join(f'nvidia_smi_mig_memory_free_bytes{{uuid="{n}"}} 1\n' for n in many)
    )
    assert len(cards) == 2 * 512
    assert cards["GPU-511"].vram_used_bytes == 8
    assert "GPU-512" not in cards


def test_names_have_no_control_characters_and_are_bounded() -> None:
    hostile = dcgm(FB_FREE=1).replace("NVIDIA H200", "\x1b[31mred\x07" + "x" * 500)
    hostile = hostile.replace("00000000:3B:00.0", "../../etc")
    gpu = read(hostile)[FIRST]
    assert gpu.name.startswith("[31mredx")
    assert len(gpu.name) <= 128
    assert gpu.pci_bus_id == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FIRST, FIRST.removeprefix("GPU-")),
        (FIRST, FIRST.upper()),
        (FIRST, f" {FIRST} "),
        (SLICED, SLICED.upper()),
        ("MIG-GPU-1/1/0", "mig-gpu-1/1/0"),
    ],
)
def test_spellings_of_one_card(one: str, other: str) -> None:
    assert card_key(one) == card_key(other)


def test_a_card_and_a_slice_with_the_same_number_are_two() -> None:
    assert card_key("GPU-1") != card_key("MIG-1")
    assert card_key("GPU-1") != card_key("GPU-11")


def test_the_beginning_of_a_uuid_names_a_card_where_no_other_begins_so() -> None:
    cards = read(DCGM)
    assert named(cards, FIRST) is cards[FIRST]
    assert named(cards, FIRST.removeprefix("GPU-").upper()) is cards[FIRST]
    assert named(cards, FIRST[:12]) is cards[FIRST]
    assert named(cards, FIRST[:20]) is cards[FIRST]
    for too_short in (FIRST[:11], "GPU-", "GPU-5a1e", "", "GPU", "MIG-", FIRST[:12].replace("GPU", "MIG")):
        assert named(cards, too_short) is None
    assert named(cards, "GPU-5a1e0d3cc") is None
    assert named(cards, FIRST + "0") is None
    assert named({"GPU-odd": 1}, "GPU-ODD") == 1


def test_the_beginning_of_two_uuids_names_neither() -> None:
    other = FIRST[:-1] + "0"
    cards = read(DCGM + smi(other, memory_free_bytes=1))
    assert named(cards, FIRST[:20]) is None
    assert named(cards, FIRST) is cards[FIRST]


NAMES = st.sampled_from(sorted(METRICS)) | st.text(max_size=20)
LABELS = st.dictionaries(
    st.sampled_from(
        [
            "uuid",
            "UUID",
            "mig_uuid",
            "gpu_instance_id",
            "GPU_I_ID",
            "modelName",
            "name",
            "pci_bus_id",
            "profile",
        ]
    ),
    st.sampled_from(["1", "GPU-1", "MIG-1", "2", ""]) | st.text(max_size=200),
)
VALUES = st.floats() | st.integers() | st.sampled_from([10**4000, 0, 1, 1024, math.nan])


@given(st.lists(st.builds(Sample, NAMES, LABELS, VALUES), max_size=30))
def test_no_text_makes_an_absurd_reading(found: list[Sample]) -> None:
    for key, gpu in read_exporter(found).cards.items():
        assert card_key(gpu.uuid) == key == gpu.uuid
        assert not gpu.processes
        assert not gpu.lists_processes
        for known in (gpu.vram_total_bytes, gpu.vram_used_bytes, gpu.vram_free_bytes):
            assert known is None or (isinstance(known, int) and 0 <= known <= 2**46)
        assert gpu.vram_total_bytes != 0
        for sensor, most in zip(gpu.sensors, (100, 200, 1e5, 1e5), strict=True):
            assert sensor is None or 0 <= sensor <= most
        assert gpu.name.isprintable()
        assert len(gpu.name) <= 300


@pytest.mark.parametrize(
    "url",
    [
        "http://{node}:9400/metrics",
        "http://{node}/metrics",
        "https://{node}:9400/metrics",
        "http://tasks.gpu-exporter:9835/metrics",
        "http://10.0.0.5:9400/metrics",
        "http://[fd00::5]:9400/a/b",
    ],
)
def test_urls_of_exporters(url: str) -> None:
    assert why_no_exporter_url(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "metrics",
        "{node}:9400/metrics",
        "ftp://{node}/metrics",
        "http://{node}:9400",
        "http://{node}:9400/",
        "http:///metrics",
        "http://{node}:0/metrics",
        "http://{node}:99999/metrics",
        "http://[::1/metrics",
        "http://user:word@{node}/metrics",
        "http://user@{node}/metrics",
        "http://{node}/metrics?a=b",
        "http://{node}/metrics#a",
        "http://{node}x/metrics",
        "http://x{node}/metrics",
        "http://{node}.lan/metrics",
        "http://{node}{node}/metrics",
        "http://{host}/metrics",
        "http://{node}/{node}",
        "http://node/{node}",
        "http://{node}:{node}/metrics",
        "http://no de/metrics",
        "http://node/met\nrics",
        "http:\\\\node\\metrics",
    ],
)
def test_what_is_no_url_of_exporters(url: str) -> None:
    assert why_no_exporter_url(url)
