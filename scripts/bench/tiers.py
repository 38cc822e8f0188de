"""What the tiers of one machine cost and give: page latency, decode speed by what is resident, and their own price.

    python scripts/bench/tiers.py [--part pages|resident|price ...] [--rounds 5] [--plot FILE.svg] [--json FILE]

pages: experts of 80 MB and of 352 MB (Mixtral-8x7B's) from their files to weights that can be computed with, verified;
    warm (in the page cache) and cold (dropped from it before each, by posix_fadvise). Asked: 80 MB warm under 100 ms.
resident: decoding with budgets for 100, 75, 50 and 25 % of the experts, in turns; the files in the page cache, and
    dropped from it after each load. The bound is what perfect prefetch could reach: the time of a token with all
    experts resident, or that of moving its bytes at the rate of the same run's loads, whichever is longer.
price: decoding with every expert resident, against the same computation over a dictionary. Asked: at least 0.97.

Random weights route evenly and remember nothing, which is the worst case for any cache; the demo model is trained.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _common import (
    MAX_FOREIGN,
    arguments,
    conditions,
    drop_from_page_cache,
    leave_cleanly,
    listen_for_noise,
    p50,
    print_head,
    print_table,
    write_json,
)
from _moe import prompt, qwen3_shaped
from _pages import pages, print_pages
from _plot import Line, line_plot
from torch import Tensor
from transformers.utils import logging

from moehive.kernels.combine import add_token_row, combine_rows
from moehive.kernels.expert_ffn import expert_ffn
from moehive.kernels.routing import group_by_expert, order_of_token
from moehive.protocol.ids import ExpertKey
from moehive.swarm import open_local
from moehive.swarm.convert import convert
from moehive.swarm.model.backend import LocalExperts
from moehive.swarm.model.loader import ExpertLoader, StoredExpert
from moehive.swarm.model.seats import attach_backend
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.directory import ConvertedDirectory

DEMO = Path(__file__).parents[2] / "node" / "demo" / "model"
PARTS = ("pages", "resident", "price")
STATES = ("warm", "cold")
SHARES = (1.0, 0.75, 0.5, 0.25)
PROMPT = 8  # tokens


# --- decoding ---------------------------------------------------------------------------------------------------------


class Reader:
    """Experts from a directory; `cold`: each file is dropped from the page cache once it was read."""

    def __init__(self, source: ConvertedDirectory, *, cold: bool) -> None:
        self._source = source
        self._loader = ExpertLoader(source.manifest, source)
        self._cold = cold
        self.spec = self._loader.spec
        self.nbytes = self._loader.nbytes

    def read(self, key: ExpertKey) -> StoredExpert:
        """See ExpertLoader."""
        tensors = self._loader.read(key)
        if self._cold:
            path = self._source.path(self._source.manifest.experts[key].hash)
            assert path is not None
            drop_from_page_cache(path)
        return tensors


@torch.inference_mode()
def decode(model: Any, tokens: int) -> float:
    """Seconds of greedy steps after a fixed prompt."""
    answer = model(input_ids=prompt(model.config.vocab_size, PROMPT), use_cache=True)
    started = time.perf_counter()
    for _ in range(tokens):
        token = answer.logits[:, -1:].argmax(-1)
        answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
    return time.perf_counter() - started


@dataclass(slots=True)
class Resident:
    """Decoding with a share of the experts in memory."""

    model: str
    state: str
    share: float
    rates: list[float]  # tokens per second of each round
    ratios: list[float]  # of those to all resident, in the same round
    hit_rate: float = 0.0
    worst_layer: float = 0.0
    best_layer: float = 0.0
    clean_calls: float = 0.0
    bytes_per_token: float = 0.0
    bytes_per_second: float = 0.0  # of loads
    bound: float = 0.0  # tokens per second
    foreign: float = 0.0


def resident(name: str, directory: Path, state: str, tokens: int, rounds: int) -> list[Resident]:
    """Every share, in turns, with warm files or with cold ones."""
    source = ConvertedDirectory(directory)
    model, _ = open_local(directory)
    experts = {share: _experts(source, model.dtype, share, cold=state == "cold") for share in SHARES}
    rows = {share: Resident(name, state, share, [], []) for share in SHARES}
    for share in SHARES:  # resident, and each policy in its stride
        attach_backend(model, experts[share])
        decode(model, tokens)
    before = {share: experts[share].tier_stats for share in SHARES}
    for _ in range(rounds):
        _round(model, experts, rows, tokens)
    for share in SHARES:
        _summarise(rows[share], rows[1.0], before[share], experts[share].tier_stats, tokens * rounds)
    return list(rows.values())


def _experts(source: ConvertedDirectory, dtype: torch.dtype, share: float, *, cold: bool) -> LocalExperts:
    reader = Reader(source, cold=cold)
    loader = ExpertLoader(source.manifest, source)
    budget = int(share * len(source.manifest.experts)) * loader.largest_room(dtype)
    return LocalExperts(loader, WeightsTier(loader, budget, read=reader.read))


def _round(model: Any, experts: dict[float, LocalExperts], rows: dict[float, Resident], tokens: int) -> None:
    for share in SHARES:
        attach_backend(model, experts[share])
        with listen_for_noise() as noise:
            rows[share].rates.append(tokens / decode(model, tokens))
        rows[share].foreign = max(rows[share].foreign, noise.foreign)
        rows[share].ratios.append(rows[share].rates[-1] / rows[1.0].rates[-1])


def _summarise(row: Resident, full: Resident, before: Any, after: Any, tokens: int) -> None:
    """`before` and `after`: TierStats around the rounds, each of which also read its prompt."""
    hits, misses = after.hits - before.hits, after.misses - before.misses
    layers = [
        (counts.hits - before.groups[layer].hits) / max(1, counts.hits + counts.misses - _uses(before, layer))
        for layer, counts in after.groups.items()
    ]
    every, earlier = after.meter.every, before.meter.every
    loaded, seconds = after.loaded_bytes - before.loaded_bytes, after.load_seconds - before.load_seconds
    row.hit_rate, row.worst_layer, row.best_layer = hits / (hits + misses), min(layers), max(layers)
    row.clean_calls = (every.clean - earlier.clean) / max(1, every.calls - earlier.calls)
    row.bytes_per_token = loaded / (tokens + len(row.rates))  # a prompt is one step, too
    row.bytes_per_second = loaded / seconds if seconds else 0.0
    moving = row.bytes_per_token / row.bytes_per_second if seconds else 0.0
    row.bound = 1 / max(1 / statistics.median(full.rates), moving)


def _uses(stats: Any, layer: int) -> int:
    return int(stats.groups[layer].hits + stats.groups[layer].misses)


# --- the price of the tiers -------------------------------------------------------------------------------------------


class Plain:
    """LocalExperts' computation, with weights from a dictionary: nothing is counted, locked or bounded."""

    def __init__(self, source: ConvertedDirectory, dtype: torch.dtype) -> None:
        loader = ExpertLoader(source.manifest, source)
        self._spec = loader.spec
        self._count = source.manifest.model.num_experts
        self._weights = {(key.layer, key.expert): loader.load(key, dtype) for key in source.manifest.experts}

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ExpertsBackend."""
        out = torch.zeros_like(hidden)  # [T, H]
        if hidden.shape[0] == 1:
            for expert, position in order_of_token(top_k_index, self._count):
                row = expert_ffn(hidden, self._weights[layer, expert], self._spec)
                add_token_row(out, row, position, top_k_weights)
            return out
        groups = group_by_expert(top_k_index, self._count)
        rows = ((g, expert_ffn(hidden[g.token], self._weights[layer, g.expert], self._spec)) for g in groups)
        return combine_rows(out, rows, top_k_weights)


@dataclass(frozen=True, slots=True)
class Price:
    """All resident, against no tier."""

    model: str
    tiers: list[float]  # tokens per second
    plain: list[float]
    foreign: float

    @property
    def ratio(self) -> float:
        """Median of the ratios of neighbours."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.tiers, self.plain, strict=True))


