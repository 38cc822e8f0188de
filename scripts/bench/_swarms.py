"""Swarms of real node processes that misbehave or die on purpose, as the tests start them, and text made with them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # nodes with faults

from support.generation import prompt
from support.processes import NodeProcess, Nodes, eventually

from moehive.node.demo import bundled_checkpoint
from moehive.protocol.ids import PeerId
from moehive.swarm.client import Swarm, join
from moehive.swarm.convert import convert
from moehive.swarm.dispatch.caller import CallSettings
from moehive.swarm.policy.speed import Speed

__all__ = ["Generated", "NodeProcess", "Nodes", "Text", "demo_text", "eventually", "loaded", "prefer"]


class _Clock(BaseStreamer):  # type: ignore[misc]
    """When each token came; calls `action` once, after token `at`."""

    def __init__(self, at: int, action: Callable[[], object]) -> None:
        self.times: list[float] = []
        self._at = at
        self._action = action

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then each token."""
        self.times.append(time.monotonic())
        if len(self.times) == self._at + 1:
            self._action()

    def end(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy tokens, and the seconds they took."""

    tokens: list[int]
    seconds: float
    waits: list[float]  # of each token
    ended: float  # on the monotonic clock


@dataclass(frozen=True, slots=True)
class Text:
    """A model, and the tokens that plain transformers gives for the same prompt in fp32."""

    converted: Path
    tokens: int
    wanted: list[int]

    def generate(self, model: Any, at: int = 0, action: Callable[[], object] = lambda: None) -> Generated:
        """The same text, as `model` continues it; `action` is called after token `at`."""
        return _generate(model, self.tokens, at, action)


def _generate(model: Any, tokens: int, at: int, action: Callable[[], object]) -> Generated:
    ids, clock = prompt(), _Clock(at, action)
    started = time.monotonic()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
    )
    ended = time.monotonic()
    waits = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return Generated(output[0, ids.shape[1] :].tolist(), ended - started, waits, ended)


def demo_text(directory: Path, tokens: int) -> Text:
    """The bundled demo model, converted."""
    with bundled_checkpoint() as source:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
        wanted = _generate(model, tokens, 0, lambda: None).tokens
        convert(source, directory / "demo")
    return Text(directory / "demo", tokens, wanted)


@contextmanager
def loaded(node: NodeProcess, cache: Path, settings: CallSettings, *, peers: int) -> Iterator[tuple[Swarm, Any, str]]:
    """A client of a node's swarm in which so many peers are known: the swarm, the model, and its id."""
    model_id = str(node.ready()["modelId"])
    with join(node.ticket, cache=cache, settings=settings) as swarm:
        model, _ = swarm.load(model_id, dtype=torch.float32)
        if not eventually(lambda: len(swarm.holders(model_id)) >= peers, timeout=30):
            raise TimeoutError(f"{len(swarm.holders(model_id))} of {peers} peers are known after 30 s")
        yield swarm, model, model_id


def prefer(swarm: Swarm, model_id: str, node: NodeProcess) -> None:
    """Make the planner believe that a node is the quickest."""
    swarm.stats(model_id).of(PeerId(node.peer)).speed = Speed(answers=1, network=1e-6)
