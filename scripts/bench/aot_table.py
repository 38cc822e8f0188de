"""What the machine code of the GPU kernels needs, for every configuration chosen for the target models. No GPU.

    python scripts/bench/aot_table.py [--sm 90 80] [--tokens 1 4 16 64 512 8192] [--json FILE]

Compiles ahead of time (support/aot.py of the tests) and prints a Markdown table: registers and bytes of spilled
registers per thread, shared memory and blocks per multiprocessor, matrix and copy instructions. The last column is a
bound, not a measurement: bytes of weights that the instructions of the main loop can decode if every scheduler of an
H100 (132 multiprocessors at 1.755 GHz) issues one in every cycle; above the memory's 3.35 to 4.8 TB/s it does not bind.
Exits with 1 where a kernel for sm_90 spills. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from _common import print_table, write_json
from support.aot import Build, Report, compile_all
from support.aot_experts import MODELS, builds
from support.aot_route import BUILDS

_COLUMNS = ("kernel", "regs", "spill", "smem KiB", "blocks", "wgmma", "mma", "16 B async", "other async", "TB/s bound")
_SHARED_OF_SM = {80: 164, 90: 228}  # KiB of one multiprocessor; every block takes 1 KiB more than it asks for


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[90, 80], choices=(80, 90))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512, 8192])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    options = parser.parse_args()
    wanted = builds(MODELS, options.tokens, options.sm) + [build for build in BUILDS if build.sm in options.sm]
    reports = compile_all(wanted)
    print_table(_COLUMNS, [row(build, reports[build.name]) for build in wanted])
    write_json(options.json, {"models": [model.name for model in MODELS]}, [asdict(r) for r in reports.values()])
    spilled = [name for name, report in reports.items() if report.stack and "sm_90" in name]
    sys.exit(f"registers are spilled: {spilled}" if spilled else 0)


def row(build: Build, report: Report) -> tuple[Any, ...]:
    """One line of the table."""
    by_shared = _SHARED_OF_SM[build.sm] * 1024 // (report.shared + 1024)
    return (
        build.name, report.registers, report.stack, f"{report.shared / 1024:.0f}",
        min(report.blocks_per_sm, by_shared), report.wgmma, report.mma, report.wide_async, report.narrow_async,
        decode_bound(build, report) / 1e12 if "GATED" in build.arguments else None,
    )  # fmt: skip


def decode_bound(build: Build, report: Report) -> float:
    """Bytes of weights per second that the main loop can take in if nothing but issuing instructions takes time."""
    arguments = build.arguments
    bits = {"bf16": 16, "int8": 8}.get(arguments["WT"].name) or (8 if arguments["FORMAT"] == 1 else 4)
    width = arguments["BN"] * (2 if arguments["GATED"] else 1)
    cycles = report.warps * report.loop / 4
    return width * arguments["BK"] * bits / 8 / cycles * 132 * 1.755e9


if __name__ == "__main__":
    main()
