"""`moehive bench`: what this machine does with the experts of published models."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from moehive.protocol.errors import ConfigError
from moehive.protocol.units import format_size

from .arguments import Flag, Positive, Threads
from .output import note, say, table

if TYPE_CHECKING:
    import torch

    from moehive.kernels.benchmark.machine import Ceilings
    from moehive.kernels.benchmark.measure import Measurement
    from moehive.kernels.benchmark.shapes import LayerShape

_BATCHES, _LENGTHS = (1, 8, 32, 128), (512, 2048, 8192)
_QUICK_BATCHES, _QUICK_LENGTHS = (1, 8), (512,)
_ON_CPU = ("qwen3-30b-a3b",)
_SECONDS, _QUICK_SECONDS = 2.0, 0.3  # for one line
_HEADER = ("layer", "weights", "tokens", "ms", "tokens/s", "GB/s", "TFLOP/s", "of roofline", "experts used", "Gini",
           "peak memory", "of dense")  # fmt: skip

Format = Literal["model", "fp32", "bf16", "fp8", "int8", "int4", "mxfp4"]
_Numbers = Annotated[tuple[Positive, ...], Parameter(consume_multiple=True, negative="", show_default=False)]
_Names = Annotated[
    tuple[str, ...], Parameter(consume_multiple=True, negative="", metavar="MODEL", show_default=False)
]  # fmt: skip


def kernels(
    *,
    shape: _Names = (),
    batch: _Numbers = (),
    tokens: _Numbers = (),
    format: Format = "model",  # noqa: A002  the option's name
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: Threads | None = None,
    quick: Flag = False,
    json: Path | None = None,
) -> None:
    """Measure the expert kernels on layers of published models, against what this machine can do.

    The machine's memory bandwidth and rate of products are measured first; the roofline is the least time that a layer
    can take with both. Routing is random. Peak memory is compared with that of a dense layer with as many parameters,
    all of which every token uses, in bf16.

    Parameters
    ----------
    shape:
        Models whose layers are measured; "all" for all that are known. Default: all on a GPU, Qwen3-30B-A3B else.
    batch:
        Sequences that decode at the same time, one token each. Default: 1 8 32 128.
    tokens:
        Lengths of a sequence that is read at once. Default: 512 2048 8192.
    format:
        How weights are kept. Default: as the model's publisher does.
    device:
        Where to compute. Default: on a CUDA GPU if there is one.
    threads:
        Of the processor. Default: as many as torch takes.
    quick:
        Fewer sizes and less time for each.
    json:
        Also write the results here.
    """
    import torch

    from moehive.swarm.trace.files import check_replaceable, replace_file

    if json is not None:
        check_replaceable(json)
    where = _device(device)
    shapes = _shapes(shape, format, where)
    sizes = _sizes(batch, tokens, quick=quick)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        found, facts = _measure(shapes, sizes, where, quick=quick)
    finally:
        torch.set_num_threads(before)
    say(table(_HEADER, [_row(one) for one in found]))
    if json is not None:
        results = [asdict(one) | {"tokens_per_second": one.tokens_per_second} for one in found]
        document = json_module.dumps({"machine": facts, "results": results}, indent=2)
        replace_file(json, f"{document}\n".encode())


def bench_app(sort_key: int) -> App:
    """The command group."""
    app = App(name="bench", help="Measure what this machine does.", sort_key=sort_key)
    app.command(kernels)
    return app


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA GPU here; --device cpu measures the processor")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _shapes(names: Sequence[str], format_name: str, device: torch.device) -> list[tuple[LayerShape, str]]:
    """The layers with the names of their formats. Raises ConfigError for a model that is not known."""
    from moehive.kernels.benchmark.shapes import FORMATS, SHAPES

    wanted = [name.lower() for name in names] or ([*_ON_CPU] if device.type == "cpu" else [*SHAPES])
    if wanted == ["all"]:
        wanted = [*SHAPES]
    unknown = [name for name in wanted if name not in SHAPES]
    if unknown:
        raise ConfigError(f"--shape: {unknown[0]!r} is not known; there are all, {', '.join(SHAPES)}")
    own = {stored: name for name, stored in FORMATS.items()}
    chosen = [SHAPES[name] for name in wanted]
    if format_name == "model":
        return [(layer, own[layer.stored]) for layer in chosen]
    return [(layer.kept_as(FORMATS[format_name]), format_name) for layer in chosen]


def _sizes(batch: Sequence[int], tokens: Sequence[int], *, quick: bool) -> list[int]:
    """Numbers of tokens in a call, ascending: of decoding and of reading. What is given replaces all defaults."""
    if not batch and not tokens:
        batch, tokens = (_QUICK_BATCHES, _QUICK_LENGTHS) if quick else (_BATCHES, _LENGTHS)
    return sorted({*batch, *tokens})


def _measure(
    shapes: Sequence[tuple[LayerShape, str]], sizes: Sequence[int], device: torch.device, *, quick: bool
) -> tuple[list[Measurement], dict[str, Any]]:
    import torch

    from moehive.kernels.benchmark.layers import make_experts
    from moehive.kernels.benchmark.machine import measure_ceilings
    from moehive.kernels.benchmark.measure import measure_layer

    ceilings = measure_ceilings(device, quick=quick)
    facts = _facts(device, ceilings)
    say(f"{facts['device']}: {ceilings.bandwidth / 1e9:.1f} GB/s, {ceilings.rate / 1e12:.3g} TFLOP/s")
    found = []
    with torch.no_grad():
        for layer, format_name in shapes:
            experts = make_experts(layer, device, _budget(device))
            if experts.held < layer.experts:
                note(f"{layer.name}: memory for {experts.held} of {layer.experts} experts; the others share theirs")
            for size in sizes:
                note(f"{layer.name}, {size} tokens")
                seconds = _QUICK_SECONDS if quick else _SECONDS
                found.append(measure_layer(layer, format_name, experts, size, ceilings, device, budget=seconds))
            del experts  # before the next are made
    return found, facts


def _facts(device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    import torch

    gpu = device.type == "cuda"
    capability = torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} threads, {capability}"
    return {"device": name, "torch": torch.__version__, **asdict(ceilings)}


def _budget(device: torch.device) -> float:
    """Bytes that a layer's weights may take: half of what is free."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / 2
    from moehive.swarm.memory import default_ram_budget

    return default_ram_budget()


def _row(one: Measurement) -> tuple[object, ...]:
    return (
        one.shape, one.format, one.tokens, f"{one.seconds * 1e3:.3g}", f"{one.tokens_per_second:.0f}",
        f"{one.bandwidth / 1e9:.1f}", f"{one.rate / 1e12:.3g}", f"{one.of_roofline:.0%}", f"{one.utilisation:.0%}",
        f"{one.gini:.2f}", format_size(round(one.peak_bytes)), f"{one.peak_bytes / one.dense_bytes:.0%}",
    )  # fmt: skip
