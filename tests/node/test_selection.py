"""The `--experts` option."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.node.selection import parse_selection
from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ModelFacts
from moehive.swarm.store.directory import ConvertedDirectory

LAYERS, EXPERTS = (1, 2, 3, 7), 8


@pytest.fixture
def model(mixtral: ConvertedDirectory) -> ModelFacts:
    return replace(mixtral.manifest.model, moe_layers=LAYERS, num_experts=EXPERTS)


@pytest.mark.parametrize(
    ("spec", "layers", "experts"),
    [
        ("all", LAYERS, range(EXPERTS)),
        ("none", (), ()),
        ("*:*", LAYERS, range(EXPERTS)),
        ("1-3:0-7", (1, 2, 3), range(8)),
        ("7:5", (7,), (5,)),
        ("3-7:*", (3, 7), range(8)),  # layers 4 to 6 have no experts
        (" 2 : 0-1 ", (2,), (0, 1)),
    ],
)
def test_what_is_named(model: ModelFacts, spec: str, layers: tuple[int, ...], experts: tuple[int, ...]) -> None:
    assert parse_selection(spec, model) == {ExpertKey(layer, expert) for layer in layers for expert in experts}


def test_several_ranges_add_up(model: ModelFacts) -> None:
    assert parse_selection("1:0-1, 1:1-2,7:7", model) == {*(ExpertKey(1, e) for e in (0, 1, 2)), ExpertKey(7, 7)}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "no colon"),
        ("some", "no colon"),
        ("1", "no colon"),
        ("1:", "not a number or a range"),
        ("1:0,", "no colon"),
        ("-1:0", "not a number or a range"),
        ("1:a", "not a number or a range"),
        ("1:9999999", "not a number or a range"),
        ("1:3-2", "not in the model"),
        ("1:8", "not in the model, which has 0 to 7"),
        ("0:1", "not in the model, which has 1, 2, 3, 7"),
        ("4:1", "not in the model"),
        ("1-8:*", "not in the model"),
    ],
)
def test_what_is_wrong_is_said(model: ModelFacts, spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^--experts: .*{re.escape(says)}"):
        parse_selection(spec, model)


@given(st.text("0123456789-:,* ", max_size=12))
def test_any_text_gives_experts_of_the_model_or_an_error(mixtral: ConvertedDirectory, spec: str) -> None:
    try:
        chosen = parse_selection(spec, mixtral.manifest.model)
    except ConfigError:
        return
    assert chosen <= set(mixtral.manifest.experts)
