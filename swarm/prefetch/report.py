"""What prefetch was worth, for programs and for people after a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moehive.protocol.units import format_size

if TYPE_CHECKING:
    from .measure import Usefulness  # needs numpy, which the command line does not start with


def usefulness_json(found: Usefulness) -> dict[str, Any]:
    """Seconds and bytes; a point without guesses is left out."""
    return {
        "loads": found.loads,
        "usedBytes": found.used_bytes,
        "wastedBytes": found.wasted_bytes,
        "wastedShare": round(found.wasted, 4),
        "hiddenSeconds": round(found.hidden_seconds, 4),
        "switchedOff": found.switched_off,
        "failedGuesses": found.failed_guesses,
        "points": [
            {
                "guessed": point.name.lower(),
                "guesses": counts.guesses,
                "recallAtK": round(counts.recall_at_k, 4),
                "recallAtWidth": round(counts.recall_at_width, 4),
                "precision": round(counts.precision, 4),
                "width": round(counts.width, 3),
                "leadSeconds": round(counts.lead, 7),
            }
            for point, counts in found.points.items()
            if counts.guesses
        ],
    }


def usefulness_lines(found: Usefulness) -> list[str]:
    """Nothing where nothing was guessed."""
    guessed = [(point, counts) for point, counts in found.points.items() if counts.guesses]
    if not guessed:
        return [f"prefetch: {found.failed_guesses} guess failed, which ended it"] * bool(found.failed_guesses)
    line = f"prefetch: {found.loads:,} loads on guesses"
    if found.used_bytes + found.wasted_bytes:
        moved, wasted = format_size(found.used_bytes), format_size(found.wasted_bytes)
        line += f", {moved} used, {wasted} ({found.wasted:.0%}) wasted; {found.hidden_seconds:.2f} s of loading hidden"
    if found.switched_off:
        line += f"; switched off {found.switched_off} times, because it did not pay"
    return [line] + [
        f"  at {point.name.lower()}: recall at k {counts.recall_at_k:.1%}, at width {counts.width:.1f} "
        f"{counts.recall_at_width:.1%}, precision {counts.precision:.1%}"
        for point, counts in guessed
    ]
