"""Join tickets: read back as written, and a mistake in copying is always a TicketError."""

from __future__ import annotations

import base64
from typing import Any

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from support.wire import SECRET, peak_bytes, peer, printable

from moehive.protocol import limits
from moehive.protocol.errors import TicketError
from moehive.protocol.ticket import Ticket

BODY: dict[str, Any] = {"v": 1, "secret": SECRET, "peers": ["/ip4/127.0.0.1/tcp/1"]}
TICKET = Ticket(SECRET, (f"/ip4/10.0.0.1/tcp/4001/p2p/{peer(1)}",))
tickets = st.builds(
    Ticket, st.binary(min_size=32, max_size=32), st.lists(printable(60), max_size=limits.MAX_TICKET_PEERS).map(tuple)
)


def written(body: bytes) -> str:
    """A ticket around any body, with the right checksum, written without the code under test."""
    checksum = blake3(body, derive_key_context="moehive 2026 ticket checksum").digest(length=4)
    return "moehive1" + base64.b32encode(checksum + body).decode().rstrip("=").lower()


@given(tickets, st.text(" \t\r\n", max_size=4), st.text(" \t\r\n", max_size=4))
def test_round_trip(ticket: Ticket, before: str, after: str) -> None:
    assert Ticket.parse(before + str(ticket) + after) == ticket


def test_the_longest_ticket_can_be_read() -> None:
    longest = Ticket(SECRET, ("a" * limits.MAX_ADDRESS_CHARS,) * limits.MAX_TICKET_PEERS)
    assert Ticket.parse(str(longest)) == longest


def test_it_is_one_word() -> None:
    text = str(TICKET)
    assert text.isascii()
    assert text.isalnum()
    assert text == text.lower()


@given(st.text(max_size=80))
def test_any_text_is_a_ticket_or_a_ticket_error(text: str) -> None:
    for candidate in (text, "moehive1" + text):
        with pytest.raises(TicketError):
            Ticket.parse(candidate)


@given(st.data())
def test_every_mistyped_character_is_noticed(data: st.DataObject) -> None:
    text = str(TICKET)
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567189-=é ").filter(lambda c: c != text[place]))
    try:
        assert Ticket.parse(text[:place] + other + text[place + 1 :]) == TICKET  # only spare bits of the last character
        assert place == len(text) - 1
    except TicketError:
        pass


@given(st.data())
def test_every_lost_tail_is_noticed(data: st.DataObject) -> None:
    text = str(TICKET)
    with pytest.raises(TicketError):
        Ticket.parse(text[: data.draw(st.integers(0, len(text) - 1))])


@given(st.binary(max_size=100))
def test_random_bytes_behind_a_right_checksum(body: bytes) -> None:
    with pytest.raises(TicketError):
        Ticket.parse(written(body))


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": True},
        {"secret": bytes(31)},
        {"secret": "x" * 32},
        {"peers": "x"},
        {"peers": [1]},
        {"peers": ["\x1b[2J"]},
        {"peers": ["x"] * (limits.MAX_TICKET_PEERS + 1)},
        {"peers": ["x" * (limits.MAX_ADDRESS_CHARS + 1)]},
        {"new": 1},
    ],
)
def test_wrong_fields(changes: dict[str, Any]) -> None:
    assert Ticket.parse(written(msgpack.packb(BODY))).secret == SECRET
    with pytest.raises(TicketError):
        Ticket.parse(written(msgpack.packb(BODY | changes)))


@pytest.mark.parametrize("text", ["moehive1é", "moehive1" + "٣" * 8, "moehive1a\nb", "moehive1", "moehive2abc", ""])
def test_odd_texts(text: str) -> None:
    with pytest.raises(TicketError):
        Ticket.parse(text)


def test_a_huge_text_is_refused_unread() -> None:
    text = "moehive1" + "a" * 1_000_000

    def attack() -> None:
        with pytest.raises(TicketError):
            Ticket.parse(text)

    assert peak_bytes(attack) < 100_000


def test_repr_and_errors_do_not_show_the_secret() -> None:
    assert "secret" not in repr(TICKET)
    with pytest.raises(TicketError) as caught:
        Ticket.parse(str(TICKET)[:-3])
    assert str(TICKET)[8:30] not in str(caught.value)
