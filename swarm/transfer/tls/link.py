"""The client's end of one TLS connection: a socket, and OpenSSL driven through memory.

`ssl.SSLSocket` must not be used by two threads at once, and it reads every 16 KiB record with two system calls. Here
ciphertext is read 256 KiB at a time, and one thread may wait for bytes while another sends.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import ssl
import threading
from contextlib import suppress

from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.ids import PeerId

from .certificate import client_context, fingerprint_of

_RAW_BYTES = 256 << 10


class TlsLink:
    """A connection whose other end has shown the expected certificate. Made by `connect`."""

    def __init__(self, sock: socket.socket, peer: PeerId) -> None:
        self.peer = peer
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = client_context().wrap_bio(self._incoming, self._outgoing)
        self._lock = threading.Lock()  # of everything below `_tls`, and of the order of what is sent
        self._raw = memoryview(bytearray(_RAW_BYTES))
        self.is_shut = False  # by us

    @classmethod
    async def connect(cls, host: str, port: int, fingerprint: bytes, peer: PeerId) -> TlsLink:
        """Connect, and make sure that the certificate is the one; nothing of ours is sent before that.

        Raises PeerUnreachable. Cancel it to give up: it has no deadline of its own.
        """
        loop = asyncio.get_running_loop()
        try:
            sock = await _connected(host, port)
        except OSError as error:
            raise PeerUnreachable(f"{host} port {port}: {error}", peer=peer) from error
        link = cls(sock, peer)
        try:
            await link._handshake(loop)
            found = link._tls.getpeercert(binary_form=True) or b""
            if not hmac.compare_digest(fingerprint_of(found), fingerprint):
                raise PeerUnreachable(f"{host} port {port} belongs to somebody else", peer=peer)
        except OSError as error:  # what a port without TLS makes of it, too
            link.close()
            error.__traceback__ = None  # asyncio's frames in it hold the future that holds the error
            raise PeerUnreachable(f"{host} port {port}: {error}", peer=peer) from error
        except BaseException:
            link.close()
            raise
        return link

    async def _handshake(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await loop.sock_sendall(self._sock, self._outgoing.read())
                await self._fill(loop)
        await loop.sock_sendall(self._sock, self._outgoing.read())

    async def _fill(self, loop: asyncio.AbstractEventLoop) -> None:
        count = await loop.sock_recv_into(self._sock, self._raw)
        if not count:
            raise PeerUnreachable("closed the connection", peer=self.peer)
        self._incoming.write(self._raw[:count])

    # --- before the threads ---------------------------------------------------------------------------------------

    async def read(self, limit: int) -> bytes:
        """Some bytes; b"" at the end of the connection. Raises PeerUnreachable."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                with suppress(ssl.SSLWantReadError):
                    return self._tls.read(limit)
                await self._fill(loop)  # outside of any handler: what it raises is to be translated, too
        except OSError as error:
            raise PeerUnreachable(f"connection lost: {error}", peer=self.peer) from error

    def start_blocking(self) -> None:
        """From now on `receive_into` may be used, by one thread, and `read` may not."""
        self._sock.setblocking(True)

    # --- from threads ---------------------------------------------------------------------------------------------

    def receive_into(self, target: memoryview) -> None:
        """Wait until `target` is full. Raises PeerUnreachable, also after `shut`: at once, whatever has come before."""
        filled = 0
        while filled < len(target):
            if self.is_shut:  # the system would hand out what it still holds
                raise PeerUnreachable("the connection was ended on this side", peer=self.peer)
            try:
                with self._lock:  # typeshed does not know of the count that comes back where a buffer is given
                    count: int = self._tls.read(len(target) - filled, target[filled:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                self._receive_raw()
                continue
            except OSError as error:  # SSLError too
                raise PeerUnreachable(f"connection lost: {error}", peer=self.peer) from error
            if not count:
                raise PeerUnreachable("closed the connection", peer=self.peer)
            filled += count

    def _receive_raw(self) -> None:
        try:
            count = self._sock.recv_into(self._raw)
        except OSError as error:
            raise PeerUnreachable(f"connection lost: {error}", peer=self.peer) from error
        if not count:
            raise PeerUnreachable("closed the connection", peer=self.peer)
        with self._lock:
            self._incoming.write(self._raw[:count])

    def send(self, data: bytes) -> None:
        """Send something small; from any thread. Never waits: a peer that reads so little is given up.

        Raises PeerUnreachable.
        """
        try:
            with self._lock:
                self._tls.write(data)
                ciphertext = self._outgoing.read()
                sent = self._sock.send(ciphertext, socket.MSG_DONTWAIT)
        except OSError as error:  # BlockingIOError too
            raise PeerUnreachable(f"connection lost while writing: {error}", peer=self.peer) from error
        if sent != len(ciphertext):
            raise PeerUnreachable("does not read what is asked of it", peer=self.peer)

    def shut(self) -> None:
        """End the connection and wake whoever waits for bytes; from any thread, any number of times."""
        self.is_shut = True
        with suppress(OSError):  # it ended already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back: when no thread uses the link any more."""
        self._sock.close()


async def _connected(host: str, port: int) -> socket.socket:
    """A non-blocking socket, connected to the first address of `host` that takes it. Raises OSError."""
    loop = asyncio.get_running_loop()
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure
