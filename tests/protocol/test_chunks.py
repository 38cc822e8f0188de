import io
import itertools

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_count, chunk_hash, chunk_range, object_root, runs
from moehive.protocol.ids import is_hash

sizes = st.one_of(
    st.integers(0, 3 * CHUNK_SIZE),
    st.sampled_from([0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE]),
)


def content(size: int, seed: int = 0) -> bytes:
    return blake3(seed.to_bytes(8, "big")).digest(length=size)


def test_a_root_is_a_hash_and_fixed_by_the_format() -> None:
    """The format's own values: they must never change under the name blake3-chunked."""
    assert object_root(b"") == "78627f24a8b8d8165c6783bc6716f8391ffbcdc773995785d0445dd4d36cb3ec"
    assert object_root(b"moehive") == "e21d0492e85233243d1c36e6c28367def16cc12e48d7884ab2c0db067a9966d1"
    assert object_root(bytes(CHUNK_SIZE + 1)) == "9115be44d0b52bd5cda2d5718a247ca32866737ca66f5c73dba14ef50d981b03"
    assert is_hash(object_root(b""))


def test_a_chunks_hash_is_not_its_objects_root() -> None:
    data = content(100)
    assert chunk_hash(data).hex() != object_root(data)


@given(sizes)
def test_chunks_cover_an_object_without_gaps(size: int) -> None:
    ranges = [chunk_range(index, size) for index in range(chunk_count(size))]
    assert [offset for offset, _ in ranges] == [index * CHUNK_SIZE for index in range(len(ranges))]
    assert sum(length for _, length in ranges) == size
    assert all(0 < length <= CHUNK_SIZE for _, length in ranges)


@given(sizes)
def test_a_file_and_memory_have_the_same_chunk_list(size: int) -> None:
    data = content(size)
    chunks = ChunkList.of(data)
    assert ChunkList.of_file(io.BytesIO(data)) == chunks
    assert ChunkList.from_bytes(size, chunks.to_bytes()) == chunks
    assert all(chunks.matches(i, data[i * CHUNK_SIZE : (i + 1) * CHUNK_SIZE]) for i in range(chunk_count(size)))


class Trickle(io.RawIOBase):
    """A file that gives a few bytes at a time, as pipes and network file systems may."""

    def __init__(self, data: bytes) -> None:
        self._rest = io.BytesIO(data)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._rest.readinto(buffer[: CHUNK_SIZE // 3 + 7])


def test_short_reads_do_not_move_chunk_boundaries() -> None:
    data = content(2 * CHUNK_SIZE + 5)
    assert ChunkList.of_file(Trickle(data)) == ChunkList.of(data)  # type: ignore[arg-type]


@given(st.integers(1, 2 * CHUNK_SIZE), st.data())
def test_a_flipped_bit_is_found_in_its_chunk_only(size: int, data: st.DataObject) -> None:
    original = content(size)
    chunks = ChunkList.of(original)
    position = data.draw(st.integers(0, size - 1))
    damaged = bytearray(original)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    for index in range(chunk_count(size)):
        piece = damaged[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]
        assert chunks.matches(index, piece) == (index != position // CHUNK_SIZE)
    assert object_root(damaged) != chunks.root


def test_a_chunk_of_the_wrong_length_never_matches() -> None:
    data = content(CHUNK_SIZE + 10)
    chunks = ChunkList.of(data)
    assert not chunks.matches(1, data[CHUNK_SIZE:-1])
    assert not chunks.matches(1, data[CHUNK_SIZE:] + b"\0")


@given(sizes, sizes)
def test_the_size_is_part_of_the_root(size: int, other: int) -> None:
    hashes = ChunkList.of(content(size)).hashes
    assert (ChunkList(size, hashes).root == ChunkList(other, hashes).root) == (size == other)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_chunk_list_of_the_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="bytes of chunk hashes"):
        ChunkList.from_bytes(10, bytes(length))


@given(st.sets(st.integers(0, 60)))
def test_runs_are_the_maximal_ranges(indices: set[int]) -> None:
    found = runs(sorted(indices))
    assert [index for run in found for index in run] == sorted(indices)
    assert all(first.stop < second.start for first, second in itertools.pairwise(found))
