"""What may stand in the table of announcements, whichever carrier keeps it: bounds on size and lifetime. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from moehive.protocol.limits import MAX_CLOCK_SKEW, MAX_RECORD_BYTES, MAX_RECORD_LIFETIME

from .base import Record

MAX_SUBKEY_CHARS = 64

# (table_key(key), subkey, record) -> whether a storing peer takes the record. It must not depend on time: peers repeat
# the question when they pass records on, and one refusal discards a peer's whole answer.
RecordValidator = Callable[[bytes, str, Record], bool]


def table_key(key: bytes) -> bytes:
    """The 20 bytes under which the table files `key`; the only form of the key that a storing peer sees."""
    return hashlib.sha1(key, usedforsecurity=False).digest()


def checked_record(subkey: object, value: object, expires: object, now: float) -> Record | None:
    """A stranger's record, or None when it breaks a bound. It may have expired. `now`: seconds since the epoch."""
    if not (isinstance(subkey, str) and len(subkey) <= MAX_SUBKEY_CHARS):
        return None
    if not (isinstance(value, bytes) and len(value) <= MAX_RECORD_BYTES):
        return None
    # Written so that NaN is refused.
    if not (isinstance(expires, float) and expires <= now + MAX_RECORD_LIFETIME + MAX_CLOCK_SKEW):
        return None
    return Record(value, expires)
