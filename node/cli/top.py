"""`moehive top`: what the nodes of this machine are doing, again and again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from moehive.protocol.units import format_size
from moehive.swarm.paths import Paths

from .arguments import Flag
from .errors import FAILED
from .output import facts, note, say, say_json, table

_CLEAR = "\x1b[H\x1b[J"  # to the upper left, and clear from there: no flicker
_MOST_LAYERS = 12
_SILENT = 5.0  # seconds without a new file
Status = Mapping[str, Any]
Seconds = Annotated[float, Parameter(validator=validators.Number(gte=0.2))]


def top(*, once: Flag = False, json: Flag = False, every: Seconds = 1.0) -> int | None:
    """Watch the nodes that run on this machine: experts in memory, latencies, bytes moved, requests, peers, transfers.

    It goes on until Ctrl-C. Exit code 1 if no node runs. Nodes write what it shows to a file that only you can read;
    nodes of another MOEHIVE_HOME are seen with that one set.

    Parameters
    ----------
    once:
        Show the state once and end. Rates are then those since each node's start.
    json:
        Print one JSON object, once.
    every:
        Seconds between two looks.
    """
    from moehive.node.status import read_statuses

    directory = Paths.of(os.environ).nodes
    if json or once or not sys.stdout.isatty():
        statuses = list(read_statuses(directory))
        if json:
            say_json({"nodes": statuses}, indent=2)
        elif statuses:
            say(describe(statuses, {}, time.time()))
        else:
            note(_nobody(directory))
        return None if statuses else FAILED
    _watch(directory, every)
    return None


def _watch(directory: Path, every: float) -> None:
    from moehive.node.status import read_statuses

    before: dict[str, Status] = {}  # each node's state before its latest one
    latest: dict[str, Status] = {}
    with suppress(KeyboardInterrupt):
        while True:
            statuses = list(read_statuses(directory))
            for status in statuses:
                known = latest.get(status["peer"])
                if known is None or known["updated"] != status["updated"]:
                    before |= {} if known is None else {status["peer"]: known}
                    latest[status["peer"]] = status
            text = describe(statuses, before, time.time()) if statuses else _nobody(directory)
            say(f"{_CLEAR}{text}\n\n  Ctrl-C ends this")
            time.sleep(every)


def _nobody(directory: Path) -> str:
    return f"no node runs here (none has written to {directory} and lives): moehive node DIR"


# --- what it prints -------------------------------------------------------------------------------------------------


def describe(statuses: Sequence[Status], before: Mapping[str, Status], now: float) -> str:
    """For people. `before` has earlier states by peer; without one, rates are since the node's start."""
    return "\n\n".join(_node(status, before.get(status["peer"]), now) for status in statuses)


def _node(status: Status, before: Status | None, now: float) -> str:
    experts, requests, transfers = status["experts"], status["requests"], status["transfers"]
    tiers = {tier["tier"]: tier for tier in experts["tiers"]}
    ram, disk = tiers["ram"], tiers["disk"]
    silent, up = now - status["updated"], _duration(now - status["started"])
    rate = _Rates(status, before)
    lines: list[tuple[str, object]] = [
        ("node", f"{status['peer']}, {status['phase']}, process {status['pid']}, up {up}"),
        *([("dashboard", status["http"])] if status["http"] else []),
        ("model", f"{status['modelName']}: holds {status['expertsHeld']} of {status['expertsTotal']} experts"),
        *([(status["device"], _device(tiers["vram"], rate))] if "vram" in tiers else []),
        (
            "memory",
            f"{_share(ram['hits'], ram['misses'])} of {ram['hits'] + ram['misses']:,} uses, "
            f"{_share(experts['layerCallsWithoutMiss'], experts['layerCalls'] - experts['layerCallsWithoutMiss'])} of "
            f"layer calls missed none; {format_size(ram['residentBytes'])} of {format_size(ram['budgetBytes'])}",
        ),
        *([("as stored", _stored(tiers["ram-stored"]))] if "ram-stored" in tiers else []),
        (
            "disk",
            f"{disk['hits']:,} loads, {format_size(disk['movedBytes'])}, "
            f"{rate.of_bytes('experts', 'tiers', -1, 'movedBytes')}; {_latency(disk['latency'])}",
        ),
        (
            "requests",
            f"{requests['done']:,} answered, {rate.of('requests', 'done'):.1f}/s, {requests['rows']:,} rows, "
            f"{requests['waiting']} wait; {_latency(requests['latency'])}",
        ),
        ("peers", f"{status['peers']['known']} announce this model, {status['peers']['asking']} ask this node now"),
        (
            "sent",
            f"{format_size(transfers['sentBytes'])}, {rate.of_bytes('transfers', 'sentBytes')}; "
            f"{transfers['uploads']} uploads, {transfers['uploadsWaiting']} wait",
        ),
        (
            "received",
            f"{format_size(transfers['receivedBytes'])}, {rate.of_bytes('transfers', 'receivedBytes')}; "
            f"from {len(transfers['downloading'])} peers now",
        ),
    ]
    if silent > _SILENT:
        lines.insert(1, ("silent", f"for {_duration(silent)}: is the machine overloaded?"))
    layers = _layers(experts["layers"])
    return "\n".join((facts(lines), *([layers] if layers else [])))


