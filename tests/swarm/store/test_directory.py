from pathlib import Path
from random import Random

import pytest

from moehive.protocol.chunks import CHUNK_SIZE, object_root
from moehive.protocol.errors import CorruptShard, ManifestError
from moehive.protocol.ids import ExpertKey, ShardHash
from moehive.protocol.limits import MAX_MANIFEST_BYTES
from moehive.protocol.manifest import MANIFEST_NAME, ExpertFfn, Gate, Manifest, ModelFacts, ShardEntry, ShardType
from moehive.swarm.store.base import NotHeld, ObjectSource
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.store.reading import read_object

FILES = {"experts/0_0.safetensors": Random(0).randbytes(CHUNK_SIZE + 1), "experts/0_1.safetensors": b"small"}
FIRST, SECOND = (object_root(data) for data in FILES.values())


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    model = ModelFacts(
        name="tiny",
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        dtype="BF16",
        hidden_size=4,
        intermediate_size=4,
        num_experts=2,
        top_k=1,
        moe_layers=(0,),
        ffn=ExpertFfn(Gate.CONCATENATED, "silu"),
    )
    shards = tuple(
        ShardEntry(file, ShardType.EXPERT, len(data), object_root(data), ExpertKey(0, expert))
        for expert, (file, data) in enumerate(FILES.items())
    )
    for file, data in FILES.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    (tmp_path / MANIFEST_NAME).write_bytes(Manifest(model, shards, {}).to_bytes())
    return tmp_path


def test_every_file_and_the_manifest_are_found_by_their_hash(converted: Path) -> None:
    source: ObjectSource = ConvertedDirectory(converted)
    for file, data in FILES.items():
        assert source.path(object_root(data)) == converted / file
        assert read_object(source, object_root(data), len(data)) == data
        assert source.chunk_list(object_root(data)).root == object_root(data)
    assert source.read_range(FIRST, CHUNK_SIZE - 1, 2) == FILES["experts/0_0.safetensors"][-2:]
    directory = ConvertedDirectory(converted)
    manifest = (converted / MANIFEST_NAME).read_bytes()
    assert directory.read_range(ShardHash(directory.model_id), 0, len(manifest)) == manifest


def test_verify_names_what_is_wrong_and_hides_it(converted: Path) -> None:
    directory, seen = ConvertedDirectory(converted), []
    assert directory.verify(progress=seen.append) == {}
    assert sorted(seen) == [0, 5, CHUNK_SIZE + 1]
    (converted / "experts/0_1.safetensors").write_bytes(b"smalL")
    (converted / "experts/0_0.safetensors").unlink()
    assert directory.path(FIRST) is None
    assert directory.path(SECOND) is not None
    faults = directory.verify([SECOND, FIRST])
    assert {name: type(fault) for name, fault in faults.items()} == {SECOND: CorruptShard, FIRST: NotHeld}
    assert directory.path(SECOND) is None
    assert (converted / "experts/0_1.safetensors").read_bytes() == b"smalL", "the user's file is left alone"


def test_a_file_that_changes_after_it_was_hashed_is_not_served(converted: Path) -> None:
    directory = ConvertedDirectory(converted)
    directory.chunk_list(SECOND)
    (converted / "experts/0_1.safetensors").write_bytes(b"other")
    with pytest.raises(CorruptShard):
        directory.read_range(SECOND, 0, 1)
    with pytest.raises(NotHeld):
        directory.read_range(SECOND, 0, 1)


def test_a_manifest_that_is_missing_edited_or_huge_is_refused(converted: Path) -> None:
    path = converted / MANIFEST_NAME
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ManifestError, match="canonical"):
        ConvertedDirectory(converted)
    with path.open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ManifestError, match="at most"):
        ConvertedDirectory(converted)
    path.unlink()
    with pytest.raises(ManifestError, match="moehive convert"):
        ConvertedDirectory(converted)
