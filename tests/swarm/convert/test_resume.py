"""Killed at any moment, out of disk, damaged in between: run again, the result is the same, byte for byte."""

import errno
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.raw_checkpoint import contents, write_checkpoint

from moehive.protocol.errors import CheckpointError, DiskFull
from moehive.swarm.convert import Converter, convert, inspect
from moehive.swarm.convert.writing import Disk, Part

# Says how many bytes are done after every block; the parent kills it when it has heard enough.
_CHILD = """
import sys
from pathlib import Path
from moehive.swarm.convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), name="m", progress=lambda done, *_: print(done, flush=True))
"""


def run_child(source: Path, destination: Path, until: int) -> bool:
    """Convert in a process of its own and kill it once `until` bytes are done; whether it was killed before its end."""
    command = [sys.executable, "-c", _CHILD, str(source), str(destination)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        for line in child.stdout:
            if int(line) >= until:
                child.kill()
                break
        return child.wait(timeout=60) != 0


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", hidden=128, intermediate=256, experts=8, layers=4, files=3)
    expected = convert(source, tmp_path / "uninterrupted", name="m")
    size = sum(shard.size for shard in expected.shards)
    destination = tmp_path / "converted"
    moments = sorted(random.Random(7).randrange(size) for _ in range(10))
    killed = [run_child(source, destination, moment) for moment in moments]
    assert sum(killed) >= 8  # one that was almost done may have finished between its last word and its end
    assert convert(source, destination, name="m") == expected
    assert contents(destination) == contents(tmp_path / "uninterrupted")


def test_finished_files_are_kept(tmp_path: Path) -> None:
    source, destination = write_checkpoint(tmp_path / "source"), tmp_path / "converted"
    interrupt(source, destination, after=5)
    kept = {path: path.stat().st_mtime_ns for path in destination.rglob("*.safetensors")}
    assert kept
    outcome = Converter(source, destination).run()
    assert outcome.kept >= len(kept)
    assert outcome.written + outcome.kept == len(outcome.manifest.shards)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


class Unplugged(Exception):
    """The test pulls the plug in the middle of a conversion."""


def interrupt(source: Path, destination: Path, after: int) -> None:
    """Stop a conversion after some blocks."""
    left = after

    def pull(done: int, total: int, file: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Unplugged

    with pytest.raises(Unplugged):
        Converter(source, destination, progress=pull).run()


def test_a_finished_file_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    source, destination = write_checkpoint(tmp_path / "source"), tmp_path / "converted"
    expected = convert(source, tmp_path / "expected")
    interrupt(source, destination, after=6)
    for path in destination.rglob("*.safetensors"):
        flip(path, path.stat().st_size - 1)
    assert convert(source, destination) == expected
    assert contents(destination) == contents(tmp_path / "expected")


def test_a_complete_destination_is_left_as_it_is(tmp_path: Path) -> None:
    source, destination = write_checkpoint(tmp_path / "source"), tmp_path / "converted"
    manifest = convert(source, destination)
    before = {path: path.stat().st_mtime_ns for path in destination.rglob("*")}
    outcome = Converter(source, destination).run()
    assert (outcome.manifest, outcome.written) == (manifest, 0)
    assert {path: path.stat().st_mtime_ns for path in destination.rglob("*")} == before


def test_a_complete_destination_with_a_damaged_file_is_repaired(tmp_path: Path) -> None:
    source, destination = write_checkpoint(tmp_path / "source"), tmp_path / "converted"
    convert(source, destination)
    before = contents(destination)
    flip(destination / "experts/00001/00002.safetensors", 5000)
    (destination / "experts/00000/00001.safetensors").unlink()
    (destination / "conversion.json").unlink()
    assert Converter(source, destination).run().written == 2
    assert contents(destination) == before


def test_partial_files_are_removed_whatever_they_were_to_become(tmp_path: Path) -> None:
    source, destination = write_checkpoint(tmp_path / "source"), tmp_path / "converted"
    expected = convert(source, destination)
    before = contents(destination)
    for name in (".partial-manifest.json", "experts/00000/.partial-99999.safetensors"):
        (destination / name).write_bytes(b"half")
    assert convert(source, destination) == expected
    assert contents(destination) == before


def test_an_unfinished_conversion_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    from moehive.protocol.errors import DestinationError

    destination = tmp_path / "converted"
    interrupt(write_checkpoint(tmp_path / "a" / "m"), destination, after=6)
    before = contents(destination)
    for name, shape in (("b", {"layers": 3}), ("c", {"seed": 1})):
        with pytest.raises(DestinationError, match="another checkpoint"):
            convert(write_checkpoint(tmp_path / name / "m", **shape), destination)
    assert contents(destination) == before


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# --- the disk -----------------------------------------------------------------------------------------------------


class SmallDisk(Disk):
    """Full after `room` bytes, and, unless `honest`, without saying so beforehand."""

    def __init__(self, room: int, *, honest: bool = False) -> None:
        self.room = room
        self._honest = honest

    def free(self, directory: Path) -> int:
        return self.room if self._honest else 1 << 50

    def write(self, descriptor: int, part: Part, done: int) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = super().write(descriptor, Part(part.data[: done + self.room]), done)
        self.room -= count
        return count


@pytest.mark.parametrize("room", [0, 1, 30_000, 60_000])
def test_a_disk_that_fills_up_stops_it_and_loses_nothing(room: int, tmp_path: Path) -> None:
    source, destination = write_checkpoint(tmp_path / "source"), tmp_path / "converted"
    expected = convert(source, tmp_path / "expected")
    with pytest.raises(DiskFull, match=r"the disk is full.*make room and run the same command again"):
        Converter(source, destination, disk=SmallDisk(room)).run()
    assert not (destination / "manifest.json").exists()
    assert [path.name for path in destination.rglob(".partial-*")] in ([], [".partial-journal"])
    assert convert(source, destination) == expected
    assert contents(destination) == contents(tmp_path / "expected")


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    destination = tmp_path / "converted"
    with pytest.raises(DiskFull, match=r"[\d.]+ KiB are needed, 48\.8 KiB are free"):
        Converter(write_checkpoint(tmp_path / "source"), destination, disk=SmallDisk(50_000, honest=True)).run()
    assert not destination.exists()


def test_a_disk_that_takes_a_few_bytes_at_a_time_is_enough(tmp_path: Path) -> None:
    class Slow(Disk):
        def write(self, descriptor: int, part: Part, done: int) -> int:
            return os.write(descriptor, part.data[done : done + 1000])

    source = write_checkpoint(tmp_path / "source")
    expected = convert(source, tmp_path / "expected")
    assert Converter(source, tmp_path / "converted", disk=Slow()).run().manifest == expected
    assert contents(tmp_path / "converted") == contents(tmp_path / "expected")


def test_a_source_cut_after_its_header_was_read_is_reported(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    os.truncate(source / "model-00002-of-00002.safetensors", 5000)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "converted")


# --- memory and progress ------------------------------------------------------------------------------------------

_MEASURED = """
import resource, sys
from pathlib import Path
from moehive.swarm.convert import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Path(sys.argv[1]), Path(sys.argv[2]))
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """192 MB of experts, 12 MB each, in one file: a few buffers of 1 MiB, and neither torch nor transformers."""
    source = write_checkpoint(tmp_path / "source", hidden=1024, intermediate=2048, experts=8, layers=2, files=1)
    command = [sys.executable, "-c", _MEASURED, str(source), str(tmp_path / "converted")]
    grown = int(subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout)  # KiB
    assert resource.RLIMIT_AS  # ru_maxrss is in KiB on Linux, the platform of this test
    assert grown < 24 << 10
    assert inspect(tmp_path / "converted").ok


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    manifest = convert(
        write_checkpoint(tmp_path / "source"),
        tmp_path / "converted",
        progress=lambda done, total, file: heard.append((done, total, file)),
    )
    total = sum(shard.size for shard in manifest.shards)
    assert [done for done, _, _ in heard] == sorted(done for done, _, _ in heard)
    assert heard[-1][0] == total
    assert {size for _, size, _ in heard} == {total}
    assert {file for _, _, file in heard} == {shard.file for shard in manifest.shards}