def _device(vram: Mapping[str, Any], rate: _Rates) -> str:
    """The tier in an accelerator's memory."""
    uses = f"{_share(vram['hits'], vram['misses'])} of {vram['hits'] + vram['misses']:,} uses"
    room = f"{format_size(vram['residentBytes'])} of {format_size(vram['budgetBytes'])}"
    moved = f"{format_size(vram['movedBytes'])} uploaded, {rate.of_bytes('experts', 'tiers', 0, 'movedBytes')}"
    return f"{uses}; {room}; {moved}; {_latency(vram['latency'])}"


def _stored(tier: Mapping[str, Any]) -> str:
    """The part of RAM that holds experts as they are stored."""
    room = f"{format_size(tier['residentBytes'])} of {format_size(tier['budgetBytes'])}"
    return f"{_share(tier['hits'], tier['misses'])} of {tier['hits'] + tier['misses']:,} that memory missed; {room}"


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    """Those that missed most."""
    worst = sorted((one for one in layers if one["misses"]), key=lambda one: -one["misses"])[:_MOST_LAYERS]
    rows = [
        (
            one["layer"],
            _share(one["hits"], one["misses"]),
            _share(one["callsWithoutMiss"], one["calls"] - one["callsWithoutMiss"]),
            format_size(one["movedBytes"]),
            _seconds(one["latency"]["p50"]),
            _seconds(one["latency"]["p99"]),
        )
        for one in sorted(worst, key=lambda one: one["layer"])
    ]
    return table(("layer", "hits", "calls without a miss", "loaded", "p50", "p99"), rows) if rows else ""


class _Rates:
    """Differences per second between two states."""

    def __init__(self, now: Status, before: Status | None) -> None:
        self._now = now
        self._before = before
        since = now["started"] if before is None else before["updated"]
        self._seconds: float = max(now["updated"] - since, 1e-3)

    def of(self, *path: str | int) -> float:
        """Of the counter at `path`."""
        earlier = 0 if self._before is None else _at(self._before, path)
        return max(0.0, (_at(self._now, path) - earlier) / self._seconds)

    def of_bytes(self, *path: str | int) -> str:
        """The same, as text."""
        return f"{format_size(round(self.of(*path)))}/s"


def _at(status: Status, path: Sequence[str | int]) -> float:
    value: Any = status
    for step in path:
        value = value[step]
    return float(value)


def _share(part: int, other: int) -> str:
    return f"{part / (part + other):.1%}" if part + other else "-"


def _latency(latency: Mapping[str, Any]) -> str:
    return f"p50 {_seconds(latency['p50'])}, p99 {_seconds(latency['p99'])}" if latency["count"] else "no latency yet"


def _seconds(seconds: float) -> str:
    from moehive.swarm.telemetry.report import seconds_text

    return seconds_text(seconds) if seconds else "-"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
