"""When prefetch is on: a state machine that compares tokens with it and tokens without it. Pure.

A plan (plan.py) can be wrong in what it does not see: processors shared with the computation, a link shared with
others, texts that change. So what prefetch does to the whole token's time is measured, and what becomes of its bytes is
known. Beyond a bound it is switched off, twice as long each time, and tried again. A trial has to show a gain, while
what runs is only stopped by a loss, and only by two windows in a row: that is the hysteresis.

    PLAIN --probe tokens--> TRIAL --good window--> ON --two bad windows--> REST --its tokens--> TRIAL
                              \\--bad window--> REST                    ON --now and then--> PLAIN (measures anew)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final


class Mode(enum.Enum):
    """What prefetch does now."""

    PLAIN = "plain"  # nothing, to measure tokens without it
    TRIAL = "trial"  # it loads, and has to show a gain
    ON = "on"
    REST = "rest"  # nothing, because it did not pay


LOADING: Final = (Mode.TRIAL, Mode.ON)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and lengths; tokens are those that were generated one at a time."""

    wasted: float = 0.25  # share of the prefetched bytes
    lost: float = 0.03  # of a token's time
    window: int = 24  # tokens between judgements
    probe: int = 12  # tokens without prefetch that it is compared with
    probe_every: int = 8  # windows between such probes
    rest: int = 96  # tokens of the first rest
    longest_rest: int = 6144
    strikes: int = 2  # bad windows in a row that stop it


@dataclass(frozen=True, slots=True)
class Window:
    """What was measured since the last judgement."""

    seconds: float  # of the median token
    loads: int  # begun on a guess
    used_bytes: int  # prefetched, and used before they left
    wasted_bytes: int  # prefetched, and gone without having been used

    @property
    def wasted(self) -> float:
        """Share of the bytes whose fate is known; 0 where there are none."""
        return self.wasted_bytes / max(1, self.used_bytes + self.wasted_bytes)


@dataclass(frozen=True, slots=True)
class State:
    """Where the machine stands. `left` is how many tokens there are until `judge` is to be asked."""

    mode: Mode
    left: int
    rest: int  # tokens that the next rest takes
    plain: float | None = None  # seconds of a token without prefetch
    bad: int = 0  # windows in a row
    windows: int = 0  # since the last probe
    reason: str = ""  # of the last rest

    @property
    def loading(self) -> bool:
        """Whether guesses may start loads."""
        return self.mode in LOADING


def start(limits: Limits) -> State:
    """At the beginning tokens are measured as they are."""
    return State(Mode.PLAIN, limits.probe, limits.rest)


def tick(state: State) -> State:
    """One token is over."""
    return replace(state, left=state.left - 1)


def judge(state: State, window: Window, limits: Limits) -> State:
    """The state after the `left` tokens that `window` is about."""
    if not state.loading:
        return replace(state, mode=_after_plain(state), left=limits.window, plain=window.seconds, bad=0, windows=0)
    fault = _fault(state, window, limits)
    if state.mode is Mode.TRIAL:
        return _rest(state, fault, limits) if fault else replace(state, mode=Mode.ON, left=limits.window, bad=0)
    bad = state.bad + 1 if fault else 0
    if bad >= limits.strikes:
        return _rest(state, fault, limits)
    calm = limits.rest if bad == 0 and state.windows >= limits.probe_every - 1 else state.rest
    if bad == 0 and state.windows + 1 >= limits.probe_every:
        return replace(state, mode=Mode.PLAIN, left=limits.probe, bad=0, windows=0, rest=calm)
    return replace(state, left=limits.window, bad=bad, windows=state.windows + 1, rest=calm)


def _after_plain(state: State) -> Mode:
    """A probe in between does not make what is running show a gain again."""
    return Mode.ON if state.mode is Mode.PLAIN and state.plain is not None else Mode.TRIAL


def _fault(state: State, window: Window, limits: Limits) -> str:
    """What is wrong with a window; empty where nothing is."""
    assert state.plain is not None, "tokens without prefetch are measured first"
    if not window.loads:
        return "nothing was worth loading on a guess"
    if window.wasted > limits.wasted:
        return f"{window.wasted:.0%} of the prefetched bytes were not used"
    allowed = 1.0 if state.mode is Mode.TRIAL else 1 + limits.lost
    if window.seconds > allowed * state.plain:
        return f"tokens take {window.seconds / state.plain:.2f} times as long as without prefetch"
    return ""


def _rest(state: State, reason: str, limits: Limits) -> State:
    longer = min(2 * state.rest, limits.longest_rest)
    return replace(state, mode=Mode.REST, left=state.rest, rest=longer, bad=0, windows=0, reason=reason)
