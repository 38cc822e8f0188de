"""Every weight format and every way of cutting against float64, in the dtype of the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from support.random_experts import CLAMPED, KINDS, Kind, layer_oracle, random_expert

from moehive.kernels.expert_ffn import FfnSpec
from moehive.kernels.formats import WeightFormat
from moehive.kernels.gpu.configuration import Configuration, Tile
from moehive.kernels.gpu.experts import INTERPRETED, run_experts

# bf16 rounds inputs of the second product, and decoded weights of some formats, by 2 ** -9 at most, independently
TOLERANCE = 1e-5 if INTERPRETED else 5e-3  # of the root mean square

CUTS = {
    "chosen": None,
    "split": Configuration(16, Tile(32, 64, split=4), Tile(64, 64, split=2)),
    "swap": Configuration(32, Tile(64, 64, swap=True), Tile(64, 64, swap=True)),
    "persistent": Configuration(64, Tile(64, 64, group=4, persistent=True), Tile(128, 64, group=8, persistent=True)),
}


@dataclass(frozen=True, slots=True)
class Check:
    """What was compared, and the root mean square of the difference over that of the result."""

    kind: str
    cut: str
    tokens: int
    error: float

    @property
    def passed(self) -> bool:
        """NaN does not."""
        return self.error <= TOLERANCE


def checks(device: torch.device, kinds: dict[str, Kind], cuts: list[str], tokens: list[int]) -> Iterator[Check]:
    """All combinations, on a layer of 8 experts of which one is missing: hidden 320 and inner 192 fill no last tile."""
    for name, kind in kinds.items():
        generator = torch.Generator(device).manual_seed(0)
        spec = CLAMPED if kind.format is WeightFormat.MXFP4 or kind.transposed else FfnSpec()
        sizes = (96, 64) if INTERPRETED else (320, 192)
        experts = [random_expert(kind, *sizes, generator, bias=spec is CLAMPED) for _ in range(7)]
        for count in tokens:
            hidden = torch.randn(count, sizes[0], generator=generator, device=device).to(_activations(kind))
            weights, index = torch.rand(count, 8, generator=generator, device=device).topk(2)
            wanted = layer_oracle(hidden, index, weights, [*experts, None], spec)
            for cut in cuts:
                matrices = [*(expert.matrices for expert in experts), None]
                found = run_experts(
                    hidden, index, weights, matrices, spec, dtype=torch.float32, configuration=CUTS[cut]
                )
                error = (found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
                yield Check(name, cut, count, float(error))


def _activations(kind: Kind) -> torch.dtype:
    return kind.dtype if kind.format is WeightFormat.PLAIN else torch.bfloat16


def all_checks(device: torch.device) -> Iterator[Check]:
    """What gpu.sh runs: as chosen for one row, some, and many; and every cut where loads or decoding differ."""
    yield from checks(device, dict(KINDS), ["chosen"], [1, 7, 300])
    names = ("plain-bfloat16", "plain-bfloat16-transposed", "fp8-block", "int4-group-g128-zero", "mxfp4")
    yield from checks(device, {name: KINDS[name] for name in names}, [cut for cut in CUTS if cut != "chosen"], [70])
