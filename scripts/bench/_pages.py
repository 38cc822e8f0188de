"""Page latency: one expert from its file to weights that can be computed with, verified."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import drop_from_page_cache, listen_for_noise, p50, p99, print_table
from _moe import mixtral_shaped

from moehive.swarm.convert import convert
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.directory import ConvertedDirectory

PAGE_SHAPES = (("80 MB", 3264, 6), ("352 MB", 14336, 3))  # name, inner size, experts


@dataclass(frozen=True, slots=True)
class Page:
    """Page latency of one shape, in one state of the page cache."""

    shape: str
    state: str
    nbytes: int
    seconds: list[float]
    foreign: float


def pages(rounds: int) -> list[Page]:
    """Every shape, warm and cold."""
    found = []
    for name, inner, experts in PAGE_SHAPES:
        with tempfile.TemporaryDirectory() as temporary:
            source = mixtral_shaped(Path(temporary) / "source", inner=inner, experts=experts)
            convert(source, Path(temporary) / "converted")
            for file in source.iterdir():
                file.unlink()
            found += [page(name, Path(temporary) / "converted", state, rounds) for state in ("warm", "cold")]
    return found


def page(shape: str, directory: Path, state: str, rounds: int) -> Page:
    """Through a RAM tier for two experts, so that each use of another one is a miss that evicts."""
    source = ConvertedDirectory(directory)
    loader = ExpertLoader(source.manifest, source)
    nbytes = loader.nbytes(torch.bfloat16)
    budget = 2 * loader.largest_room(torch.bfloat16)
    tier, keys, seconds = WeightsTier(loader, budget), list(source.manifest.experts), []
    with listen_for_noise() as noise:
        for turn in range(rounds + 1):
            for key in keys:
                path = source.path(source.manifest.experts[key].hash)
                assert path is not None
                if state == "cold":
                    drop_from_page_cache(path)
                lease = tier.lease((key, torch.bfloat16))
                started = time.perf_counter()
                with lease:
                    pass
                if turn:  # the first turn fills the page cache, and starts what is started once
                    seconds.append(time.perf_counter() - started)
    return Page(shape, state, nbytes, seconds, noise.foreign)


def print_pages(found: Sequence[Page]) -> None:
    """Milliseconds."""
    columns = ("expert", "files", "p50 ms", "p99 ms", "slowest ms", "GB/s", "loads", "others' CPU")
    rows = [
        [
            one.shape, one.state, 1e3 * p50(one.seconds), 1e3 * p99(one.seconds), 1e3 * max(one.seconds),
            one.nbytes / p50(one.seconds) / 1e9, len(one.seconds), f"{one.foreign:.0%}",
        ]
        for one in found
    ]  # fmt: skip
    print_table(columns, rows)
