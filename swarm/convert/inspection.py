"""Looking at a converted directory: what it holds, what loading an expert costs, and whether every byte is what it was.

Opens files for reading only. What is wrong is reported, all of it, rather than raised.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import CheckpointError, ManifestError, StorageError
from moehive.protocol.ids import ModelId
from moehive.protocol.limits import MAX_MANIFEST_BYTES
from moehive.protocol.manifest import MANIFEST_NAME, REPORT_NAME, Manifest, ShardEntry, ShardType, TensorEntry
from moehive.protocol.safetensors_header import PREFIX_SIZE, json_length, parse_header

from .progress import Counter, Progress, silent
from .report import ConversionReport, SourceLayout, Spread

READS_PER_EXPERT = 1  # one file, read once from front to back
_MAX_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """One file that is not as it should be, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tally:
    """Shards of one type."""

    count: int
    bytes: int


@dataclass(frozen=True)
class InspectionReport:
    """What `inspect` found."""

    manifest: Manifest
    shards: Mapping[ShardType, Tally]
    expert_bytes: Spread  # of one expert's file
    source: SourceLayout | None  # None where the directory was not converted here (no conversion.json)
    notes: tuple[str, ...]
    verified: bool  # whether every byte was hashed
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found to be wrong."""
        return not self.faults

    @property
    def model_id(self) -> ModelId:
        """The id of the model that the manifest describes."""
        return self.manifest.model_id

    def to_json(self) -> dict[str, Any]:
        """For `moehive inspect --json`. Sizes in bytes."""
        model = self.manifest.model
        return {
            "modelId": self.model_id,
            "name": model.name,
            "modelType": model.model_type,
            "architecture": model.architecture,
            "dtype": model.dtype,
            "quantization": _quantization(self.manifest),
            "moeLayers": list(model.moe_layers),
            "mtpLayers": list(model.mtp_layers),
            "expertsPerLayer": model.num_experts,
            "topK": model.top_k,
            "shards": {kind.value: {"count": tally.count, "bytes": tally.bytes} for kind, tally in self.shards.items()},
            "perExpert": {"reads": READS_PER_EXPERT, "bytes": self.expert_bytes.to_json()},
            "sourcePerExpert": self.source.to_json() if self.source else None,
            "notes": list(self.notes),
            "verified": self.verified,
            "ok": self.ok,
            "faults": [{"file": fault.file, "reason": fault.reason} for fault in self.faults],
        }


def inspect(
    directory: Path, *, verify: bool = True, expect: ModelId | None = None, progress: Progress = silent
) -> InspectionReport:
    """Inspect a converted directory; with `verify` every byte is hashed, otherwise sizes and headers are compared.

    A manifest names every other byte. What names the manifest is `expect`, or else the id in conversion.json. Raises
    ManifestError where the manifest cannot be read at all, StorageError where the directory cannot be.
    """
    manifest = read_manifest(directory)
    faults = list(_manifest_faults(manifest, expect))
    try:
        report = _read_report(directory)
    except ManifestError as error:
        report = None
        faults.append(Fault(REPORT_NAME, str(error)))
    if report and report.model_id != manifest.model_id:
        faults.append(Fault(MANIFEST_NAME, f"its id is {manifest.model_id}, the conversion made {report.model_id}"))
    faults += _shard_faults(directory, manifest, verify=verify, progress=progress)
    faults += _strange_files(directory, manifest)
    return InspectionReport(
        manifest=manifest,
        shards=_tallies(manifest),
        expert_bytes=Spread.of([shard.size for shard in manifest.experts.values()]),
        source=report.source if report else None,
        notes=report.notes if report else (),
        verified=verify,
        faults=tuple(faults),
    )


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a converted directory. Raises ManifestError, StorageError."""
    path = directory / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except NotADirectoryError as error:
        raise ManifestError(f"{path.parent} is no directory; name one that `moehive convert` wrote") from error
    except FileNotFoundError as error:
        hint = "the directory is not a converted model, or its conversion is not finished"
        raise ManifestError(f"{path} is missing: {hint}") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    try:
        return Manifest.from_bytes(data)
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from error


def _manifest_faults(manifest: Manifest, expect: ModelId | None) -> Iterator[Fault]:
    if expect is not None and manifest.model_id != expect:
        yield Fault(MANIFEST_NAME, f"its id is {manifest.model_id}, not {expect}")


def _read_report(directory: Path) -> ConversionReport | None:
    try:
        return ConversionReport.from_bytes((directory / REPORT_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{directory / REPORT_NAME} cannot be read: {error}") from error


def _shard_faults(directory: Path, manifest: Manifest, *, verify: bool, progress: Progress) -> list[Fault]:
    """The faults of all shards in manifest order. BLAKE3 and reads release the GIL."""
    counter = Counter(sum(shard.size for shard in manifest.shards), progress)

    def check(shard: ShardEntry) -> Fault | None:
        reason = _reason(directory / shard.file, shard, manifest.tensors_of.get(shard.hash, {}), verify=verify)
        counter.add(shard.size, shard.file)
        return Fault(shard.file, reason) if reason else None

    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_WORKERS), thread_name_prefix="inspect") as pool:
        return [fault for fault in pool.map(check, manifest.shards) if fault]


def _reason(path: Path, shard: ShardEntry, tensors: Mapping[str, TensorEntry], *, verify: bool) -> str | None:
    """What is wrong with one shard's file; None where nothing is."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.size:
                return f"it has {size} bytes, not {shard.size}"
            if verify and ChunkList.of_file(file).root != shard.hash:
                return "its bytes do not match the hash in the manifest"
            return _header_reason(file.fileno(), size, tensors) if shard.type is not ShardType.ASSET else None
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error}"


def _header_reason(descriptor: int, size: int, tensors: Mapping[str, TensorEntry]) -> str | None:
    try:
        length = json_length(os.pread(descriptor, PREFIX_SIZE, 0), size)
        spans = parse_header(os.pread(descriptor, length, PREFIX_SIZE), size)
    except CheckpointError as error:
        return str(error)
    found = {name: (span.dtype, span.shape, span.offset, span.size) for name, span in spans.items()}
    wanted = {name: (entry.dtype, entry.shape, entry.offset, entry.size) for name, entry in tensors.items()}
    return None if found == wanted else "its header does not match the manifest's tensor table"


def _strange_files(directory: Path, manifest: Manifest) -> list[Fault]:
    known = {shard.file for shard in manifest.shards} | {MANIFEST_NAME, REPORT_NAME}
    files = (path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    names = sorted({path.relative_to(directory).as_posix() for path in files} - known)
    return [Fault(name, "the manifest does not name it") for name in names]


def _tallies(manifest: Manifest) -> dict[ShardType, Tally]:
    groups = {kind: manifest.of_type(kind) for kind in ShardType}
    return {kind: Tally(len(of), sum(shard.size for shard in of)) for kind, of in groups.items() if of}


def _quantization(manifest: Manifest) -> dict[str, Any] | None:
    quantization = manifest.model.quantization
    if quantization is None:
        return None
    return {"method": quantization.method, "block": list(quantization.block) if quantization.block else None}
