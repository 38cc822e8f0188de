"""A fetched model's dense part as a Hugging Face directory, made of links to objects in the store."""

from __future__ import annotations

from pathlib import Path

from moehive.protocol.errors import StorageError
from moehive.protocol.manifest import MANIFEST_NAME, Manifest

from .placing import place, write_file
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
            place(path, directory / shard.file)
        write_file(directory / MANIFEST_NAME, manifest.to_bytes())
    except OSError as error:
        raise StorageError(f"cannot lay out the model in {directory}: {error}") from error
    return directory
