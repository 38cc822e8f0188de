"""Carrying out a conversion: plan, look at the destination, write what is missing, then the manifest.

A directory is complete when it has a manifest, and the manifest is written last. Until then it may be killed and
continued at any moment; the result is the same, byte for byte. Memory: the plan, and a few blocks of 1 MiB.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moehive.protocol.errors import DestinationError, DiskFull
from moehive.protocol.ids import ShardHash
from moehive.protocol.manifest import MANIFEST_NAME, REPORT_NAME, Manifest
from moehive.protocol.units import format_size

from .destination import JOURNAL_NAME, Existing, is_finished, journal_head, journal_line, survey, tables
from .layout import ConversionPlan, PlannedFile
from .plan import plan_conversion
from .progress import Counter, Progress, silent
from .reading import SourceFiles, blocks
from .report import ConversionReport, SourceLayout
from .source import read_checkpoint
from .writing import BLOCK_SIZE, Block, Disk, make_directory, storage_errors, sync_directory, write_bytes, write_file

BUFFERS = 3  # files being copied at a time
WORKERS = 16  # files in flight; those not being copied wait for the disk
_SLACK = 4096  # bytes of disk that one file may cost beyond its size

R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """What a conversion did. Nothing was written where the destination was complete already."""

    manifest: Manifest
    written: int  # files
    kept: int  # files that an earlier run had finished, verified
    notes: tuple[str, ...]


def convert(source: Path, destination: Path, *, progress: Progress = silent, name: str | None = None) -> Manifest:
    """Convert the Hugging Face checkpoint in `source` to one shard per expert in `destination`.

    Raises UnsupportedModel, CheckpointError, DestinationError, DiskFull, StorageError.
    """
    return Converter(source, destination, progress=progress, name=name).run().manifest


class Converter:
    """One conversion. `name` is the model's name for people; the default is the source directory's."""

    def __init__(
        self,
        source: Path,
        destination: Path,
        *,
        progress: Progress = silent,
        name: str | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._progress = progress
        self._name = name
        self._disk = disk or Disk()
        self._stop = threading.Event()
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._journal_lock = threading.Lock()
        for _ in range(BUFFERS):
            self._buffers.put(memoryview(bytearray(BLOCK_SIZE)))

    def run(self) -> Outcome:
        """Convert, or continue, or find that nothing is left to do. Raises as `convert` does."""
        _check_apart(self._source, self._destination)
        plan = plan_conversion(read_checkpoint(self._source), self._name)
        with storage_errors(self._destination, self._disk):
            return self._carry_out(plan)

    def _carry_out(self, plan: ConversionPlan) -> Outcome:
        existing = survey(self._destination, plan)
        counter = Counter(plan.size, self._progress)
        with SourceFiles(self._source) as source:
            roots = self._verify(plan, existing, source, counter)
            missing = [file for file in plan.files if file.file not in roots]
            self._check_space(missing, existing)
            self._begin(plan, existing, roots, complete=not missing)
            roots.update(self._write_all(missing, source, counter))
            source.check_unchanged()
        manifest = self._finish(plan, roots)
        return Outcome(manifest, len(missing), len(plan.files) - len(missing), plan.notes)

    # --- steps ----------------------------------------------------------------------------------------------------

    def _verify(
        self, plan: ConversionPlan, existing: Existing, source: SourceFiles, counter: Counter
    ) -> dict[str, ShardHash]:
        """The hashes of the files that an earlier run finished and that are still what they were."""

        def check(file: PlannedFile) -> tuple[PlannedFile, bool]:
            finished = is_finished(self._destination, file, existing.known[file.file], source)
            if finished:
                counter.add(file.size, file.file)
            return file, finished

        claimed = [file for file in plan.files if file.file in existing.known]
        return {file.file: existing.known[file.file] for file, finished in self._map(check, claimed) if finished}

    def _check_space(self, missing: list[PlannedFile], existing: Existing) -> None:
        needed = sum(file.size + _SLACK for file in missing)
        place = next(path for path in (self._destination, *self._destination.absolute().parents) if path.exists())
        free = self._disk.free(place) + sum(path.lstat().st_size for path in existing.leftovers)
        if missing and needed > free:
            raise DiskFull(
                f"{self._destination}: {format_size(needed)} are needed, {format_size(free)} are free; "
                "make room or choose another disk"
            )

    def _begin(
        self, plan: ConversionPlan, existing: Existing, roots: Mapping[str, ShardHash], *, complete: bool
    ) -> None:
        """Clear what a killed run left; where something is to be written, open the journal and close the manifest."""
        for path in existing.leftovers:
            path.unlink()
        if complete and existing.manifest:
            return
        make_directory(self._destination, self._disk)
        lines = b"".join(journal_line(file, root) for file, root in roots.items())
        write_bytes(self._destination / JOURNAL_NAME, journal_head(plan) + lines, self._disk)
        if existing.manifest:  # a damaged file is repaired: until then the directory is not complete
            (self._destination / MANIFEST_NAME).unlink()
            sync_directory(self._destination)

    def _write_all(self, missing: list[PlannedFile], source: SourceFiles, counter: Counter) -> dict[str, ShardHash]:
        if not missing:
            return {}
        directories = sorted({(self._destination / file.file).parent for file in missing})
        for directory in directories:
            make_directory(directory, self._disk)
        journal = os.open(self._destination / JOURNAL_NAME, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            roots = dict(self._map(lambda file: self._write(file, source, counter, journal), missing))
        finally:
            os.close(journal)
        for directory in directories:  # the manifest must not outlive a name that it lists
            sync_directory(directory)
        return roots

    def _write(self, file: PlannedFile, source: SourceFiles, counter: Counter, journal: int) -> tuple[str, ShardHash]:
        path = self._destination / file.file

        def written(count: int) -> None:
            if self._stop.is_set():
                raise CancelledError
            counter.add(count, file.file)

        root = write_file(path, self._content(file, source), file.size, self._disk, written).root
        with self._journal_lock, storage_errors(path, self._disk):
            os.write(journal, journal_line(file.file, root))  # not synced: a lost line costs one file's work
        return file.file, root

    def _content(self, file: PlannedFile, source: SourceFiles) -> Generator[Block]:
        """The file's blocks in a buffer that is borrowed until the last one is taken."""
        buffer = self._buffers.get()
        try:
            yield from blocks(file, source, buffer)
        finally:
            self._buffers.put(buffer)

    def _finish(self, plan: ConversionPlan, roots: Mapping[str, ShardHash]) -> Manifest:
        manifest = Manifest(plan.model, *tables(plan, roots))
        manifest.check()
        report = ConversionReport(manifest.model_id, SourceLayout.of(plan), plan.notes)
        for name, content in ((REPORT_NAME, report.to_bytes()), (MANIFEST_NAME, manifest.to_bytes())):
            path = self._destination / name
            if not path.exists() or path.read_bytes() != content:
                write_bytes(path, content, self._disk)
        (self._destination / JOURNAL_NAME).unlink(missing_ok=True)
        sync_directory(self._destination)
        return manifest

    # --- threads --------------------------------------------------------------------------------------------------

    def _map(self, work: Callable[[PlannedFile], R], files: Iterable[PlannedFile]) -> list[R]:
        """`work` on every file, several at a time. The first error stops the others and is raised."""
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="convert") as pool:
            futures = [pool.submit(work, file) for file in files]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _check_apart(source: Path, destination: Path) -> None:
    one, other = source.resolve(), destination.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise DestinationError(f"{destination} and {source} lie within each other; choose another destination")
