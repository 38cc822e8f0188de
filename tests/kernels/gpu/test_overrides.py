"""Overrides from a file: what holds replaces, and whatever is unknown is an error that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moehive.kernels.formats import WeightFormat
from moehive.kernels.gpu.configuration import Configuration, Device, Matrix, Tile
from moehive.kernels.gpu.overrides import apply_overrides, load_overrides

H100 = Device(90, 132)
GATE_UP, DOWN = Matrix(768, 2048, WeightFormat.PLAIN, gated=True), Matrix(2048, 768, WeightFormat.PLAIN)
CHOSEN = Configuration(16, Tile(32, 128), Tile(64, 64))


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_first_that_holds_replaces_its_fields(tmp_path: Path) -> None:
    file = written(
        tmp_path / "overrides.json",
        [
            {"sm": 80, "use": {"block": 64}},
            {"rows_from": 2, "use": {"block": 64}},
            {"sm": 90, "format": "plain", "hidden": 2048, "intermediate": 768, "rows_to": 1.5,
             "use": {"block": 32, "gate_up": {"columns": 64, "stages": 5}, "down": {"swap": True}}},
            {"use": {"block": 128}},
        ],
    )  # fmt: skip
    overrides = load_overrides(file)
    found = apply_overrides(overrides, CHOSEN, 1.0, GATE_UP, DOWN, H100)
    assert found == Configuration(32, Tile(64, 128, stages=5), Tile(64, 64, swap=True))
    assert apply_overrides(overrides, CHOSEN, 3.0, GATE_UP, DOWN, H100).block == 64
    assert apply_overrides(overrides, CHOSEN, 1.7, GATE_UP, DOWN, H100).block == 128
    assert apply_overrides((), CHOSEN, 1.0, GATE_UP, DOWN, H100) is CHOSEN


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    overrides = load_overrides(
        written(tmp_path / "o", [{"use": {"down": {"columns": 256, "inner": 256, "stages": 8}}}])
    )
    with pytest.raises(ValueError, match="bytes of shared memory"):
        apply_overrides(overrides, CHOSEN, 1.0, GATE_UP, DOWN, H100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not JSON"),
        ({}, "not a JSON list"),
        ([3], "entry 0: not an object"),
        ([{"use": {}}, {}], "entry 1: 'use' is missing"),
        ([{"usage": {}}], "unknown key 'usage'"),
        ([{"use": {"rows": 4}}], "use: unknown key 'rows'"),
        ([{"use": {"down": {"block": 4}}}], "down: unknown key 'block'"),
        ([{"use": {"block": True}}], "block is True, not of type int"),
        ([{"use": {"block": 48}}], "block is 48, not a power of two from 16 to 128"),
        ([{"use": {"down": {"inner": 16}}}], "inner is 16, not a power of two from 32"),
        ([{"use": {"down": {"stages": 0}}}], "stages is 0"),
        ([{"use": {"down": {"swap": 1}}}], "swap is 1, not of type bool"),
        ([{"use": {}, "sm": "90"}], "sm is '90', not of type int"),
        ([{"use": {}, "format": "int3"}], "unknown format 'int3'"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_overrides(written(tmp_path / "overrides.json", content))
