"""Links between real processes on one machine: a relay in the path that delays and paces what passes it.

    with Link(rtt=0.020, rate=12.5e6) as link:                       # 20 ms, 100 Mbit/s each way
        node = nodes.start(model, *link.options, ...)                # the node listens behind the link
        link.reaches(node)

With `direct`, the node's direct connections go over the same link: they are announced with the node's own port, so the
relay has an address of its own. Otherwise the node takes none. The relay is a process of its own, this file as a
program: spawned by multiprocessing it would import its parent's main module, and torch with it. Connections share the
link: what one sends, the other waits for. It delays with threads that sleep, because an event loop's timers are only
good to a millisecond. What is on its way is bounded by what a link of that rate and delay holds, and a queue of a fifth
of a second before it, after which the sender is held up.
"""

from __future__ import annotations

import json
import os
import queue
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from support.ports import free_port

PIECE = 16 << 10  # bytes that are paced as one
_QUEUE_SECONDS = 0.2
_AT_ONCE = 1e-4  # seconds: less is not waited for, sleeping takes longer than that by as much
_TIMEOUT = 30.0
_TESTS = Path(__file__).parents[1]
_NODE = "127.0.0.1"  # where a node behind a link listens
_DIRECT_RELAY = "127.0.0.2"  # where the relay does, if the ports have to be the same


@dataclass
class _Direction:
    """One way of the link."""

    delay: float  # seconds
    rate: float  # bytes per second; infinite: as fast as it goes
    free: float = 0.0  # when the last byte that was accepted is through
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, size: int) -> float:
        """When so many more bytes will have arrived at the other end; waits while the queue before the link is full."""
        with self.lock:
            now = time.monotonic()
            self.free = max(self.free, now) + size / self.rate
            ahead = self.free - now - _QUEUE_SECONDS
            due = self.free + self.delay
        if ahead > 0:
            time.sleep(ahead)
        return due


class Link:
    """A link to one node; a context manager that starts and ends the relay."""

    def __init__(self, *, rtt: float = 0.0, rate: float = float("inf"), direct: bool = False) -> None:
        self.rtt = rtt  # seconds
        self.rate = rate  # bytes per second, each way
        self.near = free_port()  # what others dial
        self.far = free_port()  # where the node listens
        self._host = _DIRECT_RELAY if direct else _NODE
        self._direct = free_port() if direct else None
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        ports = [(self.near, self.far), *([] if self._direct is None else [(self._direct, self._direct)])]
        command = [sys.executable, "-P", "-m", "support.links", json.dumps([self._host, ports, self.rtt, self.rate])]
        environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
        self._relay = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._hear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._relay is not None
        with self._relay as relay:
            assert relay.stdin is not None
            relay.stdin.close()  # it ends when nobody holds the pipe, also after we were killed
            try:
                relay.wait(10)
            except subprocess.TimeoutExpired:
                relay.kill()

    @property
    def options(self) -> tuple[str, ...]:
        """What `moehive node` must be told so that its experts are asked over this link only."""
        listen, announce = f"/ip4/{_NODE}/tcp/{self.far}", f"/ip4/{self._host}/tcp/{self.near}"
        direct = ("--no-direct",) if self._direct is None else ("--direct-port", str(self._direct))
        return "--listen", listen, "--announce", announce, *direct

    def cut(self) -> None:
        """Break every connection and accept no new one, until `heal`."""
        self._tell("cut")

    def heal(self) -> None:
        """Let connections be made again."""
        self._tell("heal")

    def delay(self, rtt: float) -> None:
        """From now on it takes so many seconds there and back; what is on its way keeps its time."""
        self.rtt = rtt
        self._tell(f"delay {rtt}")

    def _tell(self, what: str) -> None:
        assert self._relay is not None
        assert self._relay.stdin is not None
        self._relay.stdin.write(what + "\n")
        self._relay.stdin.flush()
        self._hear()

    def _hear(self) -> None:
        """Wait until it has done what it was told, or has started."""
        assert self._relay is not None
        assert self._relay.stdout is not None
        if not select.select([self._relay.stdout], [], [], _TIMEOUT)[0]:
            raise TimeoutError("the relay does not answer")
        if not self._relay.stdout.readline():
            raise RuntimeError("the relay has ended")


# --- the relay's process ----------------------------------------------------------------------------------------------


def _run_relay(host: str, ports: Iterable[tuple[int, int]], rtt: float, rate: float) -> None:
    """Obey each line of stdin with a line on stdout, to its end."""
    relay = _Relay(_Direction(rtt / 2, rate), _Direction(rtt / 2, rate))
    with ExitStack() as listeners:
        for near, far in ports:
            listener = listeners.enter_context(socket.create_server((host, near)))
            threading.Thread(target=relay.accept, args=(listener, far), daemon=True).start()
        _say("ready")
        for line in sys.stdin:
            relay.obey(*line.split())
            _say("done")
        relay.obey("cut")


def _say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


class _Relay:
    def __init__(self, there: _Direction, back: _Direction) -> None:
        self._there = there
        self._back = back
        self._whole = True
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def obey(self, what: str, *more: str) -> None:
        if what == "delay":
            self._there.delay = self._back.delay = float(more[0]) / 2
            return
        with self._lock:
            self._whole = what == "heal"
            ending, self._open = (set(), self._open) if self._whole else (self._open, set())
        for one in ending:
            _shut(one)

    def accept(self, listener: socket.socket, port: int) -> None:
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection((_NODE, port), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                if not self._whole:
                    near.close()
                    far.close()
                    continue
                self._open |= {near, far}
            for source, sink, way in ((near, far, self._there), (far, near, self._back)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                passing = _Passing(source, sink, way)
                threading.Thread(target=passing.take, daemon=True).start()
                threading.Thread(target=passing.give, daemon=True).start()


class _Passing:
    """One way of one connection. What need not wait is passed on at once: another thread would take time to wake."""

    def __init__(self, source: socket.socket, sink: socket.socket, way: _Direction) -> None:
        self._source = source
        self._sink = sink
        self._way = way
        self._waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ungiven = 0  # of what had to wait

    def take(self) -> None:
        """Until the source has no more, or the sink takes no more."""
        with suppress(OSError):
            while data := self._source.recv(PIECE):
                due = self._way.due(len(data))
                if not self._ungiven and due - time.monotonic() < _AT_ONCE:
                    self._send(data)
                else:
                    self._wait(due, data)
        self._wait(self._way.due(0), b"")

    def give(self) -> None:
        """Until all is given."""
        with suppress(OSError):
            while True:
                due, data = self._waiting.get()
                time.sleep(max(due - time.monotonic(), 0.0))
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._send(data)
                with self._lock:
                    self._ungiven -= 1

    def _wait(self, due: float, data: bytes) -> None:
        with self._lock:
            self._ungiven += 1
        self._waiting.put((due, data))

    def _send(self, data: bytes) -> None:
        try:
            self._sink.sendall(data)
        except OSError:
            _shut(self._sink)
            _shut(self._source)
            raise


def _shut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


if __name__ == "__main__":
    _run_relay(*json.loads(sys.argv[1]))
