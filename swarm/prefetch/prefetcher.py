"""The part of prefetch that has state: it sees each layer's hidden states go by, guesses, starts loads, and learns.

Guesses are made for calls of one token, which is what decoding one sequence does. A call of many tokens uses nearly all
experts of a layer anyhow; it only counts as what came before. Who computes tells it two things: what enters a decoder
layer, and what a layer's experts are about to compute with. Both return at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Protocol

from moehive.swarm.log import get_logger

from .adapting import adapt, adaptable, stride
from .attending import Memory, empty_memory, remember
from .control import Limits, Mode, State, Window, judge, start, tick
from .fitting import Routers
from .history import REACH, Floats, advance, empty_history
from .measure import Usefulness
from .plan import NOTHING, Bounds, Economy, Plan, Profile, choose, grade, make_plan
from .predictors import Point, Predictor, margins, ranking

EXTRA_WIDTH: Final = 2  # experts beyond the top k that may be loaded
_SHADOW: Final = 4  # while nothing is loaded, guesses are made for every so many-th token, to know what they are worth
_SMOOTHING: Final = 0.05
_NO_MEMORY: Final = empty_memory()
_log = get_logger(__name__)


class Fate(Protocol):
    """What became of one load that a guess began."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def used(self) -> bool | None:
        """Whether it was used before it left."""

    @property
    def hidden(self) -> float:
        """Seconds of loading that nobody waited for."""


class Shelf(Protocol):
    """What prefetch needs of a memory tier. Nothing here waits for a load."""

    @property
    def load_seconds(self) -> float:
        """That one load takes; 0 where none was seen yet."""

    @property
    def stalled_seconds(self) -> float:
        """That layers have waited for loads so far: the link was busy with what is needed, and is no lead."""

    def absent(self, layer: int, experts: Sequence[int]) -> Sequence[bool]:
        """Which of a layer's experts are neither resident nor on their way."""

    def prefetch(self, layer: int, ranked: Sequence[tuple[int, float]], most: int) -> int:
        """Begin to load what is absent of these experts, with their chances, best first; how many loads that are."""

    def outcomes(self) -> Sequence[Fate]:
        """Loads whose fate became known since the last call."""


@dataclass(frozen=True, slots=True)
class _Guess:
    point: Point
    features: Floats
    ranked: Sequence[int]
    width: int
    absent: Sequence[int]  # of the ranked
    grades: Sequence[int]  # of the absent
    made: float  # when, on a clock that stands while a layer waits for loads


