"""Strict reading of untrusted JSON objects: every key has one type, an unknown key is an error."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from typing import Any, TypeVar

from .errors import ManifestError

E = TypeVar("E", bound=enum.StrEnum)
_MAX_INTEGER = 1 << 53  # what every JSON reader agrees on


def drop_none(document: dict[str, Any]) -> dict[str, Any]:
    """Without the keys whose value is None: an absent option is an absent key."""
    return {key: value for key, value in document.items() if value is not None}


class Reader:
    """Takes typed values out of one JSON object; `done` complains about what nobody took. Raises ManifestError."""

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, dict):
            raise ManifestError(f"{where}: an object is expected, not {type(document).__name__}")
        self._rest = dict(document)
        self._where = where

    def done(self) -> None:
        """Every key was known."""
        if self._rest:
            raise ManifestError(f"{self._where}: unknown key {sorted(self._rest)[0]!r}")

    def _take(self, key: str, *types: type) -> Any:
        if key not in self._rest:
            raise ManifestError(f"{self._where}: {key!r} is missing")
        return self._typed(key, self._rest.pop(key), *types)

    def _typed(self, key: str, value: Any, *types: type) -> Any:
        if type(value) not in types:  # exact: a JSON true is not the integer 1
            raise ManifestError(f"{self._where}: {key!r} has the wrong type {type(value).__name__}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        return str(self._take(key, str))

    def optional_text(self, key: str) -> str | None:
        """A string or absent."""
        return self.text(key) if key in self._rest else None

    def boolean(self, key: str) -> bool:
        """true or false."""
        return bool(self._take(key, bool))

    def integer(self, key: str) -> int:
        """An integer below 2^53 in magnitude."""
        return self._bounded(key, self._take(key, int))

    def _bounded(self, key: str, value: int) -> int:
        if abs(value) >= _MAX_INTEGER:
            raise ManifestError(f"{self._where}: {key!r} is too large")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number or absent."""
        if key not in self._rest:
            return None
        value = float(self._bounded(key, self._take(key, int, float)))
        if not math.isfinite(value):
            raise ManifestError(f"{self._where}: {key!r} is not finite")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers."""
        return tuple(self._bounded(key, self._typed(key, item, int)) for item in self._take(key, list))

    def optional_integers(self, key: str) -> tuple[int, ...] | None:
        """A list of integers or absent."""
        return self.integers(key) if key in self._rest else None

    def choice(self, key: str, choices: type[E]) -> E:
        """One of the values of an enumeration."""
        value = self.text(key)
        try:
            return choices(value)
        except ValueError as error:
            raise ManifestError(
                f"{self._where}: {key!r} is {value!r}, not one of {[c.value for c in choices]}"
            ) from error

    def child(self, key: str) -> Reader:
        """A nested object."""
        return Reader(self._take(key, dict), f"{self._where}.{key}")

    def optional_child(self, key: str) -> Reader | None:
        """A nested object or absent."""
        return self.child(key) if key in self._rest else None

    def children(self, key: str, limit: int) -> Iterator[Reader]:
        """A list of nested objects."""
        items = self._take(key, list)
        self._count(key, len(items), limit)
        return (Reader(item, f"{self._where}.{key}[{index}]") for index, item in enumerate(items))

    def named(self, key: str, limit: int) -> Iterator[tuple[str, Reader]]:
        """An object whose values are nested objects."""
        items = self._take(key, dict)
        self._count(key, len(items), limit)
        return ((name, Reader(item, f"{self._where}.{key}.{name}")) for name, item in items.items())

    def _count(self, key: str, count: int, limit: int) -> None:
        if count > limit:
            raise ManifestError(f"{self._where}: {key!r} has {count} entries, at most {limit} are read")
