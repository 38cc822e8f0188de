"""Random experts in every weight format, and what a layer of them computes, in float64.

The oracle shares nothing with the kernels: values are made from the codes by the sentences of kernels/formats.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moehive.kernels.expert_ffn import ACTIVATIONS, CLAMPED_INTERLEAVED, FfnSpec
from moehive.kernels.formats import ExpertMatrices, WeightFormat, WeightMatrix

CLAMPED = FfnSpec(gate=CLAMPED_INTERLEAVED, alpha=1.702, limit=7.0)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Place = Callable[[Tensor], Tensor]  # where a part of an expert goes, e.g. into a buffer with margins


@dataclass(frozen=True, slots=True)
class Kind:
    """A weight format with what it leaves open."""

    format: WeightFormat
    group: int = 0  # columns that share a scale
    dtype: torch.dtype = torch.float32  # of PLAIN weights, or of the scales of INT8_CHANNEL and INT4_GROUP
    zero: bool = False
    transposed: bool = False

    @property
    def name(self) -> str:
        """For test ids and tables."""
        parts = [self.format.value, str(self.dtype).removeprefix("torch.") if self.format is WeightFormat.PLAIN else ""]
        parts += [f"g{self.group}" if self.format is WeightFormat.INT4_GROUP else "", "zero" if self.zero else ""]
        return "-".join(filter(None, [*parts, "transposed" if self.transposed else ""]))


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """An expert, and its values as float64 (biases too)."""

    matrices: ExpertMatrices
    gate_up: Tensor  # [2I, H]
    down: Tensor  # [H, I]
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def random_expert(
    kind: Kind, hidden: int, inner: int, generator: torch.Generator, *, bias: bool = False, place: Place = lambda t: t
) -> Expert:
    """One expert with outputs of about the size of its inputs."""
    gate_up, gate_up_values = random_matrix(kind, 2 * inner, hidden, generator, place)
    down, down_values = random_matrix(kind, hidden, inner, generator, place)
    biases: list[Tensor | None] = [None, None]
    if bias:
        biases = [place(_normal((n,), generator).to(_bias_dtype(kind))) for n in (2 * inner, hidden)]
    matrices = ExpertMatrices(gate_up, down, *biases)
    return Expert(matrices, gate_up_values, down_values, *(None if b is None else b.double() for b in biases))


def _bias_dtype(kind: Kind) -> torch.dtype:
    return kind.dtype if kind.format is WeightFormat.PLAIN else torch.bfloat16


def random_matrix(
    kind: Kind, rows: int, columns: int, generator: torch.Generator, place: Place
) -> tuple[WeightMatrix, Tensor]:
    """A matrix [rows, columns] of standard deviation about 1 / sqrt(columns), and its values as float64."""
    size = columns**-0.5
    shape = (rows, columns)
    if kind.format is WeightFormat.PLAIN:
        data = (_normal(shape, generator) * size).to(kind.dtype)
        return WeightMatrix(kind.format, _oriented(data, kind, place)), data.double()
    if kind.format is WeightFormat.FP8_BLOCK:
        data = (_normal(shape, generator) * 64).to(torch.float8_e4m3fn)
        scale = _sizes((-(-rows // kind.group), -(-columns // kind.group)), generator) * size / 64
        values = data.double() * _spread(scale, kind.group, columns).repeat_interleave(kind.group, 0)[:rows]
        block = (kind.group, kind.group)
        return WeightMatrix(kind.format, _oriented(data, kind, place), place(scale), block=block), values
    if kind.format is WeightFormat.INT8_CHANNEL:
        data = torch.randint(-127, 128, shape, generator=generator, device=generator.device).to(torch.int8)
        scale = (_sizes((rows,), generator) * size / 73).to(kind.dtype)
        matrix = WeightMatrix(kind.format, _oriented(data, kind, place), place(scale), block=(1, columns))
        return matrix, data.double() * scale.double()[:, None]
    codes = torch.randint(0, 16, shape, generator=generator, device=generator.device)
    packed = place((codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8))
    groups = (rows, -(-columns // kind.group))
    if kind.format is WeightFormat.MXFP4:
        exponent = torch.randint(121, 129, groups, generator=generator, device=generator.device)
        exponent += round(torch.tensor(size / 3).log2().item()) + 1
        table = torch.tensor((*_E2M1, *(-value for value in _E2M1)), dtype=torch.float64, device=generator.device)
        values = table[codes] * _spread(torch.exp2(exponent.double() - 127), kind.group, columns)
        return WeightMatrix(kind.format, packed, place(exponent.to(torch.uint8)), block=(1, 32)), values
    scale = (_sizes(groups, generator) * size / 5).to(kind.dtype)
    zero = torch.randint(0, 16, groups, generator=generator, device=generator.device) if kind.zero else None
    shift = _spread(zero.double(), kind.group, columns) if zero is not None else 8.0
    values = (codes.double() - shift) * _spread(scale.double(), kind.group, columns)
    points = None if zero is None else place(zero.to(torch.uint8))
    return WeightMatrix(kind.format, packed, place(scale), points, block=(1, kind.group)), values


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _sizes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scales between 0.5 and 1.5: wrong ones show."""
    return torch.rand(shape, generator=generator, device=generator.device) + 0.5


