"""What already lies in an output directory, and whether it may be continued.

A conversion in progress keeps `.partial-journal` there: a fingerprint of its plan, and the hash of each file when it
was finished. No entry is trusted: a file counts as finished only if its bytes still have that hash and its samples
still equal the source (another checkpoint of the same shapes is refused). The journal's presence is also what makes
the directory ours: files of the same names in a directory without it, such as a checkpoint, are never overwritten.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from moehive.protocol.chunks import ChunkList, object_root
from moehive.protocol.errors import DestinationError, ManifestError, StorageError
from moehive.protocol.ids import ShardHash
from moehive.protocol.limits import MAX_MANIFEST_BYTES
from moehive.protocol.manifest import MANIFEST_NAME, REPORT_NAME, Manifest, ShardEntry, TensorEntry

from .layout import ConversionPlan, PlannedFile, Span
from .reading import SourceFiles
from .writing import PARTIAL

JOURNAL_NAME = PARTIAL + "journal"
_SAMPLE = 4096  # bytes compared with the source at both ends of every tensor of a finished file
_ELSEWHERE = "choose another destination, or remove it"


@dataclass(frozen=True)
class Existing:
    """What a directory holds of a plan: the hash that each file is said to have, and the manifest if it is complete."""

    known: Mapping[str, ShardHash]
    manifest: Manifest | None
    leftovers: tuple[Path, ...]  # partial files of a killed run; the journal is not among them


def survey(destination: Path, plan: ConversionPlan) -> Existing:
    """Look at a directory that may not exist. Raises DestinationError where it holds anything but this conversion."""
    if destination.exists() and not destination.is_dir():
        raise DestinationError(f"{destination} is a file; {_ELSEWHERE}")
    files = sorted(_walk(destination)) if destination.is_dir() else []
    names = {path.relative_to(destination).as_posix() for path in files}
    if not names:
        return Existing({}, None, ())
    leftovers = tuple(path for path in files if path.name.startswith(PARTIAL) and path.name != JOURNAL_NAME)
    manifest = _complete(destination, plan) if MANIFEST_NAME in names else None
    if manifest is None and JOURNAL_NAME not in names and len(leftovers) < len(files):
        raise DestinationError(f"{destination} holds other files, such as {min(names)}; {_ELSEWHERE}")
    ours = {file.file for file in plan.files} | {MANIFEST_NAME, REPORT_NAME, JOURNAL_NAME}
    strange = names - ours - {path.relative_to(destination).as_posix() for path in leftovers}
    if strange:
        raise DestinationError(f"{destination / min(strange)} does not belong to this conversion; {_ELSEWHERE}")
    if manifest:
        return Existing({shard.file: shard.hash for shard in manifest.shards}, manifest, leftovers)
    known = _read_journal(destination / JOURNAL_NAME, plan) if JOURNAL_NAME in names else {}
    return Existing({file: root for file, root in known.items() if file in names}, None, leftovers)


def is_finished(destination: Path, planned: PlannedFile, root: ShardHash, source: SourceFiles) -> bool:
    """Whether a file holds what `root` says. Raises DestinationError where that is another checkpoint's content."""
    path = destination / planned.file
    try:
        with path.open("rb", buffering=0) as file:
            chunks = ChunkList.of_file(file)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    if chunks.size != planned.size or chunks.root != root:
        return False
    if not _same_source(path, planned, root, source):
        raise DestinationError(f"{path} was converted from another checkpoint of the same shapes; {_ELSEWHERE}")
    return True


# --- journal ------------------------------------------------------------------------------------------------------


def journal_head(plan: ConversionPlan) -> bytes:
    """The first line: whose conversion it is."""
    return json.dumps({"moehive": "conversion", "plan": _fingerprint(plan)}).encode() + b"\n"


def journal_line(file: str, root: ShardHash) -> bytes:
    """One finished file."""
    return f"{root} {file}\n".encode()


def _read_journal(path: Path, plan: ConversionPlan) -> dict[str, ShardHash]:
    head, *lines = path.read_bytes().split(b"\n")
    if head + b"\n" != journal_head(plan):
        raise DestinationError(f"{path.parent} holds the unfinished conversion of another checkpoint; {_ELSEWHERE}")
    known = {}
    for line in lines[:-1]:  # after the last line end: nothing, or a line that a kill cut short
        root, _, file = line.decode(errors="replace").partition(" ")
        known[file] = ShardHash(root)
    return known


def _fingerprint(plan: ConversionPlan) -> str:
    hasher = blake3(repr(plan.model).encode())
    for file in plan.files:
        hasher.update(repr(file).encode())
    return hasher.hexdigest()


# --- comparisons --------------------------------------------------------------------------------------------------


def _walk(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())


def _complete(destination: Path, plan: ConversionPlan) -> Manifest:
    path = destination / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            manifest = Manifest.from_bytes(file.read(MAX_MANIFEST_BYTES + 1))
    except ManifestError as error:
        raise DestinationError(f"{path} cannot be read ({error}); {_ELSEWHERE}") from error
    shards, tensors = tables(plan, {shard.file: shard.hash for shard in manifest.shards})
    if Manifest(plan.model, shards, tensors) != manifest:
        raise DestinationError(
            f"{destination} holds another model, {manifest.model.name} ({manifest.model_id}); {_ELSEWHERE}"
        )
    return manifest


def tables(
    plan: ConversionPlan, roots: Mapping[str, ShardHash]
) -> tuple[tuple[ShardEntry, ...], dict[str, TensorEntry]]:
    """The manifest's shard and tensor tables, with the given hashes (empty where one is missing)."""
    shards, tensors = [], {}
    for number, file in enumerate(plan.files):
        root = roots.get(file.file, ShardHash(""))
        shards.append(ShardEntry(file.file, file.type, file.size, root, file.expert_key, file.group))
        tensors.update(file.tensor_entries(number))
    return tuple(shards), tensors


def _same_source(path: Path, planned: PlannedFile, root: ShardHash, source: SourceFiles) -> bool:
    if planned.content is not None:
        return object_root(planned.content) == root
    with path.open("rb") as file:
        for position, span in _copies(planned):
            for begin in {0, max(0, span.size - _SAMPLE)}:
                sample = dataclasses.replace(span, offset=span.offset + begin, size=min(_SAMPLE, span.size - begin))
                file.seek(position + begin)
                if file.read(sample.size) != source.read(sample):
                    return False
    return True


def _copies(planned: PlannedFile) -> Iterator[tuple[int, Span]]:
    """Spans that are copied unchanged, each with its position in the output file."""
    position = len(planned.head())
    if planned.original:
        yield position, planned.original
    for piece in planned.pieces:
        if piece.widening is None:
            yield position, piece.span
        position += piece.spec.size
