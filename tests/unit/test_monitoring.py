"""compose/monitoring: the dashboard and the alert rules name series and labels that the daemon has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support.scraping import busy, scraped

if TYPE_CHECKING:
    from collections.abc import Iterator

MONITORING = Path(__file__).resolve().parents[2] / "compose" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
DATASOURCES = yaml.safe_load((MONITORING / "grafana" / "datasource.yml").read_text(encoding="utf-8"))

# What Prometheus adds to each series, and the series that it makes itself.
OF_PROMETHEUS = {"job", "instance"}
UP = {"up": {"job", "instance"}}
SERIES = re.compile(r"\b(?:ollama_manager_[a-z0-9_]+|up\b)")
MATCHERS = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')
CLAUSES = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
IN_LEGEND = re.compile(r"\{\{\s*([a-z_]+)\s*\}\}")
IN_ANNOTATION = re.compile(r"\$labels\.([a-z_]+)")


def known_series() -> dict[str, set[str]]:
    """The labels of each sample that a daemon renders."""
    found: dict[str, set[str]] = dict(UP)
    for family in scraped(busy()).values():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str, list[str]]]:
    """Where an expression stands, the expression, and the labels that are shown of its result."""
    for rule in alerts():
        shown = IN_ANNOTATION.findall(" ".join(rule["annotations"].values()))
        yield rule["alert"], rule["expr"], shown
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"], IN_LEGEND.findall(target["legendFormat"])


def labels_in(expression: str) -> set[str]:
    matched = MATCHERS.findall(expression)
    grouped = ",".join(CLAUSES.findall(expression)).split(",")
    return {name.strip() for name in (*matched, *grouped) if name.strip()}


@pytest.mark.parametrize(("place", "expression", "shown"), list(expressions()))
def test_each_series_and_label_is_one_that_the_daemon_has(
    place: str, expression: str, shown: list[str]
) -> None:
    known = known_series()
    named = set(SERIES.findall(expression))
    assert named, f"{place}: nothing is read"
    assert named <= known.keys(), place
    labels = set[str]().union(*(known[name] for name in named)) | OF_PROMETHEUS
    assert labels_in(expression) | set(shown) <= labels, place


def test_the_check_notices_names_that_do_not_exist() -> None:
    assert set(SERIES.findall('sum by (a) (rate(ollama_manager_x_total{b="1",c=~"2|3"}[5m])) / up')) == {
        "ollama_manager_x_total",
        "up",
    }
    assert labels_in('sum by (a, d) (x{b="1", c!~"2|3"}) / ignoring (e) y') == {"a", "b", "c", "d", "e"}
    assert "ollama_manager_requests" not in known_series()
    assert known_series()["ollama_manager_request_duration_seconds_bucket"] == {"target", "le"}


def test_each_rule_says_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert {"summary", "description"} <= rule["annotations"].keys(), rule["alert"]


def test_the_panels_use_the_datasource_that_is_provisioned_and_do_not_overlap() -> None:
    (datasource,) = DATASOURCES["datasources"]
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
    for panel in panels():
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": "prometheus", "uid": datasource["uid"]}, panel["title"]
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_the_label_of_instances_is_not_renamed() -> None:
    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["honor_labels"] is True
    assert job["authorization"]["credentials_file"].startswith("/run/secrets/")