class Prefetcher:
    """Prefetch for one model on one tier. Not thread-safe: one model computes one call at a time.

    `layers` are those with routed experts, ascending. With the `routers` of the model the predictor learns as it
    guesses (adapting.py). `clock` gives seconds.
    """

    def __init__(
        self,
        predictor: Predictor,
        shelf: Shelf,
        layers: Sequence[int],
        *,
        routers: Routers | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limits = Limits() if limits is None else limits
        self.state: State = start(self.limits)
        self.plan: Plan = NOTHING
        self.usefulness = Usefulness()
        self.profiles = {point: Profile() for point in Point}
        self._predictor = predictor if routers is None else adaptable(predictor)
        self._routers = routers
        self._uses_history = self._predictor.uses_history
        self._shelf = shelf
        self._layers = tuple(layers)
        self._column = {layer: column for column, layer in enumerate(self._layers)}
        self.bounds = Bounds(width=predictor.top_k + EXTRA_WIDTH)
        self._clock = clock
        self._leads: dict[Point, float] = {}
        self._guesses: dict[int, list[_Guess]] = {}
        self._histories: dict[tuple[bool, int], Floats] = {}  # (at entry, layer)
        self._memories: dict[int, Memory] = {}
        self._token_began: float | None = None
        self._tokens: list[float] = []  # seconds
        self._window_loads = self._window_used = self._window_wasted = 0
        self._shadow = 0
        self._single = False  # whether the call that is computed is of one token
        self._broken = False

    @property
    def active(self) -> bool:
        """Whether guesses are made for the token at hand."""
        return not self._broken and (self.state.loading or self._shadow == 0)

    @property
    def idle(self) -> bool:
        """Whether it is enough to tell of the first layer's entry: nothing will be guessed for many tokens."""
        return self._broken or (self.state.mode is Mode.REST and self.state.left > REACH)

    # --- what is told ---------------------------------------------------------------------------------------------

    def entering(self, layer: int, rows: Floats) -> None:
        """`rows` [T, H] float32 enter the decoder layer `layer`, divided by their root mean squares."""
        if layer in self._column:
            self._supervise(lambda: self._enter(layer, rows))

    def computing(self, layer: int, rows: Floats, used: Sequence[int]) -> None:
        """The experts of `layer` are about to compute with `rows` [T, H] float32; `used` are those that they use."""
        self._supervise(lambda: self._compute(layer, rows, frozenset(used)))

    def _supervise(self, act: Callable[[], None]) -> None:
        """The supervision point: what goes wrong with a guess is no error of the generation. It ends the guessing."""
        if self._broken:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 - supervision point, see above
            self._broken = True
            self.usefulness.failed_guesses += 1
            _log.warning("prefetch is off, because a guess failed", reason=repr(error))

    def _enter(self, layer: int, rows: Floats) -> None:
        if layer == self._layers[0]:
            self._begin_token(len(rows))
        if self._single and self.active:
            self._guess(Point.ENTRY, layer, rows[0], self._history(True, layer, rows))
        self._remember(True, layer, rows)

    def _compute(self, layer: int, rows: Floats, used: frozenset[int]) -> None:
        if not self._single or len(rows) != 1:
            self._guesses.clear()
        else:
            self._settle(layer, rows[0], used)
            if self.active:
                self._look_ahead(layer, rows)
        self._remember(False, layer, rows)

    # --- guessing -------------------------------------------------------------------------------------------------

    def _look_ahead(self, layer: int, rows: Floats) -> None:
        history = self._history(False, layer, rows)
        for point in (Point.BEFORE, Point.EARLIER):
            column = self._column[layer] + point.ahead
            if column < len(self._layers):
                self._guess(point, self._layers[column], rows[0], history)

    def _guess(self, point: Point, layer: int, row: Floats, history: Floats) -> None:
        """Guess the experts of `layer`, and begin to load as many as the plan says."""
        if self.state.loading and self.plan.least[point] > 1 and self._shadow:
            return  # only now and then, to know what it would be worth
        memory = self._memories.get(layer, _NO_MEMORY)
        features = self._predictor.features(point, layer, row, history, memory)
        if features is None:
            return
        scores = self._predictor.maps[point, layer].scores(features)  # [E]
        ranked = ranking(scores, self.bounds.width).tolist()
        beyond = margins(scores, self._predictor.top_k)[ranked]
        grades = [grade(margin) for margin in beyond.tolist()]
        chances = [self.profiles[point].chance(number) for number in grades]
        missing = self._shelf.absent(layer, ranked)
        absent = [index for index, is_missing in enumerate(missing) if is_missing]
        width = self._predictor.top_k
        if self.state.loading:
            width = self._load(point, layer, ranked, chances, absent)
        missed, classes = [ranked[index] for index in absent], [grades[index] for index in absent]
        guess = _Guess(point, features, ranked, width, missed, classes, self._working_time())
        self._guesses.setdefault(layer, []).append(guess)

    def _load(
        self, point: Point, layer: int, ranked: Sequence[int], chances: Sequence[float], absent: Sequence[int]
    ) -> int:
        """Begin to load what is worth it; returns how many of the ranked are wanted, whether resident or not."""
        least, economy = self.plan.least[point], self._economy(point)
        width = sum(1 for chance in chances if chance >= least)
        most = choose([chances[index] for index in absent], least, economy, self.bounds.width)
        if width:
            wanted = list(zip(ranked[:width], chances[:width], strict=True))
            started = self._shelf.prefetch(layer, wanted, most)
            self._window_loads += started
            self.usefulness.loads += started
        return width

    def _settle(self, layer: int, row: Floats, used: frozenset[int]) -> None:
        """What the guesses of this layer were worth, and what there is to learn from them."""
        now = self._working_time()
        for guess in self._guesses.pop(layer, ()):
            lead = now - guess.made
            before = self._leads.get(guess.point, lead)
            self._leads[guess.point] = before + _SMOOTHING * (lead - before)
            self.usefulness.points[guess.point].add(guess.ranked, guess.width, used, lead)
            self.profiles[guess.point].learn(guess.grades, [expert in used for expert in guess.absent])
            if self._routers is not None:
                found = self._predictor.maps[guess.point, layer]
                if self.usefulness.points[guess.point].guesses // len(self._layers) % stride(found) == 0:
                    adapt(found, guess.features, self._routers[layer], row)

    def _working_time(self) -> float:
        return self._clock() - self._shelf.stalled_seconds

    def _economy(self, point: Point) -> Economy:
        return Economy(self._shelf.load_seconds, self._leads.get(point, 0.0))

    # --- what came before -----------------------------------------------------------------------------------------

    def _history(self, entry: bool, layer: int, rows: Floats) -> Floats:
        found = self._histories.get((entry, layer))
        return empty_history(rows.shape[1]) if found is None else found

    def _remember(self, entry: bool, layer: int, rows: Floats) -> None:
        """A call of many tokens begins a session, as far as can be seen from here."""
        reader = self._predictor.readers.get(layer) if entry else None
        if reader is not None:
            memory = self._memories.get(layer, _NO_MEMORY) if len(rows) == 1 else _NO_MEMORY
            self._memories[layer] = remember(reader, memory, rows)
        if self._uses_history:
            history = self._history(entry, layer, rows) if len(rows) == 1 else empty_history(rows.shape[1])
            self._histories[entry, layer] = advance(history, rows)

    # --- tokens and windows ---------------------------------------------------------------------------------------

    def _begin_token(self, tokens: int) -> None:
        now = self._clock()
        self._single = tokens == 1
        if self._token_began is not None:
            self._tokens.append(now - self._token_began)
            self.state = tick(self.state)
        self._token_began = now if self._single else None
        self._learn_fates()
        if self.state.left <= 0:
            self._judge()
        self._shadow = (self._shadow + 1) % _SHADOW
        if self.active:
            economies = {point: self._economy(point) for point in self._leads if self._shelf.load_seconds}
            profiles = {point: self.profiles[point] for point in economies}
            self.plan = make_plan(profiles, economies, self.bounds, self.plan)

    def _learn_fates(self) -> None:
        for fate in self._shelf.outcomes():
            if fate.used:
                self._window_used += fate.size
                self.usefulness.used_bytes += fate.size
                self.usefulness.hidden_seconds += fate.hidden
            else:
                self._window_wasted += fate.size
                self.usefulness.wasted_bytes += fate.size

    def _judge(self) -> None:
        window = Window(median(self._tokens), self._window_loads, self._window_used, self._window_wasted)
        self._tokens.clear()
        self._window_loads = self._window_used = self._window_wasted = 0
        before, self.state = self.state, judge(self.state, window, self.limits)
        if self.state.mode is Mode.REST and before.mode is not Mode.REST:
            self.usefulness.switched_off += 1
            _log.info("prefetch rests", tokens=self.state.left, reason=self.state.reason)
