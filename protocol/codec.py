"""Messages as msgpack maps, checked field by field.

A message is a frozen dataclass whose fields are declared with `wire(check)`; the check turns the decoded msgpack value
into the field's value or raises ValueError. Unknown and missing fields are violations: versions are told apart by the
protocol's name, not by guessing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import msgpack

from . import limits
from .errors import ProtocolViolation
from .ids import is_hash

Check = Callable[[Any], Any]
_LIST_MARKS = frozenset(bytes([mark]) for mark in (*range(0x90, 0xA0), 0xDC, 0xDD))  # msgpack's fixarray, array 16, 32


class Message:
    """Base of all messages; `KIND` is the frame's kind byte."""

    __slots__ = ()
    KIND: ClassVar[int]

    @property
    def max_replies(self) -> int:
        """How many replies may answer it, where it is a request."""
        return 1


M = TypeVar("M", bound=Message)


def wire(check: Check, **options: Any) -> Any:
    """Declare a message field with its check."""
    return dataclasses.field(metadata={"check": check}, **options)


def _read_checks(kind: Any) -> dict[str, Check]:
    return {field.name: field.metadata["check"] for field in dataclasses.fields(kind)}


_checks: Callable[[Any], dict[str, Check]] = functools.cache(_read_checks)


def encode(message: Message) -> bytes:
    """The msgpack map of a message of ours."""
    packed: bytes = msgpack.packb({name: getattr(message, name) for name in _checks(type(message))}, use_bin_type=True)
    return packed


def decode(kind: type[M], meta: bytes) -> M:
    """Read a message. Raises ProtocolViolation, whatever the bytes."""
    fields = unpack_map(meta, limits.MAX_META_BYTES)
    checks = _checks(kind)
    if fields.keys() != checks.keys():
        raise ProtocolViolation(f"{kind.__name__}: missing or unknown fields; {sorted(checks)} are expected")
    try:
        return kind(**{name: checks[name](value) for name, value in fields.items()})
    except ValueError as error:
        raise ProtocolViolation(f"{kind.__name__}: {error}") from error


def unpack_map(data: bytes, limit: int) -> dict[str, Any]:
    """A msgpack map of at most `limit` bytes, from texts to scalars and lists of scalars. Raises ProtocolViolation."""
    if len(data) > limit:
        raise ProtocolViolation(f"{len(data)} bytes where at most {limit} are allowed")
    try:
        return _read_map(data)
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolViolation(f"malformed msgpack: {type(error).__name__}") from error


def _read_map(data: bytes) -> dict[str, Any]:
    # Not msgpack.unpackb: it allocates a list when it is declared, and lists nest, so that 7 KiB can claim 80 MiB.
    # Here we read the outer map and its lists ourselves; what else is a container gets the limit of 0.
    size = max(1, len(data))  # msgpack reads 0 as 4 GiB
    reader = msgpack.Unpacker(raw=False, max_buffer_size=size, max_array_len=0, max_map_len=0, max_ext_len=0)
    reader.feed(data)
    fields: dict[str, Any] = {}
    for _ in range(_at_most(limits.MAX_MAP_ITEMS, reader.read_map_header())):
        name = reader.unpack()
        if not isinstance(name, str) or name in fields:  # readers would differ in which of two counts
            raise ValueError("names must be distinct texts")
        fields[name] = _read_value(reader, data)
    if reader.tell() != len(data):
        raise ValueError("bytes behind the map")
    return fields


def _read_value(reader: msgpack.Unpacker, data: bytes) -> Any:
    if data[reader.tell() : reader.tell() + 1] not in _LIST_MARKS:
        return reader.unpack()
    return [reader.unpack() for _ in range(_at_most(limits.MAX_LIST_ITEMS, reader.read_array_header()))]


def _at_most(limit: int, count: int) -> int:
    if count > limit:
        raise ValueError(f"{count} items where at most {limit} are allowed")
    return count


# --- checks -------------------------------------------------------------------------------------------------------


def integer(low: int, high: int) -> Check:
    """An integer in [low, high]."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high} is expected")
        return value

    return check


def integers(low: int, high: int, count: int) -> Check:
    """At most `count` integers in [low, high], as a tuple."""
    item = integer(low, high)

    def check(value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > count:
            raise ValueError(f"at most {count} integers are expected")
        return tuple(item(entry) for entry in value)

    return check


def number(low: float, high: float) -> Check:
    """A finite number in [low, high]."""

    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"a number from {low} to {high} is expected")
        return float(value)

    return check


def text(limit: int) -> Check:
    """Printable text of at most `limit` characters: it ends up in logs and on terminals, where control codes act."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit or not value.isprintable():
            raise ValueError(f"printable text of at most {limit} characters is expected")
        return value

    return check


def texts(limit: int, count: int) -> Check:
    """At most `count` texts of at most `limit` characters, as a tuple."""
    item = text(limit)

    def check(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or len(value) > count:
            raise ValueError(f"at most {count} texts are expected")
        return tuple(item(entry) for entry in value)

    return check


def one_of(*choices: str) -> Check:
    """One of the given texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"one of {', '.join(choices)} is expected")
        return value

    return check


def blob(low: int, high: int) -> Check:
    """Bytes with a length in [low, high]."""

    def check(value: Any) -> bytes:
        if not isinstance(value, bytes) or not low <= len(value) <= high:
            raise ValueError(f"{low} to {high} bytes are expected")
        return value

    return check


def hash_text(value: Any) -> str:
    """The text form of a model id or shard hash."""
    if not isinstance(value, str) or not is_hash(value):
        raise ValueError("a hash of 64 hexadecimal digits is expected")
    return value


def boolean(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false is expected")
    return value
