"""Files under other names without a second copy of their bytes, where the file system can do that.

A name is always replaced at once by a complete file, however many threads and processes place the same one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FICLONE = 0x40049409  # ioctl of Linux (linux/fs.h): let a file share another one's blocks until either is written to


def place(source: Path, target: Path, *, independent: bool = False) -> None:
    """Make `target` a file of `source`'s bytes: a link, or a clone, or else a copy. Raises OSError.

    `independent`: a clone (btrfs, XFS) rather than a link; whoever writes to one of the two then does not change the
    other. A copy is durable, though its name is not yet, and as right as the disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    ways = (_clone, _link) if independent else (_link, _clone)
    with _temporary_beside(target) as temporary:
        if not any(way(source, temporary) for way in ways):
            shutil.copyfile(source, temporary)
            _sync(temporary)
        temporary.replace(target)


def write_file(target: Path, data: bytes) -> None:
    """Make `target` a file of these bytes, unless it is one; durable, though its name is not yet. Raises OSError."""
    if target.exists() and target.read_bytes() == data:
        return
    with _temporary_beside(target) as temporary:
        temporary.write_bytes(data)
        _sync(temporary)
        temporary.replace(target)


def _link(source: Path, target: Path) -> bool:
    """Whether `target` has become a link; not on another file system, or one without links."""
    with suppress(OSError):
        os.link(source, target)
        return True
    return False


def _clone(source: Path, target: Path) -> bool:
    """Whether `target` has become a clone; nothing is left of the attempt otherwise."""
    with source.open("rb") as original, target.open("xb") as clone, suppress(OSError):
        fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
        return True
    target.unlink()
    return False


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """A name that no other thread or process uses. Gone afterwards, also where the replacement did nothing.

    rename(2) does nothing where both names are links to one file: another loader was faster.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
