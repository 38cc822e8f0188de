"""A fetched model's dense part as a Hugging Face directory, made of links to objects in the store."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moehive.protocol.errors import StorageError
from moehive.protocol.manifest import MANIFEST_NAME, Manifest

from .store.base import NotHeld, ObjectSource


def lay_out_skeleton(manifest: Manifest, source: ObjectSource, directory: Path) -> Path:
    """Make `directory` hold the skeleton's files under their own names, the manifest last; returns it.

    Every skeleton object must be in `source`. Safe to call again, and from several processes. Raises NotHeld,
    StorageError.
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
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, temporary)
    temporary.replace(target)


def _replace(target: Path, data: bytes) -> None:
    if target.exists() and target.read_bytes() == data:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(target)
