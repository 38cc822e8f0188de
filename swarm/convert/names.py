"""What a tensor's name says: whose expert it is, or which part of the skeleton. Two patterns cover every family.

A name that looks like an expert's tensor and fits neither pattern is refused by the planner, never taken for dense.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

_SINGLE = re.compile(
    r"(?P<prefix>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<tensor>w1|w2|w3|gate_proj|up_proj|down_proj)\.(?P<kind>\w+)"
)
_FUSED = re.compile(r"(?P<prefix>(?:.*\.)?experts)\.(?P<tensor>gate_up_proj|down_proj)(?P<kind>_bias|_blocks|_scales)?")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SHARED = re.compile(r"\.shared_experts?\.")
_ROUTER = re.compile(r"(?P<block>.*\.layers\.\d+\.\w+)\.(?:gate|router)\.weight")
_MTP_PREFIX = "mtp."  # Qwen3-Next numbers its multi-token-prediction layers from 0 below a prefix of their own

_ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
# A fused kind in the words of the single one.
_FUSED_KINDS = {None: "weight", "_bias": "bias", "_blocks": "blocks", "_scales": "scales"}


class Role(enum.StrEnum):
    """Which matrix of an expert a tensor belongs to. The order is the order on disk: gate and up lie together."""

    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """A name taken apart."""

    prefix: str  # up to and including "experts"
    expert: int | None  # None: a fused tensor [E, ...] of all experts
    tensor: str  # as in the source: "w1", "gate_proj", "gate_up_proj_blocks", ...
    role: Role
    kind: str  # "weight", "bias", "blocks", "scales", "weight_scale_inv", or what the source invented

    def name_of(self, expert: int) -> str:
        """Name of one expert's part; the source's own name where the source has one per expert."""
        if self.expert is None:
            return f"{self.prefix}.{expert}.{self.tensor}"
        return f"{self.prefix}.{self.expert}.{self.tensor}.{self.kind}"


def parse_expert(name: str) -> ExpertTensor | None:
    """The parts of a routed expert's tensor name; None where it is none."""
    if single := _SINGLE.fullmatch(name):
        tensor = single["tensor"]
        return ExpertTensor(single["prefix"], int(single["expert"]), tensor, Role(_ROLES[tensor]), single["kind"])
    if fused := _FUSED.fullmatch(name):
        role = Role.GATE_UP if fused["tensor"] == "gate_up_proj" else Role.DOWN
        tensor = fused["tensor"] + (fused["kind"] or "")
        return ExpertTensor(fused["prefix"], None, tensor, role, _FUSED_KINDS[fused["kind"]])
    return None


def looks_like_expert(name: str) -> bool:
    """Whether a name lies below a routed-experts module."""
    return ".experts." in f".{name}"


def is_shared(name: str) -> bool:
    """Whether a tensor belongs to an always-on (shared) expert."""
    return _SHARED.search(name) is not None


def layer_of(name: str, num_layers: int) -> int | None:
    """The decoder layer in a tensor's name; multi-token-prediction layers count on from `num_layers`."""
    match = _LAYER.search(name)
    if match is None:
        return None
    return int(match[1]) + (num_layers if name.startswith(_MTP_PREFIX) else 0)


def is_mtp(name: str, num_layers: int) -> bool:
    """Whether a tensor belongs to multi-token prediction, which plain generation does not need."""
    layer = layer_of(name, num_layers)
    return name.startswith(_MTP_PREFIX) or (layer is not None and layer >= num_layers)


def is_router(name: str) -> bool:
    """Whether a tensor is a router's weight: its layer must then have experts."""
    return _ROUTER.fullmatch(name) is not None