def price(name: str, directory: Path, tokens: int, pairs: int) -> Price:
    """In turns; who goes first changes."""
    source = ConvertedDirectory(directory)
    model, _ = open_local(directory)
    sides = {
        "tiers": _experts(source, model.dtype, 1.0, cold=False),
        "plain": Plain(source, model.dtype),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with listen_for_noise() as noise:
        for pair in range(pairs + 1):
            for side in sorted(sides, reverse=bool(pair % 2)):
                attach_backend(model, sides[side])  # type: ignore[arg-type]
                rate = tokens / decode(model, tokens)
                if pair:
                    rates[side].append(rate)
    return Price(name, rates["tiers"], rates["plain"], noise.foreign)


# --- what is printed --------------------------------------------------------------------------------------------------


def print_resident(found: Sequence[Resident]) -> None:
    """One line for each share."""
    columns = (
        "model, files", "resident", "tokens/s", "of all resident", "bound, tokens/s", "hits", "by layer",
        "calls without a miss", "MB/token", "GB/s", "others' CPU",
    )  # fmt: skip
    rows = [
        [
            f"{one.model}, {one.state}", f"{one.share:.0%}", statistics.median(one.rates),
            statistics.median(one.ratios), one.bound, f"{one.hit_rate:.1%}",
            f"{one.worst_layer:.0%} to {one.best_layer:.0%}", f"{one.clean_calls:.0%}", one.bytes_per_token / 1e6,
            one.bytes_per_second / 1e9, f"{one.foreign:.0%}",
        ]
        for one in found
    ]  # fmt: skip
    print_table(columns, rows)


def print_price(found: Sequence[Price]) -> None:
    """Ratios."""
    rows = [
        [one.model, statistics.median(one.tiers), statistics.median(one.plain), one.ratio, f"{one.foreign:.0%}"]
        for one in found
    ]
    print_table(("model", "tiers, tokens/s", "dictionary, tokens/s", "ratio", "others' CPU"), rows)


def plot(found: Sequence[Resident], path: Path) -> None:
    """Speed against what is resident, as shares of all resident."""
    lines = []
    for model, state in dict.fromkeys((one.model, one.state) for one in found):
        rows = [one for one in found if (one.model, one.state) == (model, state)]
        points = [(100 * one.share, statistics.median(one.ratios)) for one in rows]
        full = statistics.median(rows[0].rates)
        lines.append(Line(f"{model}, {state} files", points))
        lines.append(Line(f"{model}, {state}: bound", [(100 * one.share, one.bound / full) for one in rows], True))
    text = line_plot(
        "Decoding with a part of the experts in memory", "% of experts resident", "tokens/s, of all resident", lines
    )
    path.write_text(text)


def main() -> None:
    """Print the tables; end with 1 where something asked for was not reached."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=16, help="of one round")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--experts", type=int, default=32, help="of each of its layers; 8 are used for a token")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG here")
    options = parser.parse_args()
    leave_cleanly()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = conditions(threads=options.threads, dtype="bfloat16", **_storage())
    print_head("tiers", facts)
    results: dict[str, Any] = {}
    wrong: list[str] = []
    if "pages" in options.part:
        found = pages(options.rounds)
        print_pages(found)
        results["pages"] = [asdict(one) for one in found]
        slow = [one for one in found if (one.shape, one.state) == ("80 MB", "warm") and p50(one.seconds) >= 0.1]
        wrong += [f"80 MB warm take {1e3 * p50(one.seconds):.0f} ms" for one in slow]
    with tempfile.TemporaryDirectory() as temporary:
        models = _models(Path(temporary), options) if set(options.part) - {"pages"} else {}
        _decoding(models, options, results, wrong)
    write_json(options.json, facts, results)
    if wrong:
        raise SystemExit(f"not as asked: {', '.join(wrong)}")


def _decoding(models: dict[str, Path], options: Any, results: dict[str, Any], wrong: list[str]) -> None:
    if "price" in options.part:
        prices = [price(name, path, 2 * options.tokens, 2 * options.rounds) for name, path in models.items()]
        print_price(prices)
        results["price"] = [{**asdict(one), "ratio": one.ratio} for one in prices]
        wrong += [f"{one.model}: tiers cost {1 - one.ratio:.1%}" for one in prices if one.ratio < 0.97]
    if "resident" in options.part:
        rows: list[Resident] = []
        for name, path in models.items():
            for state in STATES:
                found = resident(name, path, state, options.tokens, options.rounds)
                print_resident(found)
                rows += found
        results["resident"] = [asdict(row) for row in rows]
        if options.plot is not None:
            plot(rows, options.plot)
    noisy = max((row["foreign"] for rows in results.values() for row in rows), default=0.0)
    if noisy > MAX_FOREIGN:
        print(f"others used up to {noisy:.0%} of the CPU  ** NOISY: do not quote **")


def _models(place: Path, options: Any) -> dict[str, Path]:
    convert(DEMO, place / "demo")
    source = qwen3_shaped(place / "source", layers=options.layers, experts=options.experts)
    convert(source, place / "qwen3-shaped")
    for file in source.iterdir():
        file.unlink()
    return {"demo": place / "demo", "qwen3-shaped": place / "qwen3-shaped"}


def _storage() -> dict[str, object]:
    status = os.statvfs(tempfile.gettempdir())
    return {"files": f"on {tempfile.gettempdir()}, blocks of {status.f_bsize} bytes"}


if __name__ == "__main__":
    main()
