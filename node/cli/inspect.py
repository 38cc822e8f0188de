"""`moehive inspect`: what a converted directory holds, and whether it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moehive.protocol.units import format_size

from .arguments import Flag
from .errors import FAILED
from .output import facts, progress_bar, say, say_json, table

if TYPE_CHECKING:
    from moehive.swarm.convert import InspectionReport
    from moehive.swarm.convert.report import Spread


def inspect(directory: Path, /, *, json: Flag = False, verify: bool = True) -> int | None:
    """Show what a converted directory holds and verify every byte. Exit code 1 if something is wrong with it.

    Parameters
    ----------
    directory:
        What `moehive convert` wrote.
    json:
        Print one JSON object instead.
    verify:
        Hash every file; without it only names, sizes and headers are compared.
    """
    from moehive.swarm.convert import inspect as inspect_directory

    with progress_bar("verifying" if verify else "reading") as move:
        report = inspect_directory(directory, verify=verify, progress=lambda done, total, _: move(done, total))
    if json:
        say_json(report.to_json(), indent=2)
    else:
        say(describe(report))
    return None if report.ok else FAILED


def describe(report: InspectionReport) -> str:
    """The report for people."""
    shards = [(kind.value, f"{tally.count:,}", format_size(tally.bytes)) for kind, tally in report.shards.items()]
    parts = [
        facts(_model_facts(report)),
        table(("shards", "files", "size"), shards),
        table(("to load one expert", "reads", "files", "size"), _costs(report)),
        *(f"  note: {remark}" for remark in report.notes),
        _verdict(report),
    ]
    return "\n\n".join(parts)


def _model_facts(report: InspectionReport) -> list[tuple[str, object]]:
    model = report.manifest.model
    stored = f"{model.dtype}, experts as {model.quantization.method}" if model.quantization else model.dtype
    layers = model.moe_layers
    return [
        ("model id", report.model_id),
        ("name", model.name),
        ("architecture", model.architecture),
        ("stored as", stored),
        (
            "experts",
            f"{model.num_experts} in each of {len(layers)} layers ({layers[0]} to {layers[-1]}), "
            f"{model.top_k} of them for every token",
        ),
    ]


def _costs(report: InspectionReport) -> list[tuple[object, ...]]:
    here = ("here", 1, 1, format_size(round(report.expert_bytes.mean)))
    if report.source is None:
        return [here]
    source = report.source
    before = ("in the source", _mean(source.reads), _mean(source.files), format_size(round(source.bytes.mean)))
    return [before, here]


def _mean(spread: Spread) -> str:
    """The mean, and the range where there is one."""
    if spread.min == spread.max:
        return str(spread.min)
    return f"{spread.mean:.1f} ({spread.min} to {spread.max})"


def _verdict(report: InspectionReport) -> str:
    if report.ok:
        return "  every byte is as converted" if report.verified else "  sizes and headers fit; bytes were not verified"
    faults = [f"  {fault.file}: {fault.reason}" for fault in report.faults]
    return "\n".join((f"  WRONG, in {len(faults)} place(s):", *faults, "  convert it again to repair it"))
