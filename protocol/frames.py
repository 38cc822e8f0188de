"""Frames: the envelope of every message on every stream.

    0        1        2        4            8            12           16
    +--------+--------+--------+------------+------------+------------+------------+-------------+
    | version| kind   | flags  | request id | meta bytes | payload b. | meta       | payload     |
    +--------+--------+--------+------------+------------+------------+------------+-------------+
      u8       u8       u16      u32          u32          u32          msgpack      raw bytes

All integers are big-endian. `meta` is a msgpack map (see `messages`), `payload` is tensor rows or file bytes as they
are. The decoder takes bytes in any portions and copies them into one buffer that grows with them: a declared length
allocates nothing, and a frame that arrives byte by byte costs no more than one that arrives at once. Whoever wants the
payload to lie elsewhere reads the three parts itself, with `decode_header`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from . import limits
from .errors import ProtocolViolation, UnsupportedVersion

FRAME_VERSION = 1
HEADER = struct.Struct(">BBHIII")
FLAG_MORE = 1  # further replies to the same request follow
_KNOWN_FLAGS = FLAG_MORE

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Header:
    """The first 16 bytes of a frame as received, within the limits."""

    kind: int
    request_id: int
    flags: int
    meta_size: int
    payload_size: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as received."""

    kind: int
    request_id: int
    flags: int
    meta: bytes
    payload: bytearray


def encode_header(kind: int, request_id: int, flags: int, meta_size: int, payload_size: int) -> bytes:
    """The 16-byte header of a frame of ours."""
    assert meta_size <= limits.MAX_META_BYTES, meta_size
    assert payload_size <= limits.MAX_PAYLOAD_BYTES, payload_size
    return HEADER.pack(FRAME_VERSION, kind, flags, request_id, meta_size, payload_size)


def decode_header(data: Buffer, max_payload: int) -> Header:
    """Read the header of a frame whose payload may have `max_payload` bytes. Raises ProtocolViolation."""
    version, kind, flags, request_id, meta_size, payload_size = HEADER.unpack(data)
    if version != FRAME_VERSION:
        raise UnsupportedVersion(f"frame version {version}, this build speaks {FRAME_VERSION}")
    if flags & ~_KNOWN_FLAGS:
        raise ProtocolViolation(f"unknown frame flags {flags:#x}")
    if meta_size > limits.MAX_META_BYTES or payload_size > max_payload:
        raise ProtocolViolation(f"frame of {meta_size} + {payload_size} bytes is over the limit")
    return Header(kind, request_id, flags, meta_size, payload_size)


class FrameDecoder:
    """Turns received bytes into frames. After a ProtocolViolation it must not be fed again."""

    def __init__(self, max_payload: int = limits.MAX_PAYLOAD_BYTES) -> None:
        self.max_payload = max_payload  # holds for the headers that are still to come
        self._buffer = bytearray()
        self._need = HEADER.size  # bytes until the next step
        self._header: Header | None = None

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and is not complete: the end of the stream here is a truncation."""
        return self._header is not None or len(self._buffer) > 0

    @property
    def buffered(self) -> int:
        """Bytes held of a frame that is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take received bytes; yield the frames that they complete. Raises ProtocolViolation."""
        view = memoryview(data)
        while view or (self._header is not None and self._need == len(self._buffer)):
            taken = view[: self._need - len(self._buffer)]
            view = view[len(taken) :]
            self._buffer += taken
            if len(self._buffer) < self._need:
                return
            whole, self._buffer = self._buffer, bytearray()
            if self._header is None:
                self._header = decode_header(whole, self.max_payload)
                self._need = self._header.meta_size + self._header.payload_size
            else:
                yield self._complete(whole)

    def _complete(self, whole: bytearray) -> Frame:
        assert self._header is not None
        header, self._header, self._need = self._header, None, HEADER.size
        meta = bytes(whole[: header.meta_size])
        del whole[: header.meta_size]  # O(1): CPython moves the start, not the bytes
        return Frame(header.kind, header.request_id, header.flags, meta, whole)
