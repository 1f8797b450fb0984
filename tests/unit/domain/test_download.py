"""The progress of a download: sums over layers, and a speed that counts only what came over the network."""

from __future__ import annotations

import pytest

from manager.domain import download
from manager.domain.download import Download, Layer


def test_layers_are_added_up_and_only_growth_has_a_speed() -> None:
    one = Download()
    assert (one.bytes_per_s(0.0), one.left_s(0.0), one.layers) == (None, None, ())
    one.take(Layer("a", 100, 100), 0.0)  # it was here before
    one.take(Layer("b", 50, 300), 0.0)  # half of it from an earlier download
    assert (one.completed_bytes, one.total_bytes) == (150, 400)
    assert one.bytes_per_s(0.0) is None
    assert one.bytes_per_s(1.0) == 0.0
    one.take(Layer("b", 250, 300), 2.0)
    assert one.bytes_per_s(2.0) == 100.0
    assert one.left_s(2.0) == 0.5
    assert [layer.digest for layer in one.layers] == ["a", "b"]


def test_the_speed_is_that_of_the_last_seconds() -> None:
    one = Download()
    for second in range(20):
        one.take(Layer("a", 1000 * second, 100_000), float(second))
    one.take(Layer("a", 19_000, 100_000), 19.01)  # too soon for another sample
    assert one.bytes_per_s(19.0) == pytest.approx(1000.0)
    assert one.bytes_per_s(23.0) == pytest.approx(200.0)  # nothing has come since second 19
    assert one.bytes_per_s(24.0) == 0.0
    assert one.bytes_per_s(60.0) == 0.0
    assert one.left_s(60.0) is None


def test_odd_counts_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MOST_LAYERS", 2)
    one = Download()
    one.take(Layer("a", 500, 100), 0.0)
    one.take(Layer("b", -5, 100), 0.0)
    one.take(Layer("c", 1, 100), 0.0)  # one too many
    one.take(Layer("a", 20, 100), 1.0)  # less than before
    assert (one.completed_bytes, one.total_bytes) == (20, 200)
    assert one.bytes_per_s(1.0) == 0.0
