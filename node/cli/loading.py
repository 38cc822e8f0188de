"""A model for the commands that compute with one: from a local directory, or as a client of a swarm.

Owns the options that say which model and how it is kept; `generate`, `chat` and `serve` share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from moehive.node.logs import configure_logs
from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import is_hash
from moehive.protocol.ticket import Ticket

from .arguments import DeviceName, Positive, Size, Threads, TicketText, check_device
from .drafting import check_draft, drafting
from .kv import KvFlags
from .node import check_converted
from .output import progress_bar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moehive.protocol.manifest import Manifest
    from moehive.swarm.client import Swarm
    from moehive.swarm.dispatch.stats import DispatchStats
    from moehive.swarm.prefetch.measure import Usefulness
    from moehive.swarm.tiers.stats import TierStats


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which model, and how it is kept and computed with."""

    model: Annotated[str, Parameter(metavar="ID|DIR")]
    """Model id, or a directory that `moehive convert` wrote."""

    join: TicketText | None = None
    """Join ticket of a swarm, as `moehive node` printed it; peers then compute the experts. Without it they are read
    from the directory --model. In the environment, for example as MOEHIVE_GENERATE_JOIN, it stays out of the list of
    processes."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers to compute in; auto is the checkpoint's own."""

    answers: Literal["sum", "rows"] = "sum"
    """What peers send back: one sum for each token (fast), or every expert's row, added up here in transformers' own
    order (bit for bit its result)."""

    ram: Size | None = None
    """Memory for experts. With --join for those that are fetched in the background, where that pays, and then computed
    here; by default none are kept. Without it for those that are read from the model's directory; by default half
    of what is free."""

    device: DeviceName = "cpu"
    """Where the model computes. Experts are then kept there too, within --vram; with --join those that --ram keeps. The
    processor computes those that do not get there in time."""

    vram: Size | None = None
    """Memory of --device for experts. By default what is free there once the dense part is."""

    prefetch: Annotated[str, Parameter(metavar="auto|off|FILE")] = "auto"
    """Experts that are read from disk before they are needed, where not all of them fit into memory: as the model's own
    routers guess them, or as a predictor does that `moehive trace fit` wrote to FILE. Only without --join."""

    threads: Threads | None = None
    """Threads that compute here. By default one for each core."""

    draft: Annotated[str | None, Parameter(metavar="lookup|DIR")] = None
    """Draft tokens that the model then checks together, for fewer round trips; the text stays the same. "lookup" drafts
    from the text so far (good where it repeats itself), DIR is a small model with the same vocabulary."""

    draft_tokens: Positive = 5
    """Tokens to draft at a time."""

    kv: KvFlags = field(default_factory=KvFlags)

    def check(self) -> None:
        """Raise ConfigError, TicketError for what can be seen to be wrong without loading anything."""
        check_draft(self.draft)
        self.kv.options  # noqa: B018  # made and dropped: it checks itself
        self._check_device()
        self._check_prefetch()
        if self.join is not None:
            Ticket.parse(self.join)
        if is_hash(self.model):
            if self.join is None:
                raise ConfigError("a model id needs a swarm: add --join TICKET, or name a converted directory")
        else:
            check_converted(Path(self.model))

    def _check_prefetch(self) -> None:
        if self.prefetch in ("auto", "off"):
            return
        if self.join is not None:
            raise ConfigError("--prefetch FILE is for experts that are read from disk: leave it out with --join")
        if not Path(self.prefetch).is_file():
            raise ConfigError(f"--prefetch {self.prefetch} is neither auto, off nor a file of `moehive trace fit`")

    def _check_device(self) -> None:
        if self.join is not None and self.vram is not None and not self.ram:
            raise ConfigError("--vram with --join is for experts that are kept here: add --ram")
        check_device(self.device, self.vram)


@dataclass(frozen=True, slots=True)
class Tiers:
    """What the memory for experts did: RAM, where its misses came from, the device above it, the stored part below it,
    and what prefetch was worth.
    """

    ram: TierStats
    source: str
    device: TierStats | None = None
    stored: TierStats | None = None
    prefetch: Usefulness | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready, with what can be said about it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    drafts: dict[str, Any]  # for `generate`
    stats: DispatchStats | None  # of the swarm
    tier: Callable[[], Tiers | None]
    missing: Callable[[], int]  # experts that no peer announces now

    @property
    def manifest(self) -> Manifest:
        """What the model is, by the files that it was loaded from."""
        from moehive.swarm.store.directory import ConvertedDirectory

        return ConvertedDirectory(Path(str(self.model.name_or_path))).manifest


@contextmanager
def loaded_model(options: LoadOptions) -> Iterator[LoadedModel]:
    """The model of `options`, which were checked, while the block lasts. Raises what loading and joining raise."""
    _set_threads(options.threads)
    if options.join is None:
        yield _local(options)
        return
    from moehive.swarm.client import join

    with join(options.join) as swarm:
        yield _of_swarm(options, swarm)


def _local(options: LoadOptions) -> LoadedModel:
    from moehive.swarm import open_local
    from moehive.swarm.model.seats import device_statistics, stored_statistics, tier_statistics
    from moehive.swarm.prefetch.wiring import usefulness_of

    model, tokenizer = open_local(
        options.model,
        dtype=_torch_dtype(options.dtype),
        ram=options.ram,
        device=options.device,
        vram=options.vram,
        prefetch=_prefetch(options.prefetch),
    )

    def tier() -> Tiers | None:
        return _tier(
            tier_statistics(model), "disk", device_statistics(model), stored_statistics(model), usefulness_of(model)
        )

    drafts = drafting(model, options.draft, options.draft_tokens)
    return LoadedModel(model, tokenizer, drafts, None, tier, lambda: 0)


def _of_swarm(options: LoadOptions, swarm: Swarm) -> LoadedModel:
    from moehive.swarm.store.directory import ConvertedDirectory

    local = not is_hash(options.model)
    model_id = ConvertedDirectory(Path(options.model)).model_id if local else options.model
    with nullcontext() if local else progress_bar("fetching the dense part") as move:
        model, tokenizer = swarm.load(
            options.model,
            dtype=_torch_dtype(options.dtype),
            answers=options.answers,
            ram=options.ram or 0,
            device=options.device,
            vram=options.vram,
            observer=(lambda seen: move(seen.verified, seen.total)) if move else None,
        )

    def kept() -> Tiers | None:
        return _tier(swarm.tier_stats(model_id), "swarm", swarm.device_stats(model_id))

    drafts = drafting(model, options.draft, options.draft_tokens)
    return LoadedModel(model, tokenizer, drafts, swarm.stats(model_id), kept, lambda: swarm.missing(model_id))


def _prefetch(text: str) -> bool | Path:
    return Path(text) if text not in ("auto", "off") else text == "auto"


def _tier(
    ram: TierStats | None,
    source: str,
    device: TierStats | None = None,
    stored: TierStats | None = None,
    prefetch: Usefulness | None = None,
) -> Tiers | None:
    return None if ram is None else Tiers(ram, source, device, stored, prefetch)


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def quiet_libraries() -> None:
    """Only what the user asked for: no bars and hints of transformers, our own log from warnings up."""
    configure_logs("console", "warning")
    quiet_transformers()


def quiet_transformers() -> None:
    """No bars and hints of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
