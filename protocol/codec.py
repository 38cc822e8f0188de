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


class Message:
    """Base of all messages; `KIND` is the frame's kind byte."""

    __slots__ = ()
    KIND: ClassVar[int]


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
        raise ProtocolViolation(f"{kind.__name__}: fields {sorted(map(str, fields))} instead of {sorted(checks)}")
    try:
        return kind(**{name: checks[name](value) for name, value in fields.items()})
    except ValueError as error:
        raise ProtocolViolation(f"{kind.__name__}: {error}") from error


def unpack_map(data: bytes, limit: int) -> dict[Any, Any]:
    """One msgpack map of at most `limit` bytes. Raises ProtocolViolation."""
    if len(data) > limit:
        raise ProtocolViolation(f"{len(data)} bytes where at most {limit} are allowed")
    try:
        # msgpack bounds every declared length by the size of its input, so a small input cannot allocate much.
        value = msgpack.unpackb(data, raw=False, strict_map_key=False, use_list=True)
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolViolation(f"malformed msgpack: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise ProtocolViolation("a msgpack map is expected")
    return value


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
    """Text of at most `limit` characters."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise ValueError(f"text of at most {limit} characters is expected")
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
