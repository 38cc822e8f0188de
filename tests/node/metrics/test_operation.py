"""What operators are given names only metrics that a node has: the Grafana dashboard, and docs/operation.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from support.node_facts import PEER, coverage, node_facts, samples

from moehive.node.metrics.node import node_metrics, phase_metrics
from moehive.node.status import Phase

CHECKOUT = Path(__file__).parents[3]
SAMPLES = samples([*phase_metrics(Phase.READY), *node_metrics(PEER, node_facts(), coverage())])
NAMES = {name for name, _ in SAMPLES}
ADDED = {"instance"}  # by the Prometheus server


def expressions() -> Iterator[str]:
    dashboard = json.loads((CHECKOUT / "scripts" / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield variable["query"]


def labels_of(name: str) -> set[str]:
    return {label for known, labels in SAMPLES if known == name for label, _ in labels} | ADDED


def test_every_metric_of_the_grafana_dashboard_is_exported() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"moehive_\w+", expression)}
    assert len(asked) > 20
    assert asked <= NAMES


def test_every_label_that_it_groups_by_is_one_of_the_metrics() -> None:
    for expression in expressions():
        known = set().union(*(labels_of(name) for name in re.findall(r"moehive_\w+", expression)), ADDED)
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        assert grouped | set(re.findall(r"(\w+)=", expression)) <= known, expression


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads((CHECKOUT / "scripts" / "grafana.json").read_text())
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert all(place["x"] + place["w"] <= 24 for place in places)


def test_every_metric_that_the_manual_names_is_exported() -> None:
    text = (CHECKOUT / "docs" / "operation.md").read_text()
    named = set(re.findall(r"\bmoehive_\w+", text))
    assert len(named) > 10
    assert named <= NAMES


def test_the_service_waits_for_what_the_node_says_and_lets_it_leave() -> None:
    """READY=1 and STOPPING=1 of a real node: tests/node/cli/test_node_swarm.py."""
    lines = (CHECKOUT / "scripts" / "moehive-node.service").read_text().splitlines()
    assert {"Type=notify", "TimeoutStartSec=infinity", "KillMode=mixed", "RestartPreventExitStatus=2"} <= set(lines)
    assert not [line for line in lines if line.startswith(("MemoryDenyWriteExecute", "PrivateDevices"))]
