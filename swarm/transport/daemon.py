"""The go-libp2p daemon (`p2pd`, shipped in hivemind's wheel): its process, and its control socket.

hivemind can start the daemon too; we do it because then the sockets lie in a directory that only we can enter (whoever
can connect to them acts with our identity), the private key goes through a pipe and not through a file, the Go runtime
gets its own environment, a start that is cancelled leaves nothing behind, and streams are read with large buffers.
hivemind's DHT attaches to the running daemon. The control protocol is `specs/CONTROL.md` of go-libp2p-daemon.

The daemon listens on TCP only: its QUIC loses data at the end of streams. It has no limits on what strangers may open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import base58

from moehive.protocol.errors import ConfigError, PeerUnreachable, TransportError
from moehive.protocol.ids import PeerId
from moehive.swarm.identity import Identity

from .accepting import BACKLOG, accept_for_ever
from .engine import import_hivemind
from .socket_stream import READ_BUFFER

logger = logging.getLogger(__name__)

# Kept in the daemon's directory; the address of a unix socket holds 108 bytes.
_CONTROL_SOCKET = "control.sock"
_STREAM_SOCKET = "streams.sock"
_MAX_DIRECTORY_CHARS = 80
_MAX_MESSAGE_BYTES = 1 << 20  # of one control message
_STREAM_INFO_TIMEOUT = 5.0  # seconds; it comes from our own daemon
_CONTROL_TIMEOUT = 10.0  # seconds for what the daemon can answer by itself
_STOP_TIMEOUT = 3.0  # seconds from SIGTERM to SIGKILL
# The daemon ends itself when nobody has held its persistent connection for this long: also after we were killed.
_ORPHAN_SECONDS = 15

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Daemon:
    """A running p2pd; an async context manager. `on_stream` is called for every stream that a peer opens.

    Raises TransportError when the daemon does not start or has stopped.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        listen: Sequence[str],
        announce: Sequence[str],
        dht_server: bool,
        relay: bool,
        on_stream: Callable[[socket.socket], object],
    ) -> None:
        for address in listen:
            if "/udp/" in address:
                raise ConfigError(f"cannot listen on {address}: only TCP is safe, use /ip4/<ip>/tcp/<port>")
        self._identity = identity
        self._listen = tuple(listen)
        self._announce = tuple(announce)
        self._dht_server = dht_server
        self._relay = relay
        self._on_stream = on_stream
        self._directory = Path()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._stopped = False
        self._stack = AsyncExitStack()

    @property
    def control_address(self) -> str:
        """The multiaddr of the control socket."""
        return f"/unix{self._directory / _CONTROL_SOCKET}"

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and not self._stopped

    @property
    def pid(self) -> int | None:
        """The process id, None before the start."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._directory = _private_directory()
            stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
            _check_ports_are_free(self._listen)
            await self._start(stack)
            listener = stack.enter_context(_listen(self._directory / _STREAM_SOCKET))
            accepting = asyncio.create_task(accept_for_ever(listener, self._on_stream), name="accept streams")
            stack.push_async_callback(_cancelled, accepting)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        key_reader, key_writer = os.pipe()
        try:
            os.write(key_writer, self._identity.to_libp2p())  # 68 bytes never fill a pipe
        finally:
            os.close(key_writer)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(key_reader),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=_environment(),
                pass_fds=(key_reader,),
                process_group=0,  # Ctrl-C is for us: we leave the table and drain before the daemon ends
                limit=READ_BUFFER,
            )
        except OSError as error:
            raise TransportError(f"cannot start p2pd ({error}); reinstall hivemind for this platform") from error
        finally:
            os.close(key_reader)
        ready = asyncio.get_running_loop().create_future()
        watcher = asyncio.create_task(self._watch(self._process, ready), name="p2pd output")
        stack.push_async_callback(_cancelled, watcher)
        stack.push_async_callback(self._stop, self._process)  # runs first: its last words are still read
        await ready

    def _command(self, key_reader: int) -> list[str]:
        options = {
            "id": f"/dev/fd/{key_reader}",
            "listen": self.control_address,
            "tls": 1,
            "connManager": 1,
            "autonat": 0,
            "natPortMap": 0,
            "relay": int(self._relay),
            "autoRelay": 0,
            "dhtServer" if self._dht_server else "dhtClient": 1,
            "idleTimeout": f"{_ORPHAN_SECONDS}s",
            "persistentConnMaxMsgSize": 4 << 20,
        }
        if self._listen:
            options["hostAddrs"] = ",".join(self._listen)
        else:
            options["noListenAddrs"] = 1
        if self._announce:
            options["announceAddrs"] = ",".join(self._announce)
        return [str(daemon_binary()), *(f"-{name}={value}" for name, value in options.items())]

    async def _watch(self, process: asyncio.subprocess.Process, ready: asyncio.Future[None]) -> None:
        """Log what the daemon prints; learn that it is ready, or that it has stopped."""
        assert process.stdout is not None
        last = ""
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line longer than the buffer; the reader has dropped it
                continue
            if not raw:
                break
            line = raw.decode(errors="replace").rstrip()
            logger.debug("p2pd: %s", line)
            last = line or last
            if line.startswith("Peer ID:") and not ready.done():
                ready.set_result(None)
        self._stopped = True
        if not ready.done():
            ready.set_exception(TransportError(f"p2pd did not start: {last or 'it printed nothing'}"))
        elif not self._stopping:
            logger.error("p2pd stopped: %s; this peer is off the network until it is restarted", last)

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        self._stopping = True
        try:
            with suppress(ProcessLookupError):
                process.terminate()
            async with asyncio.timeout(_STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            logger.warning("p2pd (process %d) did not end when asked to; killing it", process.pid)
        finally:  # also when we are cancelled
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    # ---- control ----------------------------------------------------------------------------------------------------

    async def addresses(self) -> list[str]:
        """The addresses under which the daemon believes that others reach it, without /p2p."""
        messages, multiaddr = _messages(), import_hivemind().utils.multiaddr
        response = await self._ask_locally(messages.Request(type=messages.Request.IDENTIFY))
        return [str(multiaddr.Multiaddr(raw)) for raw in response.identify.addrs]

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Have a connection to `peer`, dialling `addresses` and what the daemon knows. Raises PeerUnreachable."""
        messages = _messages()
        request = messages.Request(type=messages.Request.CONNECT)
        request.connect.peer = _raw_peer(peer)
        request.connect.addrs.extend(raw for raw in map(_raw_address, addresses) if raw is not None)
        await self._ask(request, peer)

    async def open_stream(self, peer: PeerId, protocol: str) -> Streams:
        """A new stream to `peer`. Raises PeerUnreachable."""
        messages = _messages()
        request = messages.Request(type=messages.Request.STREAM_OPEN)
        request.streamOpen.peer = _raw_peer(peer)
        request.streamOpen.proto.append(protocol)
        reader, writer = await self._dial()
        try:
            await self._exchange(request, reader, writer, peer)
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer

    async def accept(self, protocol: str) -> None:
        """From now on, hand over streams of `protocol`."""
        messages = _messages()
        request = messages.Request(type=messages.Request.STREAM_HANDLER)
        request.streamHandler.addr = self._stream_address()
        request.streamHandler.proto.append(protocol)
        request.streamHandler.balanced = False
        await self._ask_locally(request)

    async def refuse(self, protocol: str) -> None:
        """From now on, refuse streams of `protocol`."""
        messages = _messages()
        request = messages.Request(type=messages.Request.REMOVE_STREAM_HANDLER)
        request.removeStreamHandler.addr = self._stream_address()
        request.removeStreamHandler.proto.append(protocol)
        await self._ask_locally(request)

    def _stream_address(self) -> bytes:
        raw = _raw_address(f"/unix{self._directory / _STREAM_SOCKET}")
        assert raw is not None
        return raw

    async def _ask_locally(self, request: Any) -> Any:
        try:
            async with asyncio.timeout(_CONTROL_TIMEOUT):
                return await self._ask(request)
        except TimeoutError as error:
            raise TransportError(f"p2pd has not answered for {_CONTROL_TIMEOUT:g} s; restart this peer") from error

    async def _ask(self, request: Any, peer: PeerId | None = None) -> Any:
        reader, writer = await self._dial()
        try:
            return await self._exchange(request, reader, writer, peer)
        finally:
            writer.transport.abort()

    async def _dial(self) -> Streams:
        try:
            return await asyncio.open_unix_connection(self._directory / _CONTROL_SOCKET, limit=READ_BUFFER)
        except OSError as error:
            if isinstance(error, ConnectionRefusedError | FileNotFoundError):
                self._stopped = True  # nobody listens: the end of its output, which says the same, comes a moment later
            raise TransportError(f"p2pd does not answer ({error}); restart this peer") from error

    async def _exchange(
        self, request: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: PeerId | None
    ) -> Any:
        body = request.SerializeToString()
        response = _messages().Response()
        try:
            writer.write(_varint(len(body)) + body)
            response.ParseFromString(await _read_message(reader))
        except (OSError, EOFError) as error:
            raise TransportError(f"p2pd closed its control socket ({error}); restart this peer") from error
        if response.type == response.ERROR:
            if peer is not None:
                raise PeerUnreachable(response.error.msg, peer=peer)
            raise TransportError(f"p2pd: {response.error.msg}")
        return response


