"""Nodes that misbehave on purpose: installed in a forked node's process before it runs (see `support.preforked`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

RETRY_AFTER = 0.2  # seconds for which one that refuses asks to be left alone


def install(fault: str) -> None:
    """Make this process' node commit `fault` for the rest of its life."""
    {"slow": _slow, "garbage": _garbage, "lie": _lie, "late": _late, "refuse": _refuse, "vanish": _vanish}[fault]()


def _slow() -> None:
    """Computes twenty times as long."""
    from moehive.node.compute import BatchRun

    honest = BatchRun.advance

    def advance(run: BatchRun) -> bool:
        started = time.perf_counter()
        over = honest(run)
        time.sleep(max(19 * (time.perf_counter() - started), 0.02))
        return over

    BatchRun.advance = advance  # type: ignore[method-assign]


def _garbage() -> None:
    """Answers with NaN."""
    _change_outputs(lambda tensor: tensor * float("nan"))


def _lie() -> None:
    """Answers with something plausible: a tenth too much."""
    _change_outputs(lambda tensor: tensor * 1.1)


def _change_outputs(change: Callable[[Any], Any]) -> None:
    from moehive.node.compute import BatchRun

    honest = BatchRun.outputs.fget
    assert honest is not None
    BatchRun.outputs = property(lambda run: [change(tensor) for tensor in honest(run)])  # type: ignore[method-assign, assignment]


def _late() -> None:
    """Answers a second and a half after it could have."""
    _before_answers(lambda: asyncio.sleep(1.5))


def _refuse() -> None:
    """Says that it is busy."""
    from moehive.protocol.errors import RefusalCode
    from moehive.swarm.rpc.server import Refusal

    async def refuse() -> None:
        raise Refusal(RefusalCode.BUSY, "on purpose", retry_after=RETRY_AFTER)

    _before_answers(refuse)


def _vanish() -> None:
    """Takes requests and never answers."""
    _before_answers(lambda: asyncio.Event().wait())


def _before_answers(first: Callable[[], Any]) -> None:
    from moehive.node.services import ExpertService

    honest = ExpertService._run

    async def run(service: ExpertService, *arguments: Any) -> None:
        await first()
        await honest(service, *arguments)

    ExpertService._run = run  # type: ignore[method-assign, assignment]
