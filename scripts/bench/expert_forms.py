"""What quantised experts cost in each form that memory can hold them in: bytes, widening, and products of few rows.

    python scripts/bench/expert_forms.py [--rounds 9] [--threads 2] [--json FILE]

widen: from the stored format to bf16, in memory that was used before. stored: a product straight from the stored
format. widened: one with what was widened. What follows from it is swarm/policy/budgets.py, `bytes_as_stored`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from _common import arguments, conditions, listen_for_noise, p50, print_head, print_table, write_json

from moehive.kernels.cpu.experts import expert_rows
from moehive.kernels.dequantize import dequantize
from moehive.kernels.expert_ffn import CLAMPED_INTERLEAVED, ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.formats import ExpertMatrices, WeightFormat, WeightMatrix, pack_nibbles

CLAMPED = FfnSpec(CLAMPED_INTERLEAVED, transposed=True, alpha=1.702, limit=7.0)
SHAPES = (
    ("GPT-OSS, MXFP4", WeightFormat.MXFP4, 2880, 2880, CLAMPED),
    ("DeepSeek-V3, FP8", WeightFormat.FP8_BLOCK, 7168, 2048, FfnSpec()),
    ("Kimi-K2, INT4 in groups of 32", WeightFormat.INT4_GROUP, 7168, 2048, FfnSpec()),
)
ROWS = (1, 8, 32)


@dataclass(slots=True)
class Forms:
    """One shape with one number of rows. Seconds, each the median of the rounds."""

    expert: str
    rows: int
    stored_bytes: int
    widened_bytes: int
    widen: float
    stored: float
    widened: float
    foreign: float


def random_matrix(form: WeightFormat, rows: int, columns: int) -> WeightMatrix:
    """Random codes with scales that keep outputs small."""
    if form is WeightFormat.FP8_BLOCK:
        data = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        scale = torch.full((-(-rows // 128), -(-columns // 128)), columns**-0.5)
        return WeightMatrix(form, data, scale, block=(128, 128))
    data, groups = pack_nibbles(torch.randint(0, 16, (rows, columns))), (rows, columns // 32)
    if form is WeightFormat.MXFP4:
        return WeightMatrix(form, data, torch.randint(118, 122, groups).to(torch.uint8), block=(1, 32))
    return WeightMatrix(form, data, torch.full(groups, columns**-0.5 / 5).bfloat16(), block=(1, 32))


def measure(name: str, form: WeightFormat, hidden: int, inner: int, spec: FfnSpec, rounds: int) -> list[Forms]:
    """One expert, with every number of rows."""
    expert = ExpertMatrices(random_matrix(form, 2 * inner, hidden), random_matrix(form, hidden, inner))
    matrices = (expert.gate_up, expert.down)
    memory = [torch.empty(matrix.shape[::-1] if spec.transposed else matrix.shape).bfloat16() for matrix in matrices]

    def widen() -> None:
        for matrix, out in zip(matrices, memory, strict=True):
            dequantize(matrix, torch.bfloat16, out=out.t() if spec.transposed else out)

    weights, found = ExpertWeights(*memory), []
    for count in ROWS:
        rows = torch.randn(count, hidden).bfloat16()
        with listen_for_noise() as noise:
            seconds = (
                median(widen, rounds),
                median(lambda rows=rows, count=count: expert_rows(rows, [count], [expert], spec), rounds),  # type: ignore[misc]
                median(lambda rows=rows: expert_ffn(rows, weights, spec), rounds),  # type: ignore[misc]
            )
        found.append(Forms(name, count, expert.nbytes, weights.nbytes, *seconds, noise.foreign))
    return found


def median(work: Callable[[], object], rounds: int) -> float:
    """Seconds."""
    taken = []
    for turn in range(rounds + 1):
        started = time.perf_counter()
        work()
        if turn:
            taken.append(time.perf_counter() - started)
    return p50(taken)


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = conditions(threads=options.threads, dtype="bfloat16")
    print_head("forms of quantised experts", facts)
    found = [one for shape in SHAPES for one in measure(*shape, options.rounds)]
    columns = (
        "expert", "rows", "stored MB", "widened MB", "widen ms", "product from stored ms", "from widened ms",
        "others' CPU",
    )  # fmt: skip
    rows = [
        [
            one.expert, one.rows, one.stored_bytes / 1e6, one.widened_bytes / 1e6, 1e3 * one.widen, 1e3 * one.stored,
            1e3 * one.widened, f"{one.foreign:.0%}",
        ]
        for one in found
    ]  # fmt: skip
    print_table(columns, rows)
    write_json(options.json, facts, [asdict(one) for one in found])


if __name__ == "__main__":
    main()
