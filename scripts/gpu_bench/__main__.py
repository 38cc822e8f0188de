"""Correctness, then speed: see scripts/bench/gpu.sh, which sets up the import path."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from moehive.kernels.gpu.experts import choose_for, device_facts, matrices_of, run_experts
from moehive.kernels.gpu.overrides import Override, load_overrides
from moehive.kernels.gpu.table import ExpertTable

from . import baselines, correctness, roofline, shapes, timing, tuning
from .data import Call, fill_table, make_calls
from .shapes import Layer

DRY_CEILINGS = roofline.H200
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Result:
    """One layer on so many tokens; times in microseconds, None where something was not measured."""

    layer: str
    tokens: int
    active: int
    moehive: float
    must: float
    ideal: float
    terabytes: float  # per second
    teraflops: float  # per second, of rows as they are
    of_ideal: float
    grouped_mm: float | None
    loop: float | None

    @property
    def holds(self) -> bool:
        """Whether the demand is met."""
        return self.moehive <= self.must


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where gpu.json goes")
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS", help="start nothing new after that")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="only those whose name begins so")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(shapes.TOKENS))
    parser.add_argument("--overrides", type=Path, metavar="FILE", help="configurations from a file")
    parser.add_argument("--tune", action="store_true", help="also try neighbours; the better go to overrides.json")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes under Triton's interpreter, without a GPU")
    options = parser.parse_args(arguments)
    if options.layers and not selected(options.layers):
        parser.error(f"no layer begins with one of {options.layers}; there are {[x.name for x in shapes.LAYERS]}")
    return options


def selected(names: list[str] | None) -> list[Layer]:
    """The layers whose names begin with one of these; all without."""
    return [layer for layer in shapes.LAYERS if not names or layer.name.startswith(tuple(names))]


class Bench:
    """One run: knows when to stop, and collects."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.started = time.monotonic()
        self.overrides: tuple[Override, ...] = load_overrides(options.overrides) if options.overrides else ()
        self.results: list[Result] = []
        self.tuned: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.broken: list[str] = []
        self.failed: list[correctness.Check] = []
        self.ceilings = DRY_CEILINGS if options.dry_run else timing.measure_ceilings()

    def run(self) -> int:
        """All of it; the exit code: 1 for wrong results, 2 where something was left out, else 0."""
        self.check()
        say(HEAD)
        for layer in shapes.TINY if self.options.dry_run else selected(self.options.layers):
            self.layer(layer)
        self.report()
        return 1 if self.failed or self.broken else 2 if self.left_out else 0

    def late(self) -> bool:
        return time.monotonic() - self.started > self.options.budget

    def check(self) -> None:
        """Print what is wrong, and how much was right."""
        dry = self.options.dry_run
        kinds = {name: correctness.KINDS[name] for name in ("fp8-block", "int4-group-g32-zero")}
        found = correctness.checks(self.device, kinds, ["chosen"], [3]) if dry else correctness.all_checks(self.device)
        every = list(found)
        self.failed = [check for check in every if not check.passed]
        worst = max(every, key=lambda check: check.error)
        say(f"correctness: {len(every) - len(self.failed)} of {len(every)} within {correctness.TOLERANCE:g} of float64")
        say(f"  worst: {worst.kind}, {worst.cut}, {worst.tokens} tokens: {worst.error:.1e}; {self.seconds():.0f} s")
        for check in self.failed:
            say(f"  WRONG: {check.kind}, {check.cut}, {check.tokens} tokens: {check.error:.1e}")

    def layer(self, layer: Layer) -> None:
        """Every number of tokens, as long as there is time."""
        tokens = [2] if self.options.dry_run else self.options.tokens
        if self.late():
            self.left_out += [f"{layer.name}, {count} tokens" for count in tokens]
            return
        generator = torch.Generator(self.device).manual_seed(1)
        table = fill_table(layer, self.device, generator)
        dense = None if self.options.no_baselines else baselines.DenseWeights(layer, self.device)
        for count in tokens:
            if self.late():
                self.left_out.append(f"{layer.name}, {count} tokens")
                continue
            result = self.attempt(
                f"{layer.name}, {count} tokens", partial(self.measure, layer, count, table, dense, generator)
            )
            if result is not None:
                self.results.append(result)
                say(line(result))

    def attempt(self, what: str, run: Callable[[], R]) -> R | None:
        """The supervision point: one thing that breaks on an unknown GPU must not cost the results of the others."""
        try:
            return run()
        except Exception as error:  # noqa: BLE001  kept, reported, and the exit code
            self.broken.append(f"{what}: {type(error).__name__}: {str(error).strip()[:500]}")
            say(f"  BROKEN {self.broken[-1]}")
            return None

    def measure(
        self, layer: Layer, tokens: int, table: ExpertTable, dense: baselines.DenseWeights | None,
        generator: torch.Generator,
    ) -> Result:  # fmt: skip
        """One line of the table."""
        calls = make_calls(layer, tokens, 1 if self.options.dry_run else timing.calls_in_graph(tokens), generator)
        chosen = choose_for(tokens * layer.top_k, calls[0].hidden, table, self.overrides)
        own = self.seconds_of(layer, table, calls, chosen)
        if self.options.tune:
            own = self.tune(layer, table, calls, own)
        active = sum(call.active() for call in calls) / len(calls)
        padded = sum(call.padded_rows(chosen.block) for call in calls) / len(calls)
        limits = roofline.bound(layer, tokens, active, padded, self.ceilings)
        must = roofline.demanded(layer, tokens, active, limits, self.ceilings)
        others: list[float | None] = [None, None]
        if dense is not None:
            runs = (baselines.grouped_product(layer, dense), baselines.loop_of_products(layer, dense, calls))
            others = [
                self.attempt("baseline", partial(timing.microseconds_per_call, run, calls, self.device)) for run in runs
            ]
        return Result(
            layer.name, tokens, round(active), own * 1e6, must * 1e6, limits.ideal * 1e6, limits.bytes / own / 1e12,
            limits.flops / own / 1e12, limits.ideal / own, *others,
        )  # fmt: skip

    def seconds_of(self, layer: Layer, table: ExpertTable, calls: list[Call], configuration: Any) -> float:
        run = partial(_layer, table=table, layer=layer, configuration=configuration)
        return timing.seconds_per_call(run, calls, self.device)

    def tune(self, layer: Layer, table: ExpertTable, calls: list[Call], own: float) -> float:
        """Climb to faster neighbours as long as there are any; the end is written down where it is 3 % faster."""
        hidden, rows = calls[0].hidden, calls[0].index.numel()
        problem = (*matrices_of(table, hidden), device_facts(hidden.device))
        best, fastest = choose_for(rows, hidden, table, self.overrides), own
        climbing = True
        while climbing and not self.late():
            times = {}
            for neighbour in tuning.neighbours(best, *problem):
                taken = self.attempt(str(neighbour), partial(self.seconds_of, layer, table, calls, neighbour))
                times[neighbour] = taken or float("inf")
            candidate = min(times, key=lambda c: times[c])
            climbing = times[candidate] < 0.99 * fastest
            best, fastest = (candidate, times[candidate]) if climbing else (best, fastest)
        if fastest < 0.97 * own:
            active = sum(call.active() for call in calls) / len(calls)
            self.tuned.append(tuning.as_override(best, rows / active, problem[0], problem[2]))
        return fastest

    def report(self) -> None:
        """The facts, the verdict, and gpu.json."""
        name = "the interpreter" if self.device.type == "cpu" else torch.cuda.get_device_name()
        facts = {"device": name, "torch": torch.__version__, "triton": triton.__version__, **asdict(self.ceilings)}
        say(f"\n{name}, torch {torch.__version__}, triton {triton.__version__}; copy "
            f"{self.ceilings.bandwidth / 1e12:.2f} TB/s, product {self.ceilings.rate / 1e12:.0f} TFLOP/s")  # fmt: skip
        say(f"{sum(r.holds for r in self.results)} of {len(self.results)} hold the demand; {self.seconds():.0f} s")
        for what in self.broken:
            say(f"  broken: {what}")
        for what in self.left_out:
            say(f"  left out for lack of time: {what}")
        self.options.out.mkdir(parents=True, exist_ok=True)
        data = {
            "facts": facts,
            "results": [asdict(result) for result in self.results],
            "wrong": [asdict(check) for check in self.failed],
            "broken": self.broken,
            "left_out": self.left_out,
        }
        (self.options.out / "gpu.json").write_text(json.dumps(data, indent=2) + "\n")
        if self.tuned:
            (self.options.out / "overrides.json").write_text(json.dumps(self.tuned, indent=2) + "\n")

    def seconds(self) -> float:
        return time.monotonic() - self.started


