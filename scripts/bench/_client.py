"""A client of one node, as `moehive.swarm.join` sets it up, with its parts in reach of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from anyio.from_thread import BlockingPortal, start_blocking_portal

from moehive.node.demo.processes import NodeProcess
from moehive.protocol.ids import ModelId, PeerId
from moehive.protocol.ticket import Ticket
from moehive.swarm.dispatch.caller import CallSettings, ExpertCaller
from moehive.swarm.identity import Identity
from moehive.swarm.member import Member, is_genuine
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.hivemind import HivemindTransport


@contextmanager
def running_node(converted: Path, home: Path, *, threads: int, ram: str = "1GiB") -> Iterator[Ticket]:
    """A real node process that holds all experts of `converted`; its ticket."""
    options = ("--experts", "all", "--ram", ram, "--threads", str(threads))
    with NodeProcess("node", home, (str(converted), *options)) as node:
        yield node.wait_until_ready().ticket


@dataclass(frozen=True, slots=True)
class Client:
    """The event loop's thread (`portal`), and what lives on it."""

    portal: BlockingPortal
    transport: HivemindTransport
    member: Member
    caller: ExpertCaller
    node: PeerId  # the first that holds the model


@contextmanager
def joined(ticket: Ticket, converted: Path) -> Iterator[Client]:
    """Join the swarm of `ticket` and find who holds the model of `converted`."""
    model = ConvertedDirectory(converted).manifest.model_id
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal("asyncio"))
        transport = HivemindTransport(
            Identity.ephemeral(), bootstrap=ticket.peers, client_only=True, record_validator=is_genuine
        )
        stack.enter_context(portal.wrap_async_context_manager(transport))
        member = stack.enter_context(portal.wrap_async_context_manager(Member(transport, ticket.secret)))
        caller, node = portal.call(_make_caller, member, model)
        yield Client(portal, transport, member, caller, node)


async def _make_caller(member: Member, model: ModelId) -> tuple[ExpertCaller, PeerId]:
    directory = await member.wait_for_peers(model, timeout=30.0)
    caller = ExpertCaller(model, directory, member, member.standings, CallSettings())
    return caller, min(directory.holders.inventories)
