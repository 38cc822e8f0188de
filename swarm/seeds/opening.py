"""From a seed's name to the seed. Reads configurations and headers, never weights."""

from __future__ import annotations

from pathlib import Path

from moehive.protocol.errors import CheckpointError, ManifestError, SeedError, StorageError, UnsupportedModel
from moehive.protocol.manifest import MANIFEST_NAME, Manifest
from moehive.swarm.convert.plan import plan_conversion
from moehive.swarm.convert.reading import SourceFiles, SourceReader
from moehive.swarm.convert.source import read_checkpoint

from .base import Seed, SeedName
from .checkpoint import CheckpointSeed
from .converted import ConvertedSeed

KEEP_BYTES = 384 << 20  # of a checkpoint that is far away; see CheckpointSeed


def open_seed(name: SeedName, manifest: Manifest) -> Seed:
    """The seed of one model. Blocks, for a repository of the hub on the network.

    Raises SeedError, SeedChanged.
    """
    if name.directory is None:
        from .hub import open_snapshot  # huggingface_hub: half a second

        files, directory = open_snapshot(name.text, name.repo, name.revision)
        return _checkpoint(name.text, directory, files, manifest, keep_bytes=KEEP_BYTES)
    if (name.directory / MANIFEST_NAME).exists():
        try:
            return ConvertedSeed(name.text, name.directory)
        except (ManifestError, StorageError) as error:
            raise SeedError(f"seed {name.text}: {error}") from error
    return _checkpoint(name.text, name.directory, SourceFiles(name.directory), manifest, keep_bytes=0)


def _checkpoint(name: str, directory: Path, files: SourceReader, manifest: Manifest, *, keep_bytes: int) -> Seed:
    try:
        plan = plan_conversion(read_checkpoint(directory, files), manifest.model.name)
        return CheckpointSeed(name, manifest, plan, files, keep_bytes=keep_bytes)
    except (CheckpointError, UnsupportedModel) as error:
        files.close()
        raise SeedError(f"seed {name}: {error}") from error
    except SeedError:
        files.close()
        raise