def _layer(call: Call, *, table: ExpertTable, layer: Layer, configuration: Any) -> torch.Tensor:
    return run_experts(call.hidden, call.index, call.weights, table, layer.spec, configuration=configuration)


def line(r: Result) -> str:
    """A line of the table."""
    others = "".join("        -" if other is None else f" {other:8.0f}" for other in (r.grouped_mm, r.loop))
    verdict = "ok" if r.holds else "BELOW"
    return (
        f"{r.layer:20} {r.tokens:6} {r.active:5} {r.moehive:9.1f} {r.must:9.1f} {r.ideal:9.1f} {r.of_ideal:6.0%} "
        f"{r.terabytes:6.2f} {r.teraflops:6.0f}{others}  {verdict}"
    )


HEAD = (
    f"{'layer':20} {'tokens':>6} {'hit':>5} {'us':>9} {'must':>9} {'ideal':>9} {'of it':>6} {'TB/s':>6} {'TF/s':>6} "
    f"{'grouped':>8} {'loop':>8}"
)


def say(text: str) -> None:
    """At once, so that a killed run leaves what it had."""
    print(text, flush=True)


def main() -> None:
    """Run, and say how it went by the exit code."""
    options = parse()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device; --dry-run shows on the CPU that everything runs")
    torch.manual_seed(0)
    bench = Bench(options)
    sys.exit(bench.run())


if __name__ == "__main__":
    main()