async def read_stream_info(reader: asyncio.StreamReader) -> tuple[PeerId, str]:
    """The peer and the protocol of a stream that the daemon hands over. Raises TransportError."""
    info = _messages().StreamInfo()
    try:
        async with asyncio.timeout(_STREAM_INFO_TIMEOUT):
            info.ParseFromString(await _read_message(reader))
    except (OSError, EOFError) as error:  # TimeoutError is an OSError
        raise TransportError("p2pd handed over a stream without saying whose it is") from error
    return PeerId(base58.b58encode(info.peer).decode()), info.proto


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    size = 0
    for shift in range(0, 28, 7):
        byte = (await reader.readexactly(1))[0]
        size |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    if size > _MAX_MESSAGE_BYTES:
        raise TransportError(f"p2pd sent a control message of {size} bytes")
    return await reader.readexactly(size)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _private_directory() -> Path:
    """A new directory of mode 0700 whose path leaves room for the name of a socket."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="moehive-", dir=parent if len(parent) < _MAX_DIRECTORY_CHARS else "/tmp"))  # noqa: S108


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _check_ports_are_free(listen: Sequence[str]) -> None:
    """Raise TransportError for a port that is taken: the daemon would share it, and the connections that come to it."""
    for address in listen:
        match = re.fullmatch(r"/ip([46])/([^/]+)/tcp/(\d+)", address)
        if match is None or match[3] == "0":
            continue
        with socket.socket(socket.AF_INET if match[1] == "4" else socket.AF_INET6) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are fading away do not count
            try:
                probe.bind((match[2], int(match[3])))
            except (OSError, OverflowError) as error:
                raise TransportError(f"cannot listen on {address}: {error}; choose another address or port") from error


def _environment() -> dict[str, str]:
    """Ours, with a Go runtime that collects garbage a quarter as often: its pauses are the tail of our latency."""
    environment = dict(os.environ)
    environment.setdefault("GOGC", "400")
    environment.setdefault("GOLOG_LOG_LEVEL", "error")
    return environment


def daemon_binary() -> Path:
    """Where hivemind keeps the daemon. Raises TransportError where hivemind is not installed."""
    return Path(str(resources.files(import_hivemind()) / "hivemind_cli" / "p2pd"))


def _messages() -> Any:
    return import_hivemind().proto.p2pd_pb2


def _raw_peer(peer: PeerId) -> bytes:
    try:
        return base58.b58decode(peer)
    except ValueError as error:
        raise PeerUnreachable("not a peer id", peer=peer) from error


def _raw_address(address: str) -> bytes | None:
    """The binary form; None for what is not a multiaddr."""
    multiaddr = import_hivemind().utils.multiaddr
    try:
        raw = multiaddr.Multiaddr(address).to_bytes()
    except (ValueError, LookupError, multiaddr.exceptions.Error):
        return None
    assert isinstance(raw, bytes)
    return raw
