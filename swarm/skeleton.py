"""A fetched model's dense part as a Hugging Face directory, made of links to objects in the store."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moehive.protocol.errors import StorageError
from moehive.protocol.manifest import MANIFEST_NAME, Manifest

from .store.base import NotHeld, ObjectSource


def lay_out_skeleton(manifest: Manifest, source: ObjectSource, directory: Path) -> Path:
    """Make `directory` hold the skeleton's files under their own names, the manifest last; returns it.

    Every skeleton object must be in `source`. Safe to call again, and from several threads and processes at once.
    Raises NotHeld, StorageError.
    """
    try:
        for shard in manifest.skeleton:
            path = source.path(shard.hash)
            if path is None:
                raise NotHeld(shard.hash)
            _place(path, directory / shard.file)
        _replace(directory / MANIFEST_NAME, manifest.to_bytes())
    except OSError as error:
        raise StorageError(f"cannot lay out the model in {directory}: {error}") from error
    return directory


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    with _temporary_beside(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
        temporary.replace(target)


def _replace(target: Path, data: bytes) -> None:
    if target.exists() and target.read_bytes() == data:
        return
    with _temporary_beside(target) as temporary:
        temporary.write_bytes(data)
        temporary.replace(target)


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
