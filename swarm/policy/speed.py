"""How fast a peer answers, learned from its answers: what the planner expects of it, and when an answer is late.

An answer's time is taken apart: what the peer says it waited and computed, and the rest, which is the network's. What a
peer says can only move time between these parts: their sum is what we measured ourselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

UNKNOWN_NETWORK = 0.05  # seconds assumed of a peer that never answered: try it, but not before a known good one
_SMOOTHING = 0.2  # weight of the newest answer
_WINDOW = 64  # answers that the quantile of lateness is taken from
_FEW_ROWS = 4  # rows for each expert up to which reading the weights is what takes the time
_SMALL = 64 << 10  # bytes that no link spends noticeable time on
_FEW_ANSWERS = 8
_MIN_SECONDS = 1e-6
_MOST_SILENCES = 16  # that are counted


@dataclass(frozen=True, slots=True)
class Speed:
    """What we know of one peer. Times are seconds, smoothed."""

    answers: int = 0
    network: float = UNKNOWN_NETWORK  # there and back, without what depends on the number of bytes
    seconds_per_byte: float = 0.0
    waited: float = 0.0  # in its queue
    computed: float = 0.0  # a typical request
    per_expert: float = 0.0  # computing an expert for few rows
    per_row: float = 0.0  # computing a row where there are many
    silences: int = 0  # requests that were given up since the last answer
    late: tuple[float, ...] = ()  # measured over expected time of the last answers, oldest first


def after_answer(
    speed: Speed, *, elapsed: float, waited: float, computed: float, experts: int, rows: int, sent: int
) -> Speed:
    """What an answer after `elapsed` seconds tells; `sent` counts the bytes of request and answer."""
    claimed = waited + computed
    if claimed > elapsed:  # a peer cannot have worked longer than we waited
        waited, computed = waited * elapsed / claimed, computed * elapsed / claimed
    expected = max(expected_seconds(speed, experts=experts, rows=rows, sent=sent), _MIN_SECONDS)
    network, per_byte = _network(speed, max(elapsed - waited - computed, _MIN_SECONDS), sent)
    few = rows <= _FEW_ROWS * experts
    return replace(
        speed,
        answers=speed.answers + 1,
        network=network,
        seconds_per_byte=per_byte,
        waited=_smooth(speed, speed.waited, waited),
        computed=_smooth(speed, speed.computed, computed),
        per_expert=_learn(speed.per_expert, computed / experts) if few else speed.per_expert,
        per_row=speed.per_row if few else _learn(speed.per_row, max(computed - experts * speed.per_expert, 0.0) / rows),
        silences=0,
        late=(*speed.late[-_WINDOW + 1 :], elapsed / expected) if speed.answers else (),
    )


def after_silence(speed: Speed, *, elapsed: float, experts: int, rows: int) -> Speed:
    """What no answer for `elapsed` seconds tells: the peer's queue is at least so much longer than was expected.

    One such moment counts little; in a row each counts twice as much as the one before, until all of it is believed:
    a peer that never answers must not be preferred for longer than others can be asked instead.
    """
    excess = elapsed - expected_seconds(speed, experts=experts, rows=rows)
    weight = min(_SMOOTHING * 2.0**speed.silences, 1.0)
    waited = speed.waited + weight * max(excess, 0.0)
    return replace(speed, waited=waited, silences=min(speed.silences + 1, _MOST_SILENCES))


def after_probe(speed: Speed, *, elapsed: float, expected_wait: float) -> Speed:
    """What a small question tells that was answered after `elapsed` seconds: the round trip, and the queue as it is."""
    network = min(speed.network, elapsed) if speed.answers else elapsed
    return replace(speed, answers=max(speed.answers, 1), network=network, waited=expected_wait)


def expected_seconds(speed: Speed, *, experts: int, rows: int, sent: int = 0, in_flight: int = 0) -> float:
    """Seconds until the answer to `rows` rows of `experts` experts, behind `in_flight` requests of our own."""
    computing = experts * speed.per_expert + (rows * speed.per_row if rows > _FEW_ROWS * experts else 0.0)
    return speed.network + sent * speed.seconds_per_byte + speed.waited + in_flight * speed.computed + computing


def lateness(speed: Speed, share: float = 0.95) -> float:
    """The factor over the expected time that `share` of the last answers kept; 1 or more, 2 while little is known."""
    if len(speed.late) < _FEW_ANSWERS:  # the largest of a few says nothing
        return 2.0
    ordered = sorted(speed.late)
    return max(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1.0)


def _network(speed: Speed, seconds: float, sent: int) -> tuple[float, float]:
    """Smoothed seconds without, and per byte: small messages tell the one, large ones the other."""
    if sent <= _SMALL or not speed.answers:
        return _smooth(speed, speed.network, seconds), speed.seconds_per_byte
    per_byte = max(seconds - speed.network, 0.0) / sent
    return min(speed.network, seconds), _learn(speed.seconds_per_byte, per_byte)


def _smooth(speed: Speed, known: float, measured: float) -> float:
    return known + _SMOOTHING * (measured - known) if speed.answers else measured


def _learn(known: float, measured: float) -> float:
    return known + _SMOOTHING * (measured - known) if known else measured
