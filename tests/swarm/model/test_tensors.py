"""Shard bytes as tensors: values, memory, alignment."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moehive.protocol.chunks import CHUNK_SIZE, object_root
from moehive.protocol.errors import CorruptShard, ManifestError, StorageError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import (
    ITEM_SIZE,
    ExpertFfn,
    Gate,
    Manifest,
    ModelFacts,
    ShardEntry,
    ShardType,
    TensorEntry,
)  # fmt: skip
from moehive.swarm.model.reading import read_verified, tensor_table, verify_files
from moehive.swarm.model.tensors import ALIGNMENT, TORCH_DTYPE, empty_bytes, short_name, tensors_of


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def table_of(tensors: dict[str, Tensor], path: Path) -> dict[str, TensorEntry]:
    """The manifest's table of a safetensors file, from the file's own header."""
    import json

    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {
        name: TensorEntry(0, 8 + length + start, stop - start, tuple(header[name]["shape"]), header[name]["dtype"])
        for name in tensors
        for start, stop in [header[name]["data_offsets"]]
    }


def test_every_dtype_of_the_format_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    assert set(TORCH_DTYPE) == set(ITEM_SIZE)
    tensors = {name: random_bits(dtype, (3, 4)) for name, dtype in TORCH_DTYPE.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    for buffer in (bytearray(path.read_bytes()), torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)):
        found = tensors_of(buffer, table_of(tensors, path))
        for name, wanted in load_file(path).items():
            assert found[name].dtype == wanted.dtype
            assert found[name].shape == wanted.shape
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


def test_tensors_share_the_buffers_storage() -> None:
    buffer = torch.zeros(64, dtype=torch.uint8)
    table = {"a": TensorEntry(0, 8, 16, (4,), "F32"), "odd": TensorEntry(0, 25, 8, (2,), "F32")}
    found = tensors_of(buffer, table)
    found["a"][0] = 1.0
    assert buffer[8:12].view(torch.float32).item() == 1.0
    assert found["odd"].tolist() == [0.0, 0.0]  # cannot be a view: copied


def test_a_tensor_outside_its_shard_is_an_error() -> None:
    with pytest.raises(ManifestError, match="lies outside its shard of 16 bytes"):
        tensors_of(bytearray(16), {"a": TensorEntry(0, 8, 16, (4,), "F32")})


@given(size=st.integers(0, 4096), offset=st.integers(0, 4096))
def test_the_asked_byte_is_aligned(size: int, offset: int) -> None:
    buffer = empty_bytes(size, offset)
    assert buffer.numel() == size
    assert (buffer.data_ptr() + offset) % ALIGNMENT == 0 or size == 0


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.1.mlp.experts.12.gate_proj.weight", "gate_proj.weight"),
        ("model.layers.1.block_sparse_moe.experts.0.w1.weight_scale_inv", "w1.weight_scale_inv"),
        ("model.layers.1.mlp.experts.3.gate_up_proj_blocks", "gate_up_proj_blocks"),
        ("gate_up_proj", "gate_up_proj"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def shard(path: Path, data: bytes) -> ShardEntry:
    path.write_bytes(data)
    return ShardEntry(path.name, ShardType.ASSET, len(data), object_root(data))


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 77])
def test_verified_bytes_are_the_files(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    entry = shard(tmp_path / "x", data)
    found = read_verified(tmp_path / "x", entry, aligned_offset=size // 2)
    assert found.numpy().tobytes() == data
    verify_files(tmp_path, [entry])


@pytest.mark.parametrize("position", [0, CHUNK_SIZE - 1, CHUNK_SIZE, -1])
def test_every_flipped_byte_is_found(tmp_path: Path, position: int) -> None:
    data = bytearray(random.Random(0).randbytes(2 * CHUNK_SIZE + 5))
    entry = shard(tmp_path / "x", bytes(data))
    data[position] ^= 128
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CorruptShard, match="x does not match its hash"):
        read_verified(tmp_path / "x", entry)
    with pytest.raises(CorruptShard, match="x does not match its hash"):
        verify_files(tmp_path, [entry])


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    entry = shard(tmp_path / "x", b"123")
    (tmp_path / "x").write_bytes(b"1234")
    with pytest.raises(CorruptShard, match=r"x has 4 bytes, object .* has 3"):
        read_verified(tmp_path / "x", entry)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    entry = ShardEntry("gone", ShardType.ASSET, 3, object_root(b"123"))
    for read in (lambda: read_verified(tmp_path / "gone", entry), lambda: verify_files(tmp_path, [entry])):
        with pytest.raises(StorageError, match=r"cannot read .*gone: No such file"):
            read()


def test_shards_of_equal_bytes_keep_their_own_tensors() -> None:
    facts = ModelFacts("m", "t", "A", "F32", 4, 4, 2, 1, (0,), ExpertFfn(Gate.CONCATENATED, "silu"))
    shards = tuple(
        ShardEntry(f"{i}.safetensors", ShardType.EXPERT, 8, object_root(bytes(8)), ExpertKey(0, i)) for i in range(2)
    )
    tensors = {f"experts.{i}.w1.weight": TensorEntry(i, 0, 8, (2,), "F32") for i in range(2)}
    manifest = Manifest(facts, shards, tensors)
    assert [list(tensor_table(manifest, entry)) for entry in shards] == [[name] for name in tensors]
