"""Compiles Triton kernels ahead of time for a named GPU, and says what the machine code needs. No GPU is involved.

    builds = [Build("route", "moehive.kernels.gpu.route:route_kernel", sm=90, num_warps=4, num_stages=3,
                    arguments={"logits": "*bf16:16", "out": "*fp32:16", "rows": "i32", "E": 128, "CT": Dtype("bf16")})]
    reports = compile_all(builds)              # {"route": Report(...)}; keys are the builds' names

An argument that is a string is a Triton type: `*bf16` a pointer, `i32` an integer, `:16` at its end says that the
address or the number is a multiple of 16 (what the JIT compiler finds out by itself at a launch). Anything else is the
value of a constexpr; `Dtype` stands for a Triton dtype, so that this module need not import triton.

The work is done in child processes without TRITON_INTERPRET, because a process in which kernels are interpreted cannot
compile them. Registers, stack and machine instructions are read from the cubin with the tools that come with triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT = 60.0  # seconds for each build of a child: 0.3 to 2 alone, and a machine may be busy

# What a thread block may have at most: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes
REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor, on both


@dataclass(frozen=True, slots=True)
class Dtype:
    """A Triton dtype by its short name: bf16, fp16, fp32, u8, ..."""

    name: str


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel with one set of arguments for one architecture; `kernel` is "module:name"."""

    name: str
    kernel: str
    sm: int
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What the machine code of a build needs and contains. Counts are of instructions in the code, not of runs."""

    name: str
    registers: int  # per thread
    stack: int  # bytes per thread; more than 0 means that registers are spilled
    spills: int  # instructions that store to or load from the stack
    shared: int  # bytes per block
    warps: int
    wgmma: int  # warpgroup matrix instructions (sm_90)
    mma: int  # warp matrix instructions
    wide_async: int  # asynchronous copies of 16 bytes per thread to shared memory
    narrow_async: int  # those of 4 and 8 bytes
    wide_loads: int  # loads of 16 bytes to registers
    narrow_loads: int  # loads of at most 8 bytes
    bulk: int  # copies by the tensor memory accelerator
    instructions: int
    loop: int  # instructions of the innermost loop with most matrix instructions, or of the longest one
    loop_mma: int  # matrix instructions in it
    histogram: Mapping[str, int] = field(default_factory=dict)  # of the loop, by operation

    @property
    def blocks_per_sm(self) -> int:
        """Thread blocks that fit on one multiprocessor by registers (allocated by 8 per thread)."""
        return REGISTER_FILE // (-(-self.registers // 8) * 8 * 32 * self.warps)


def compile_all(builds: Sequence[Build], *, workers: int = 2) -> dict[str, Report]:
    """Compile in `workers` child processes. Raises RuntimeError with the children's words when a build fails."""
    assert len({build.name for build in builds}) == len(builds), "builds need distinct names"
    with tempfile.TemporaryDirectory(prefix="aot-") as directory:
        children = [_start(builds[index::workers], Path(directory) / str(index)) for index in range(workers)]
        answers = [_finish(child, TIMEOUT * (1 + len(builds))) for child in children]
    reports = [Report(**entry) for answer in answers for entry in answer]
    return {report.name: report for report in sorted(reports, key=lambda report: _index(builds, report.name))}


def _index(builds: Sequence[Build], name: str) -> int:
    return next(index for index, build in enumerate(builds) if build.name == name)


def _start(builds: Sequence[Build], directory: Path) -> subprocess.Popen[bytes]:
    directory.mkdir()
    (directory / "builds").write_text(json.dumps([asdict(build) for build in builds]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # the default of fp fusion is about to change in Triton and unset is a warning; our launches name it too
    environment |= {"TRITON_CACHE_DIR": str(directory / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), *sys.path)))
    command = [sys.executable, "-m", "support.aot", str(directory / "builds")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _finish(child: subprocess.Popen[bytes], timeout: float) -> list[dict[str, Any]]:
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise
    if child.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{err.decode()[-4000:]}")
    return json.loads(out.splitlines()[-1]) if out.strip() else []


# --- in the child -----------------------------------------------------------------------------------------------------


def _compile(build: Build) -> Report:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    missing = set(kernel.arg_names) ^ set(build.arguments)
    assert not missing, f"{build.name}: arguments missing or unknown: {sorted(missing)}"
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        value = build.arguments[argument]
        if isinstance(value, str):
            signature[argument], _, aligned = value.partition(":")
            if aligned:
                attributes[(index,)] = [["tt.divisibility", int(aligned)]]
        else:
            signature[argument] = "constexpr"
            constants[argument] = triton.language.dtype(value.name) if isinstance(value, Dtype) else value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    if build.maxnreg is not None:
        options["maxnreg"] = build.maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", build.sm, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return inspect(build, compiled.asm["cubin"], compiled.metadata.shared, tools)


def inspect(build: Build, cubin: bytes, shared: int, tools: Path) -> Report:
    """Read a cubin with cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:500]
    code = [(int(at, 16), words) for at, words in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@\S+\s+)?([^;]+);", text)]
    words = [line for _, line in code]

    def count(pattern: str) -> int:
        return sum(re.match(pattern, line) is not None for line in words)

    loop = _main_loop(code)
    return Report(
        name=build.name,
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=count(r"(LDL|STL)\b"),
        shared=shared,
        warps=build.num_warps,
        wgmma=count(r"[HIQ]GMMA\b"),
        mma=count(_MMA) - count(r"[HIQ]GMMA\b"),
        wide_async=count(r"LDGSTS\S*\.128\b"),
        narrow_async=count(r"LDGSTS\b") - count(r"LDGSTS\S*\.128\b"),
        wide_loads=count(r"LDG\.\S*128\b"),
        narrow_loads=count(r"LDG\.") - count(r"LDG\.\S*128\b"),
        bulk=count(r"UTMALDG\b"),
        instructions=len(words),
        loop=len(loop),
        loop_mma=sum(re.match(_MMA, line) is not None for line in loop),
        histogram=_histogram(loop),
    )


_MMA = r"[HIQ]G?MMA\b"


def _main_loop(code: Sequence[tuple[int, str]]) -> list[str]:
    """Instructions between the target of a backward branch and the branch, where no other such loop lies inside."""
    loops = []
    for at, line in code:
        target = re.match(r"BRA\S*\s+(?:\S+,\s*)*`?\(?0x([0-9a-f]+)", line)
        if target is not None and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inner = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    bodies = [[line for at, line in code if start <= at <= end] for start, end in inner]
    return max(bodies, key=lambda body: (sum(re.match(_MMA, line) is not None for line in body), len(body)), default=[])


def _histogram(lines: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in lines:
        opcode = re.split(r"[.\s]", line, maxsplit=1)[0]
        counts[opcode] = counts.get(opcode, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def main() -> None:
    """Compile what the file names; reports go to standard output as JSON."""
    builds = [_build(entry) for entry in json.loads(Path(sys.argv[1]).read_text())]
    sys.stdout.write(json.dumps([asdict(_compile(build)) for build in builds]) + "\n")


def _build(entry: Mapping[str, Any]) -> Build:
    """What `asdict` made of a build: a Dtype became an object."""
    arguments = {
        name: Dtype(**value) if isinstance(value, dict) else value for name, value in entry["arguments"].items()
    }
    return Build(**{**entry, "arguments": arguments})


if __name__ == "__main__":
    main()
