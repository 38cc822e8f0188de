"""The join ticket: one line of text that lets a peer into a private swarm.

It carries the swarm's secret and addresses of members. Whoever has it is a member; there is no other way in and no
public swarm to fall back to. Text form: `moehive1` and base32 of a checksum and a msgpack map.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

import msgpack
from blake3 import blake3

from . import limits
from .codec import blob, integer, texts, unpack_map
from .errors import ProtocolViolation, TicketError

PREFIX = "moehive1"
SECRET_BYTES = 32
_CHECKSUM_BYTES = 4
_CHECKS = {
    "v": integer(1, 1),
    "secret": blob(SECRET_BYTES, SECRET_BYTES),
    "peers": texts(limits.MAX_ADDRESS_CHARS, limits.MAX_TICKET_PEERS),
}


@dataclass(frozen=True, slots=True)
class Ticket:
    """Membership of one swarm."""

    secret: bytes = field(repr=False)  # 32 bytes: keep it like a password
    peers: tuple[str, ...]  # multiaddrs, each ending in /p2p/<peer id>

    def __str__(self) -> str:
        body = msgpack.packb({"v": 1, "secret": self.secret, "peers": list(self.peers)}, use_bin_type=True)
        text = base64.b32encode(_checksum(body) + body).decode().rstrip("=").lower()
        return PREFIX + text

    @classmethod
    def parse(cls, text: str) -> Ticket:
        """Read a ticket; surrounding white space is ignored. Raises TicketError."""
        text = text.strip()
        if not text.startswith(PREFIX) or len(text) > limits.MAX_TICKET_CHARS:
            raise TicketError(
                f"a join ticket starts with {PREFIX!r} and is one line; copy it whole from `moehive node`"
            )
        data = _unbase32(text[len(PREFIX) :])
        checksum, body = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
        if checksum != _checksum(body):
            raise TicketError("the join ticket is incomplete or mistyped (its checksum is wrong); copy it again")
        try:
            fields = unpack_map(body, limits.MAX_TICKET_CHARS)
            if fields.keys() != _CHECKS.keys():
                raise TicketError("the join ticket is of a version that this build does not know; upgrade moehive")
            values = {name: check(fields[name]) for name, check in _CHECKS.items()}
        except (ProtocolViolation, ValueError) as error:
            raise TicketError(f"the join ticket cannot be read: {error}") from error
        return cls(values["secret"], values["peers"])


def _checksum(body: bytes) -> bytes:
    return blake3(body, derive_key_context="moehive 2026 ticket checksum").digest(length=_CHECKSUM_BYTES)


def _unbase32(text: str) -> bytes:
    try:
        return base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except ValueError as error:  # binascii.Error, and plain ValueError for characters outside ASCII
        raise TicketError("the join ticket has characters that do not belong there; copy it again") from error
