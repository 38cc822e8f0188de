"""What is wanted, and who may have it: the words between those who want objects and the download engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from moehive.protocol.ids import PeerId, ShardHash


@dataclass(frozen=True, slots=True)
class Source:
    """How to reach a peer that may have an object."""

    addresses: tuple[str, ...] = ()  # hints for dialling
    partial: bool = False  # it may have only parts, and is asked which: a node that is loading
    last_resort: bool = False  # it is asked only for chunks that nobody else has: a permanent seed


Sources = Mapping[PeerId, Source]
FindSources = Callable[[], Awaitable[Sources]]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """An object to be got."""

    hash: ShardHash
    find: FindSources  # asked at the start, and again while nobody can go on; may raise LocalError
    name: str = ""  # for messages; default: the hash
    size: int = 0  # bytes, where known: for totals and forecasts only

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name or self.hash
