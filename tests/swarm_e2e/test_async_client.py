"""The client for event loops, in a swarm of real nodes: the same text, in pieces, and an end whenever it is wanted."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from support.checkpoints import Checkpoints
from support.processes import NodeProcess, Nodes

from moehive.protocol.errors import ConfigError, ExpertUnavailable
from moehive.protocol.ids import ExpertKey
from moehive.swarm import AsyncSwarm, join_async, load_expert
from moehive.swarm.dispatch.caller import CallSettings
from moehive.swarm.loading import open_local
from moehive.swarm.text.generation import continue_text
from moehive.swarm.text.sampling import Sampling

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"
TOKENS = 24
PROMPT = "What light is this?"
SETTINGS = CallSettings(answer_timeout=5.0, layer_timeout=5.0)


@pytest.fixture
def node(nodes: Nodes, checkpoints: Checkpoints) -> NodeProcess:
    (one,) = nodes.swarm(checkpoints.converted(FAMILY), "*:*")
    return one


async def text_of(swarm: AsyncSwarm, model: object, tokenizer: object, prompt: object = PROMPT) -> str:
    pieces = swarm.stream(model, tokenizer, prompt, max_tokens=TOKENS, temperature=0)  # type: ignore[arg-type]
    return "".join([piece async for piece in pieces])


async def test_streams_have_the_text_of_the_command_line_also_several_at_once(
    node: NodeProcess, checkpoints: Checkpoints, cache: Path
) -> None:
    local = open_local(checkpoints.converted(FAMILY), dtype=torch.float32)
    sampling = Sampling(TOKENS, 0, temperature=0)
    text, chat = (continue_text(*local, PROMPT, sampling, lambda _: None, chat=chat).text for chat in (False, True))
    async with join_async(node.ticket, cache=cache, settings=SETTINGS) as swarm:
        loaded = await swarm.load(node.ready()["modelId"], dtype=torch.float32)
        messages = [{"role": "user", "content": PROMPT}]
        assert await asyncio.gather(*(text_of(swarm, *loaded), text_of(swarm, *loaded, messages))) == [text, chat]
        stop = text[len(text) // 2 :][:3]
        stopped = swarm.stream(*loaded, PROMPT, max_tokens=TOKENS, temperature=0, stop=[stop])
        assert "".join([piece async for piece in stopped]) == text[: text.index(stop)]


async def test_who_leaves_early_ends_the_generation(node: NodeProcess, cache: Path) -> None:
    async with join_async(node.ticket, cache=cache, settings=SETTINGS) as swarm:
        model_id = node.ready()["modelId"]
        loaded = await swarm.load(model_id, dtype=torch.float32)
        async with aclosing(swarm.stream(*loaded, PROMPT, max_tokens=2000, temperature=0)) as pieces:
            async for _ in pieces:
                break
        passes = swarm.swarm.stats(model_id).passes
        assert 0 < passes < 2000
        reading = asyncio.create_task(text_of(swarm, *loaded))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        passes = swarm.swarm.stats(model_id).passes
        await text_of(swarm, *loaded)
        assert swarm.swarm.stats(model_id).passes == passes + TOKENS  # nothing else was under way


async def test_the_rest_of_the_client(node: NodeProcess, checkpoints: Checkpoints, cache: Path) -> None:
    async with join_async(node.ticket, cache=cache, settings=SETTINGS) as swarm:
        model_id = node.ready()["modelId"]
        assert set(await swarm.holders(model_id)) == {node.peer}
        assert (await swarm.coverage(model_id))[ExpertKey(0, 1)] == (node.peer,)
        fetched = await swarm.load_expert(model_id, 0, 1)
        own = load_expert(checkpoints.converted(FAMILY), 0, 1)
        assert all(torch.equal(fetched[name], tensor) for name, tensor in own.items())


async def test_what_goes_wrong_is_raised_where_it_is_waited_for(node: NodeProcess, cache: Path) -> None:
    async with join_async(node.ticket, cache=cache, settings=SETTINGS) as swarm:
        model, tokenizer = await swarm.load(node.ready()["modelId"], dtype=torch.float32)
        with pytest.raises(ConfigError, match="no tokenizer"):
            await text_of(swarm, model, None)
        with pytest.raises(ConfigError, match="top-k means nothing with temperature 0"):
            await anext(swarm.stream(model, tokenizer, PROMPT, temperature=0, top_k=3))
        node.kill()
        with pytest.raises(ExpertUnavailable):
            await text_of(swarm, model, tokenizer)
