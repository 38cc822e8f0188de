"""`moehive demo`: the whole road on one machine, with real processes, and the proof that nothing was approximated."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moehive.node.demo import bundled_checkpoint
from moehive.node.demo.interrupts import Interrupts
from moehive.node.demo.processes import NodeGroup, NodeProcess, RunningNode
from moehive.node.demo.shares import share_experts, spec_of
from moehive.protocol.units import format_size

from .arguments import Flag, Positive
from .errors import FAILED
from .loading import quiet_libraries
from .output import counted, progress_bar, say, table

if TYPE_CHECKING:
    from moehive.node.text.generation import Generated
    from moehive.node.text.sampling import Sampling
    from moehive.protocol.manifest import Manifest
    from moehive.swarm.dispatch.stats import DispatchStats

_ANSWERS: Final = "rows"  # equal to transformers bit for bit, also where tokens are sampled
_NEXT = """  everything is stopped and removed again

With a model of your own: {command} convert CHECKPOINT DIR, then {command} node DIR. More: {command} --help"""


def _command() -> str:
    """What to type for this program: its path where the shell would not find it."""
    return "moehive" if shutil.which("moehive") else str(Path(sys.executable).with_name("moehive"))


def demo(
    *, nodes: Positive = 3, prompt: str = "ROMEO:", max_tokens: Positive = 120, seed: int = 0, keep: Flag = False
) -> int | None:
    """Start a swarm on this machine, generate text with it, and show who computed how much.

    Converts a small bundled model that writes like Shakespeare, starts node processes that each hold a part of its
    experts, joins them as a client that holds none, and compares the text with what plain transformers generates from
    the original checkpoint. Everything is stopped and removed afterwards. Exit code 1 if the texts differ.

    Parameters
    ----------
    nodes:
        How many nodes to start.
    prompt:
        The text to continue.
    max_tokens:
        How many tokens to generate.
    seed:
        Another seed gives another text.
    keep:
        Leave the converted model and the nodes' logs where they are, and say where.
    """
    with Interrupts() as interrupts, ExitStack() as stack:
        checkpoint = stack.enter_context(bundled_checkpoint())
        with interrupts.held():
            directory = stack.enter_context(_working_directory(keep=keep))
        manifest = _convert(checkpoint, directory / "model")
        shares = share_experts(manifest.model.num_experts, nodes)
        say(f"[2/4] Starting {nodes} node(s), each a process with some of the experts")
        with NodeGroup(directory, directory / "model", interrupts.held) as group:
            group.start(spec_of(shares[0]), None)
            # While the first node starts: torch and transformers take seconds here, too.
            reference, sampling = _generate_plainly(checkpoint, prompt, max_tokens, seed)
            running = _start_others(group, shares)
            result, stats = _generate_in_swarm(running[0], manifest, directory, prompt, sampling)
        same = result.tokens == reference.tokens
        say(f"\n{_report(group.nodes, running, result, stats)}\n{_verdict(same, result, reference)}")
        say(
            f"  the logs of the nodes and the converted model are in {directory}"
            if keep
            else _NEXT.format(command=_command())
        )
    return None if same else FAILED


# --- steps ----------------------------------------------------------------------------------------------------------


def _convert(checkpoint: Path, destination: Path) -> Manifest:
    from moehive.swarm.convert import convert

    started = time.monotonic()
    with progress_bar("converting") as move:
        manifest = convert(checkpoint, destination, name="demo", progress=lambda done, total, _: move(done, total))
    size = format_size(sum(shard.size for shard in manifest.shards))
    model = manifest.model
    say(
        f"[1/4] Converted the demo model in {time.monotonic() - started:.1f} s: {len(manifest.experts)} experts in "
        f"{len(model.moe_layers)} layers, one file each, {size}"
    )
    return manifest


def _start_others(group: NodeGroup, shares: Sequence[tuple[int, ...]]) -> list[RunningNode]:
    """Start a node for each of the other shares; wait until all are ready."""
    from moehive.swarm.transport.engine import import_hivemind

    (first,) = group.nodes
    running = [first.wait_until_ready()]
    _say_node(first, running[0])
    others = [group.start(spec_of(share), running[0].ticket) for share in shares[1:]]
    import_hivemind()  # takes seconds, which the nodes need anyway
    for node in others:
        running.append(node.wait_until_ready())
        _say_node(node, running[-1])
    return running


def _say_node(node: NodeProcess, said: RunningNode) -> None:
    say(f"      {node.name}  {said.peer}  holds {said.held} of {said.experts} experts")


def _generate_plainly(checkpoint: Path, prompt: str, max_tokens: int, seed: int) -> tuple[Generated, Sampling]:
    """What transformers makes of the original checkpoint, with nothing of ours in between."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moehive.node.text.generation import continue_text
    from moehive.node.text.sampling import Sampling

    quiet_libraries()
    torch.set_num_threads(1)  # as the nodes: they share these cores, and one thread adds in a fixed order
    sampling = Sampling(max_tokens, seed)  # otherwise as the model's generation_config.json recommends
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return continue_text(model, tokenizer, prompt, sampling, lambda text: None), sampling


def _generate_in_swarm(
    node: RunningNode, manifest: Manifest, directory: Path, prompt: str, sampling: Sampling
) -> tuple[Generated, DispatchStats]:
    import torch

    from moehive.node.text.generation import continue_text
    from moehive.swarm.client import join

    say("[3/4] Joining them as a client that holds no expert; the dense part comes from a node")
    with join(node.ticket, cache=directory / "client") as swarm:
        model, tokenizer = swarm.load(manifest.model_id, dtype=torch.float32, answers=_ANSWERS)
        say(f"[4/4] Generating {sampling.max_tokens} tokens\n\n{prompt}", end="")
        result = continue_text(model, tokenizer, prompt, sampling, partial(say, end=""))
        say()
        return result, swarm.stats(manifest.model_id)


# --- what it prints -------------------------------------------------------------------------------------------------


def _report(
    nodes: Sequence[NodeProcess], running: Sequence[RunningNode], result: Generated, stats: DispatchStats
) -> str:
    total = sum(peer.rows for peer in stats.peers.values()) + stats.local_rows
    rows = [
        (
            node.name,
            f"…{said.peer[-8:]}",
            said.held,
            f"{stats.of(said.peer).rows:,}",
            f"{100 * stats.of(said.peer).rows / total:.0f} %",
            f"{stats.of(said.peer).latency * 1e3:.1f}" if stats.of(said.peer).requests else "-",
        )
        for node, said in zip(nodes, running, strict=True)
    ]
    here = ("this client", "", 0, f"{stats.local_rows:,}", f"{100 * stats.local_rows / total:.0f} %", "")
    header = ("", "peer", "experts held", "rows computed", "share", "latency ms")
    return "\n".join((table(header, [*rows, here]), "  a row is one token through one expert"))


def _verdict(same: bool, result: Generated, reference: Generated) -> str:
    speed = (
        f"  {counted(len(result.tokens), 'token')} in {result.seconds:.1f} s: {result.tokens_per_second:.1f} tokens/s "
        f"(transformers alone, nothing sent: {reference.tokens_per_second:.1f})"
    )
    equal = sum(1 for ours, theirs in zip(result.tokens, reference.tokens, strict=False) if ours == theirs)
    answer = "yes" if same else f"NO, {equal} of {len(reference.tokens)} agree"
    return f"{speed}\n  same tokens as plain transformers: {answer}"


# --- surroundings ---------------------------------------------------------------------------------------------------


@contextmanager
def _working_directory(*, keep: bool) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="moehive-demo-"))
    try:
        yield directory
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
