"""The links that tests and benchmarks put between processes are as slow as they say, and can be cut."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from support.links import Link

pytestmark = pytest.mark.swarm


@contextmanager
def echo(port: int) -> Iterator[None]:
    """A server that sends back what it gets."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                one, _ = listener.accept()
                threading.Thread(target=answer, args=(one,), daemon=True).start()

    def answer(one: socket.socket) -> None:
        with one, suppress(OSError):
            while data := one.recv(1 << 16):
                one.sendall(data)

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def dial(link: Link) -> socket.socket:
    connected = socket.create_connection(("127.0.0.1", link.near), timeout=20)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def there_and_back(one: socket.socket, data: bytes) -> float:
    def send() -> None:
        with suppress(OSError):  # a link that is cut shows at the receiving end
            one.sendall(data)

    started = time.monotonic()
    sender = threading.Thread(target=send)
    sender.start()
    received = bytearray()
    while len(received) < len(data):
        piece = one.recv(1 << 16)
        assert piece, "the connection ended"
        received += piece
    sender.join()
    assert bytes(received) == data
    return time.monotonic() - started


def test_a_link_takes_its_time_and_no_byte_is_lost() -> None:
    with Link(rtt=0.020, rate=5e6) as link, echo(link.far), dial(link) as one:
        assert min(there_and_back(one, b"x") for _ in range(5)) >= 0.020
        data = bytes(range(256)) * 4096  # 1 MiB: 0.21 s each way, the ways at the same time
        assert there_and_back(one, data) >= 0.020 + len(data) / 5e6
        with dial(link) as other:  # connections share the link
            both = [threading.Thread(target=there_and_back, args=(each, data)) for each in (one, other)]
            started = time.monotonic()
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()
            assert time.monotonic() - started >= 2 * len(data) / 5e6


def test_bytes_keep_their_order_when_the_delay_changes() -> None:
    data = b"".join(number.to_bytes(4, "big") for number in range(1 << 18))
    with Link(rate=50e6) as link, echo(link.far), dial(link) as one:
        over = threading.Event()

        def change() -> None:
            while not over.wait(0.001):
                link.delay(0.004 - link.rtt)

        changing = threading.Thread(target=change)
        changing.start()
        for _ in range(3):
            there_and_back(one, data)
        over.set()
        changing.join()


def test_the_delay_can_be_changed_under_an_open_connection() -> None:
    with Link() as link, echo(link.far), dial(link) as one:
        there_and_back(one, b"x")
        link.delay(0.060)
        assert min(there_and_back(one, b"x") for _ in range(3)) >= 0.060
        link.delay(0.0)
        while there_and_back(one, b"x") >= 0.060:  # a busy machine delays, too, but not each of them so long
            pass


def test_a_link_can_be_cut_and_healed() -> None:
    with Link() as link, echo(link.far), dial(link) as one:
        there_and_back(one, b"x")
        link.cut()
        with suppress(OSError):
            assert one.recv(1) == b""
        with pytest.raises((OSError, AssertionError)), dial(link) as refused:
            there_and_back(refused, b"x")
        link.heal()
        with dial(link) as again:
            there_and_back(again, b"x")
