"""Frames: the envelope of every message on every stream.

    0        1        2        4            8            12           16
    +--------+--------+--------+------------+------------+------------+------------+-------------+
    | version| kind   | flags  | request id | meta bytes | payload b. | meta       | payload     |
    +--------+--------+--------+------------+------------+------------+------------+-------------+
      u8       u8       u16      u32          u32          u32          msgpack      raw bytes

All integers are big-endian. `meta` is a msgpack map (see `messages`), `payload` is tensor rows or file bytes as they
are. The decoder takes bytes in any portions and holds no more than what came: a declared length allocates nothing, and
a frame that arrives byte by byte costs no more than one that arrives at once. Each byte of a large frame is copied
once, when the frame is complete. Whoever wants the payload to lie elsewhere reads the three parts itself, with
`decode_header`.
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
_LARGE_PORTION = 16 << 10  # bytes; many smaller ones would cost more to keep apart than to copy

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
        self._parts: list[bytearray | memoryview] = []
        self._held = 0  # bytes in them
        self._need = HEADER.size  # bytes until the next step
        self._header: Header | None = None

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and is not complete: the end of the stream here is a truncation."""
        return self._header is not None or self._held > 0

    @property
    def buffered(self) -> int:
        """Bytes held of a frame that is not complete."""
        return self._held

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take received bytes; yield the frames that they complete. Raises ProtocolViolation."""
        view = memoryview(data)
        while view or (self._header is not None and self._need == self._held):
            taken = view[: self._need - self._held]
            view = view[len(taken) :]
            self._keep(taken)
            if self._held < self._need:
                return
            whole = self._take()
            if self._header is None:
                self._header = decode_header(whole, self.max_payload)
                self._need = self._header.meta_size + self._header.payload_size
            else:
                yield self._complete(whole)

    def _keep(self, taken: memoryview) -> None:
        """Large portions stay where they are until the frame is complete; small ones are joined at once."""
        self._held += len(taken)
        last = self._parts[-1] if self._parts else None
        if len(taken) >= _LARGE_PORTION and taken.readonly:
            self._parts.append(taken)
        elif isinstance(last, bytearray):
            last += taken
        else:
            self._parts.append(bytearray(taken))

    def _take(self) -> bytearray:
        parts, self._parts, self._held = self._parts, [], 0
        [first, *more] = parts or [bytearray()]
        return first if isinstance(first, bytearray) and not more else bytearray().join(parts)

    def _complete(self, whole: bytearray) -> Frame:
        assert self._header is not None
        header, self._header, self._need = self._header, None, HEADER.size
        meta = bytes(whole[: header.meta_size])
        del whole[: header.meta_size]  # O(1): CPython moves the start, not the bytes
        return Frame(header.kind, header.request_id, header.flags, meta, whole)
