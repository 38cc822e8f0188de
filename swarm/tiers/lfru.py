"""The policy of the expert tiers: recency with decayed frequency, by layer and over all of them (LFRU).

How likely an expert is used at its layer's next call is estimated from how often it was used: a weighted sum of
averages that forget at different speeds, in the layer's own tokens, so that a walk over the layers is no scan. How much
recency and frequency are worth is a property of the model, so the weights are fitted as it goes, from what the averages
said and what then was used. What other layers used since its last call says more (transitions.py), where layers come
in order. A forecast from hidden states, where there is one, is one more term of the sum, and says more than those.

An entry's worth is that likelihood, less the longer its layer's next turn is away: the experts of the layer that was
just computed are needed last of all. The statistics of all experts are kept, resident or not, which makes them a ghost
list: what returns is judged by its whole history. Where the slots suffice, `top_k + 1` entries of each layer stay.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic

import numpy as np
from numpy.typing import NDArray

from .policy import Chances, K, Place, Uses
from .regression import OnlineRidge
from .transitions import Transitions, fits

Floats = NDArray[np.floating[Any]]

HALF_LIVES: Final = np.array([0.5, 2.0, 8.0, 64.0, 2000.0])  # tokens after which a use counts half
WEIGHTS: Final = np.array([0.05, 0.20, 0.15, 0.05, 0.50])  # of the averages, before anything is known of the model
LATENESS: Final = 0.5  # what worth is left after a whole token's time
_TERMS: Final = len(HALF_LIVES)
_IN_ORDER: Final = 0.8  # share of steps to the next layer, above which the time until a layer's turn is known
_SMOOTHING: Final = 1 / 64
_FEW: Final = 64  # candidates that are sorted at first
_REMEMBERED: Final = 4096  # steps


class Lfru(Generic[K]):
    """See the module. O(top k * all experts) per step and per decision; numpy does both in tens of microseconds.

    Steps are only written down until there is something to decide, and of a long time without decisions only the end
    counts: where everything is resident, a step costs next to nothing. `uploads` is how many newcomers of one layer and
    step may take the place of other layers' entries; further ones take that of their own layer's, so that a prompt,
    which uses nearly everything once, does not flush what decoding uses.
    """

    def __init__(self, place: Place[K], *, top_k: int = 1, uploads: int | None = None) -> None:
        self._place = place
        self._top_k = top_k
        self._uploads = uploads
        self._taken: dict[int, int] = {}  # row: entries that came since its newest step
        self._steps: deque[bytes] = deque(maxlen=_REMEMBERED)  # that did not enter the statistics yet
        self._decay: Floats = 0.5 ** (1 / HALF_LIVES)  # [F]
        self._rows: dict[int, int] = {}  # layer: its row in the arrays
        self._turn = np.zeros(0, dtype=np.int64)  # [R]: the rank of a row's layer among the layers
        self._order = np.zeros(0, dtype=np.int64)  # [R]: rows by rank
        self._used: Floats = np.zeros((0, _TERMS, 0))  # [R, F, E]: decayed uses per token
        self._seen: Floats = np.zeros((0, _TERMS))  # [R, F]: the same of an expert that is always used
        self._told: Floats = np.zeros((0, 0))  # [R, E]: forecasts, else NaN
        self._usual = OnlineRidge(WEIGHTS)
        self._informed = OnlineRidge(np.append(np.zeros(_TERMS), 1.0))
        self._transitions: Transitions | None = None  # by rank; none before a second token, or where too many experts
        self._resident = np.zeros((0, 0), dtype=np.bool_)  # [R, E]
        self._counts = np.zeros(0, dtype=np.int64)  # [R]: resident entries
        self._entries: dict[tuple[int, int], dict[K, int]] = {}  # cell: its resident keys and their bytes
        self._last = -1  # row of the newest step
        self._known_worth: Floats | None = None  # as long as nothing that it depends on changes
        self._in_order = 1.0

    # --- events ---------------------------------------------------------------------------------------------------

    def step(self, uses: Uses[K]) -> None:
        """See Policy."""
        columns = [self._place(key)[1] for key in uses.rows]
        # Numbers: of _REMEMBERED steps with their keys the memory would be many times as much, and in no budget.
        self._steps.append(array("I", (uses.layer, uses.tokens, *columns, *uses.rows.values())).tobytes())

    def _catch_up(self) -> None:
        """Let the steps since the last decision enter the statistics."""
        while self._steps:
            self._count(self._steps.popleft())

    def _count(self, step: bytes) -> None:
        layer, tokens, *numbers = array("I", step)
        columns, counts = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        row = self._row(layer, max(columns, default=0))
        decay = self._decay
        follows = self._last >= 0 and self._turn[row] == (self._turn[self._last] + 1) % len(self._rows)
        tells = tokens == 1 and bool(columns)  # what a token without experts leaves says nothing
        if self._transitions is not None and not (follows and tells):
            self._transitions.forget()
        if tells:
            self._learn(row, columns)
        else:
            decay = decay**tokens
        gain = 1 - decay
        used = self._used[row]  # [F, E]
        used *= decay[:, None]
        shares = np.array(counts, np.float64) / tokens
        used[:, columns] += gain[:, None] * shares
        self._seen[row] = self._seen[row] * decay + gain
        self._told[row] = np.nan
        self._taken.pop(row, None)
        self._known_worth = None
        if self._last >= 0:
            self._in_order += _SMOOTHING * (float(follows) - self._in_order)
        self._last = row
        if self._transitions is not None and tells:
            order = self._order
            usual = self._used[order, -1] / np.maximum(self._seen[order, -1:], 1e-9)  # [R, E]
            self._transitions.follow(int(self._turn[row]), columns, usual)

    def forecast(self, layer: int, chances: Chances) -> None:
        """See Policy."""
        self._catch_up()
        self._known_worth = None
        row = self._row(layer, len(chances) - 1)
        self._told[row, : len(chances)] = chances

    def loaded(self, key: K, size: int) -> None:
        """See Policy."""
        self._catch_up()
        layer, column = self._place(key)
        row = self._row(layer, column)
        self._taken[row] = self._taken.get(row, 0) + 1
        self._entries.setdefault((row, column), {})[key] = size
        self._resident[row, column] = True
        self._counts[row] += 1

    def evicted(self, key: K) -> None:
        """See Policy."""
        layer, column = self._place(key)
        row = self._rows[layer]
        keys = self._entries[row, column]
        del keys[key]
        self._counts[row] -= 1
        if not keys:
            del self._entries[row, column]
            self._resident[row, column] = False

    def restore(self, sizes: Mapping[K, int]) -> None:
        """See Policy."""
        self._entries = {}
        for key, size in sizes.items():
            layer, column = self._place(key)
            self._entries.setdefault((self._row(layer, column), column), {})[key] = size
        self._resident[:], self._counts[:] = False, 0
        for (row, column), keys in self._entries.items():
            self._resident[row, column] = True
            self._counts[row] += len(keys)

    def _learn(self, row: int, columns: list[int]) -> None:
        """Compare what was expected of a layer with what it uses now."""
        if not self._seen[row, 0]:
            return
        if self._transitions is None and fits(*self._resident.shape):
            self._transitions = Transitions(*self._resident.shape, WEIGHTS)
        averages = self._used[row] / self._seen[row][:, None]  # [F, E]
        if self._transitions is not None:
            self._transitions.learn(int(self._turn[row]), columns, averages)
        told = self._told[row]
        if np.isnan(told[0]):
            self._usual.learn(averages, columns)
        else:
            self._informed.learn(np.vstack((averages, np.nan_to_num(told))), columns)

    # --- decisions ------------------------------------------------------------------------------------------------

    def victims(
        self, incoming: K | None, need: int, keep: Callable[[K], bool], *, chance: float | None = None
    ) -> Sequence[K] | None:
        """See Policy."""
        if need <= 0:
            return []
        self._catch_up()
        limit, own = np.inf, -1
        if incoming is not None:
            own = self._row(*self._place(incoming))
            limit = np.inf if chance is None else float(self._discount()[own] * chance)
        spare = self._counts - self._floor()
        if self._uploads is not None and self._taken.get(own, 0) >= self._uploads:
            spare[:] = 0
        chosen: list[K] = []
        spared: list[K] = []  # of other layers, which are at their floor or gave enough
        for cell in self._cheaper_than(limit):
            for key in self._entries[cell]:
                if keep(key):
                    continue
                if spare[cell[0]] <= 0 and cell[0] != own:
                    spared.append(key)
                    continue
                spare[cell[0]] -= 1
                chosen.append(key)
                need -= self._entries[cell][key]
                if need <= 0:
                    return chosen
        if chance is not None:  # no suspicion takes a layer below its floor
            return None
        for key in spared:  # what is needed now comes first: a floor is a wish
            chosen.append(key)
            need -= self._size(key)
            if need <= 0:
                return chosen
        return None

    def _size(self, key: K) -> int:
        layer, column = self._place(key)
        return self._entries[self._rows[layer], column][key]

    def _cheaper_than(self, limit: float) -> Iterator[tuple[int, int]]:
        """Resident cells worth less, the least first. Mostly only the first few are asked for."""
        worth = self._worth()
        experts = worth.shape[1]
        cells = np.flatnonzero(self._resident & (worth < limit))  # positions in [R * E]
        values = worth.ravel()[cells]
        few = np.argpartition(values, _FEW)[:_FEW] if len(cells) > _FEW else np.arange(len(cells))
        for index in few[np.argsort(values[few], kind="stable")].tolist():
            yield divmod(int(cells[index]), experts)
        if len(few) < len(cells):
            done = set(few.tolist())
            for index in np.argsort(values, kind="stable").tolist():
                if index not in done:
                    yield divmod(int(cells[index]), experts)

    def _worth(self) -> Floats:
        """What each expert is worth keeping [R, E]: the chance of its use at the next call, or at the one after it."""
        if self._known_worth is None:
            chance, usual = self._chances()
            self._known_worth = self._discount()[:, None] * (chance + (1 - chance) * LATENESS * usual)
        return self._known_worth

    def _chances(self) -> tuple[Floats, Floats]:
        """How likely each expert is used at its layer's next call, and at one of which only its own past is known."""
        seen = np.maximum(self._seen, 1e-9)  # [R, F]
        usual = np.matmul((self._usual.weights / seen)[:, None], self._used)[:, 0]  # [R, E]
        np.clip(usual, 1e-6, 1, out=usual)
        chance = usual
        if self._transitions is not None and self._transitions.ready:
            order = self._order
            chance = np.empty_like(usual)
            chance[order] = self._transitions.chances(int(self._turn[self._last]), self._used[order], seen[order])
            np.clip(chance, 1e-6, 1, out=chance)
        if not np.isnan(self._told).all():
            *weights, told = self._informed.weights
            informed = np.matmul((np.array(weights) / seen)[:, None], self._used)[:, 0] + told * self._told
            chance = np.where(np.isnan(self._told), chance, np.clip(informed, 1e-6, 1))
        return chance, usual

    def _discount(self) -> Floats:
        """What is left of a use's worth when the layer's turn comes [R]."""
        layers = max(1, len(self._rows))
        if self._in_order < _IN_ORDER or self._last < 0:
            return np.full(len(self._turn), LATENESS)
        away = (self._turn - self._turn[self._last] - 1) % layers + 1  # steps until the layer's turn
        discount: Floats = LATENESS ** (away / layers)
        return discount

    def _floor(self) -> int:
        """Entries of every layer that others' newcomers leave alone."""
        layers, entries = len(self._rows), int(self._counts.sum())
        wanted = self._top_k + 1
        if entries >= layers * wanted:
            return wanted
        # Too few slots for that. Equal shares are what LRU comes to; who knows what comes next shares better.
        knows = (self._transitions is not None and self._transitions.ready) or bool(np.isfinite(self._told).any())
        return 0 if knows else entries // max(1, layers)

    # --- arrays ---------------------------------------------------------------------------------------------------

    def _row(self, layer: int, column: int) -> int:
        """The row of a layer, which from now on has a cell for `column`."""
        row = self._rows.get(layer)
        if row is None:
            row = self._rows[layer] = len(self._rows)
        rows, experts = self._resident.shape
        if row >= rows or column >= experts:
            self._grow(len(self._rows) - rows, max(0, column + 1 - experts))
        return row

    def _grow(self, rows: int, experts: int) -> None:
        """Add rows for new layers and cells for new experts. Happens while the first token is computed."""
        self._known_worth = self._transitions = None
        used = np.pad(self._used, ((0, rows), (0, 0), (0, experts)))
        seen = np.pad(self._seen, ((0, rows), (0, 0)))
        told = np.pad(self._told, ((0, rows), (0, experts)), constant_values=np.nan)
        resident = np.pad(self._resident, ((0, rows), (0, experts)))
        counts = np.pad(self._counts, (0, rows))
        layers = sorted(self._rows)
        turn = np.array([layers.index(layer) for layer in self._rows])
        order = np.argsort(turn)
        # All at once: arrays of different shapes, after an interrupt in between, would be an error at every step.
        self._used, self._seen, self._told, self._resident, self._counts = used, seen, told, resident, counts
        self._turn, self._order = turn, order