def _oriented(data: Tensor, kind: Kind, place: Place) -> Tensor:
    return place(data.t().contiguous()).t() if kind.transposed else place(data)


def _spread(scale: Tensor, group: int, columns: int) -> Tensor:
    """Each group's scale for each of its columns."""
    return scale.double().repeat_interleave(group, 1)[:, :columns]


def layer_oracle(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: Sequence[Expert | None], spec: FfnSpec
) -> Tensor:
    """The layer's sum over experts that are there, float64 [T, H]."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for number, expert in enumerate(experts):
        token, position = torch.where(index == number)
        if expert is not None and token.numel():
            rows = expert_oracle(hidden[token].double(), expert, spec)
            out.index_add_(0, token, rows * weights[token, position].double()[:, None])
    return out


def expert_oracle(rows: Tensor, expert: Expert, spec: FfnSpec) -> Tensor:
    """One expert's unweighted output for rows [R, H], all in float64."""
    both = rows @ expert.gate_up.t() + (0.0 if expert.gate_up_bias is None else expert.gate_up_bias)  # [R, 2I]
    if spec.gate == CLAMPED_INTERLEAVED:
        assert spec.alpha is not None
        assert spec.limit is not None
        gate, up = both[:, 0::2].clamp(max=spec.limit), both[:, 1::2].clamp(-spec.limit, spec.limit)
        inner = (up + 1) * gate * torch.sigmoid(spec.alpha * gate)
    else:
        gate, up = both.chunk(2, dim=1)
        inner = ACTIVATIONS[spec.activation](gate) * up
    return inner @ expert.down.t() + (0.0 if expert.down_bias is None else expert.down_bias)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    if not wanted.numel():
        return 0.0
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(WeightFormat.PLAIN),
        Kind(WeightFormat.PLAIN, dtype=torch.bfloat16),
        Kind(WeightFormat.PLAIN, dtype=torch.float16),
        Kind(WeightFormat.PLAIN, dtype=torch.bfloat16, transposed=True),
        Kind(WeightFormat.FP8_BLOCK, group=128),
        Kind(WeightFormat.FP8_BLOCK, group=128, transposed=True),
        Kind(WeightFormat.INT8_CHANNEL, dtype=torch.float32),
        Kind(WeightFormat.INT8_CHANNEL, dtype=torch.bfloat16, transposed=True),
        Kind(WeightFormat.INT4_GROUP, group=32, dtype=torch.bfloat16),
        Kind(WeightFormat.INT4_GROUP, group=32, dtype=torch.float16, zero=True),
        Kind(WeightFormat.INT4_GROUP, group=64, dtype=torch.float32),
        Kind(WeightFormat.INT4_GROUP, group=128, dtype=torch.bfloat16, zero=True),
        Kind(WeightFormat.MXFP4, group=32),
    )
}
