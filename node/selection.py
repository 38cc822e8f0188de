"""The `--experts` option: which of a model's experts a node is to hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ModelFacts

AUTO = "auto"
_HINT = "use all, none, auto, or ranges such as 0-3:0-7 (layers:experts), several separated by commas"
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?|\*")


def parse_selection(spec: str, model: ModelFacts) -> frozenset[ExpertKey]:
    """The experts that `spec` names; not for "auto", which needs to know the swarm. Raises ConfigError."""
    assert spec != AUTO
    if spec in ("all", "none"):
        return frozenset(_product(model.moe_layers, range(model.num_experts)) if spec == "all" else ())
    chosen: set[ExpertKey] = set()
    for part in spec.split(","):
        layers, colon, experts = part.strip().partition(":")
        if not colon:
            raise ConfigError(f"--experts: {part.strip()!r} has no colon; {_HINT}")
        chosen.update(
            _product(
                _numbers(layers, model.moe_layers, "MoE layer"),
                _numbers(experts, range(model.num_experts), "expert"),
            )
        )
    return frozenset(chosen)


def _product(layers: Collection[int], experts: Collection[int]) -> Iterator[ExpertKey]:
    return (ExpertKey(layer, expert) for layer in layers for expert in experts)


def _numbers(text: str, known: Collection[int], what: str) -> list[int]:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--experts: {text!r} is not a number or a range; {_HINT}")
    if match[1] is None:
        return list(known)
    first, last = int(match[1]), int(match[2] or match[1])
    numbers = [number for number in known if first <= number <= last]
    if first > last or first not in known or last not in known:
        raise ConfigError(f"--experts: {what} {text!r} is not in the model, which has {_describe(known)}")
    return numbers


def _describe(known: Collection[int]) -> str:
    ordered = sorted(known)
    gaps = len(ordered) != ordered[-1] - ordered[0] + 1
    return ", ".join(map(str, ordered)) if gaps else f"{ordered[0]} to {ordered[-1]}"
