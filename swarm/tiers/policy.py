"""What a tier evicts: policies that are functions of the events they were told, and of nothing else.

A policy is a state machine. Its only inputs are `step`, `forecast`, `loaded` and `evicted`; it has no clock (time is
the number of a layer's calls), no randomness, no I/O, and never sees a value. So the same events always give the same
decisions: a recorded trace can be replayed against any policy (replay.py), and a tier's decisions against it. State
advances in place rather than by copies because a step is told once per layer and token; it costs microseconds.

Admission needs no call of its own: what is loaded is about to be used and needs its bytes either way, so refusing a
newcomer means putting it first in line for eviction. Only what is loaded on suspicion can be refused: `victims` with a
`chance` gives up rather than evict what is likelier to be used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

K = TypeVar("K", bound=Hashable)
Chances = NDArray[np.floating[Any]]  # [E]: by expert number, how likely it is used
Place = Callable[[K], tuple[int, int]]  # a key's layer, and its number within the layer


class Uses(NamedTuple, Generic[K]):
    """What one call of one layer uses. A tuple because decoding makes one per layer and token."""

    layer: int
    rows: Mapping[K, int]  # how many of the tokens use each entry; in the order in which they are taken
    tokens: int = 1


class Policy(Protocol[K]):
    """Decides the order of eviction among the entries it was told of."""

    def step(self, uses: Uses[K]) -> None:
        """A layer's call begins; whether its entries are resident does not matter. The hot path."""

    def forecast(self, layer: int, chances: Chances) -> None:
        """How likely each expert of `layer` is used at that layer's next call, by somebody who knows more than ids.

        Valid until that call. A policy may ignore it.
        """

    def loaded(self, key: K, size: int) -> None:
        """`key` became resident, with `size` bytes."""

    def evicted(self, key: K) -> None:
        """`key` left, by this policy's decision or by somebody's order."""

    def restore(self, sizes: Mapping[K, int]) -> None:
        """These and no others are resident: whoever told of the last change was interrupted, at any place."""

    def victims(
        self, incoming: K | None, need: int, keep: Callable[[K], bool], *, chance: float | None = None
    ) -> Sequence[K] | None:
        """Entries to evict, first to go first, to free at least `need` bytes for `incoming` (None: the budget shrank).

        None of them satisfies `keep`. With `chance`, `incoming` is only suspected to be used next, this likely, and
        none of them may be worth more. None where that cannot be done; the state does not change either way.
        """


class Lru(Generic[K]):
    """Least recently used first: O(1) per use, O(victims + entries kept among the oldest) per decision."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[K, int] = OrderedDict()  # oldest first

    def step(self, uses: Uses[K]) -> None:
        """See Policy."""
        for key in uses.rows:
            if key in self._sizes:
                self._sizes.move_to_end(key)

    def forecast(self, layer: int, chances: Chances) -> None:
        """Ignored."""

    def loaded(self, key: K, size: int) -> None:
        """See Policy."""
        self._sizes[key] = size
        self._sizes.move_to_end(key)

    def evicted(self, key: K) -> None:
        """See Policy."""
        del self._sizes[key]

    def restore(self, sizes: Mapping[K, int]) -> None:
        """See Policy."""
        self._sizes = OrderedDict({key: sizes[key] for key in [*self._sizes, *sizes] if key in sizes})

    def victims(
        self, incoming: K | None, need: int, keep: Callable[[K], bool], *, chance: float | None = None
    ) -> Sequence[K] | None:
        """See Policy; `chance` is ignored."""
        return first_to_free(self._sizes, need, keep)


def first_to_free(sizes: Mapping[K, int], need: int, keep: Callable[[K], bool]) -> Sequence[K] | None:
    """The first entries of `sizes` that may go and together have `need` bytes; None where there are not enough."""
    chosen: list[K] = []
    for key, size in sizes.items():
        if need <= 0:
            break
        if not keep(key):
            chosen.append(key)
            need -= size
    return chosen if need <= 0 else None


def choose_victims(
    policy: Policy[K],
    incoming: K | None,
    need: int,
    *,
    sizes: Mapping[K, int],
    wanted: Mapping[K, Any],
    keep: Callable[[K], bool],
) -> Sequence[K] | None:
    """What leaves so that `incoming`, which is needed now, finds `need` bytes. None where too much must be kept.

    `incoming` is None where the bytes are for something else than an entry.

    `sizes` is what is resident. `wanted` has, in the order of their use, what running steps will use: it stays where
    anything else can leave, and else what is used last leaves first.
    """
    victims = policy.victims(incoming, need, lambda key: key in wanted or keep(key))
    if victims is None:
        late = {key: sizes[key] for key in reversed(list(wanted)) if key in sizes}
        victims = first_to_free(late, need, keep)
    return policy.victims(incoming, need, keep) if victims is None else victims
