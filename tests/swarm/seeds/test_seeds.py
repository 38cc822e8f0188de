"""Whatever it is made of, a seed gives the bytes that the manifest names, or an error that names the file."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
from support.checkpoints import Checkpoints
from support.hub_server import COMMIT, HubServer

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.errors import ConfigError, SeedChanged, SeedError
from moehive.protocol.ids import ExpertKey, ShardHash
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.swarm.seeds import opening
from moehive.swarm.seeds.base import Seed, SeedName, parse_seed
from moehive.swarm.seeds.opening import open_seed
from moehive.swarm.store.directory import ConvertedDirectory

# single, fused, dequantised, one file, packed, the skeleton packed too
FAMILIES = ("mixtral", "gpt_oss_mxfp4", "deepseek_v3_fp8", "qwen3_moe", "kimi_k2_int4", "mixtral_gptq")


def manifest_of(checkpoints: Checkpoints, family: str) -> Manifest:
    return ConvertedDirectory(checkpoints.converted(family)).manifest


def whole(seed: Seed, shard: ShardEntry) -> bytes:
    chunks = seed.chunk_list(shard.hash)
    data = b"".join(
        seed.read_range(shard.hash, at, min(CHUNK_SIZE, shard.size - at)) for at in range(0, shard.size, CHUNK_SIZE)
    )
    assert chunks == ChunkList.of(data)
    return data


def check_all(seed: Seed, manifest: Manifest, converted: Path) -> None:
    for shard in manifest.shards:
        assert seed.offers(shard.hash)
        assert whole(seed, shard) == (converted / shard.file).read_bytes(), shard.file


@pytest.mark.parametrize("keep", [0, opening.KEEP_BYTES])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_gives_every_byte_of_its_conversion(
    checkpoints: Checkpoints, family: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, converted = manifest_of(checkpoints, family), checkpoints.converted(family)
    seed = open_seed(parse_seed(str(checkpoints.source(family))), manifest)
    seed._images.limit = keep  # type: ignore[attr-defined]
    check_all(seed, manifest, converted)
    seed.close()


def test_a_converted_directory_is_a_seed_too(checkpoints: Checkpoints) -> None:
    manifest, converted = manifest_of(checkpoints, "mixtral"), checkpoints.converted("mixtral")
    check_all(open_seed(parse_seed(str(converted)), manifest), manifest, converted)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3_fp8"])
def test_the_hub_gives_every_byte_too_and_only_ranges_of_large_files_travel(
    checkpoints: Checkpoints, hub: HubServer, family: str
) -> None:
    manifest, converted = manifest_of(checkpoints, family), checkpoints.converted(family)
    seed = open_seed(parse_seed(f"hub:org/{family}"), manifest)
    headers = sum(last - first + 1 for _, first, last in hub.ranges)
    hub.ranges.clear()
    expert = manifest.experts[ExpertKey(manifest.model.moe_layers[0], 1)]
    assert whole(seed, expert) == (converted / expert.file).read_bytes()
    assert sum(last - first + 1 for _, first, last in hub.ranges) <= expert.size, "read twice"
    check_all(seed, manifest, converted)
    assert not any(request.startswith("GET") and "main" in request for request in hub.requests if "resolve" in request)
    assert headers < 1 << 20
    seed.close()


def test_weights_in_the_hub_cache_are_read_there(
    checkpoints: Checkpoints, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    snapshot_download("org/mixtral")
    hub.ranges.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    manifest = manifest_of(checkpoints, "mixtral")
    check_all(open_seed(parse_seed("hub:org/mixtral"), manifest), manifest, checkpoints.converted("mixtral"))
    assert hub.ranges == []


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(checkpoints: Checkpoints, tmp_path: Path) -> tuple[Path, Manifest, ShardEntry]:
    """A checkpoint one of whose weights was changed after the conversion, and the shard that it is in."""
    source = Path(copytree(checkpoints.source("mixtral"), tmp_path / "changed"))
    manifest = manifest_of(checkpoints, "mixtral")
    shard = manifest.experts[ExpertKey(1, 3)]
    piece = (checkpoints.converted("mixtral") / shard.file).read_bytes()[-64:]
    for path in source.glob("*.safetensors"):
        data = path.read_bytes()
        if piece in data:
            path.write_bytes(data.replace(piece, bytes(64)))
            return source, manifest, shard
    raise AssertionError("the shard's bytes are not in the source")


def test_a_changed_checkpoint_is_named_and_the_rest_of_it_serves_on(
    changed: tuple[Path, Manifest, ShardEntry],
) -> None:
    source, manifest, shard = changed
    seed = open_seed(parse_seed(str(source)), manifest)
    for ask in (seed.chunk_list, lambda key: seed.read_range(key, 0, 1)):
        with pytest.raises(SeedChanged, match=r"model\S*\.safetensors changed since .*experts/00001/00003"):
            ask(shard.hash)
    assert not seed.offers(shard.hash)
    other = manifest.experts[ExpertKey(1, 2)]
    assert len(whole(seed, other)) == other.size


def test_bytes_that_change_after_they_were_verified_do_not_leave(
    checkpoints: Checkpoints, changed: tuple[Path, Manifest, ShardEntry], tmp_path: Path
) -> None:
    source, manifest, shard = changed
    good = Path(copytree(checkpoints.source("mixtral"), tmp_path / "good"))
    seed = open_seed(parse_seed(str(good)), manifest)
    assert seed.chunk_list(shard.hash).root == shard.hash
    for path in source.glob("*.safetensors"):
        (good / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SeedChanged, match="changed since"):
        whole(seed, shard)


def test_the_checkpoint_of_another_model_is_refused_with_what_differs(checkpoints: Checkpoints) -> None:
    with pytest.raises(SeedChanged, match=r"another model than .*: its model_type is qwen3_moe, not mixtral"):
        open_seed(parse_seed(str(checkpoints.source("qwen3_moe"))), manifest_of(checkpoints, "mixtral"))


def test_what_is_no_checkpoint_is_said(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(SeedError, match="not a Hugging Face checkpoint"):
        open_seed(parse_seed(str(tmp_path)), manifest_of(checkpoints, "mixtral"))


def test_a_damaged_file_of_a_converted_directory_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    converted = Path(copytree(checkpoints.converted("mixtral"), tmp_path / "copy"))
    manifest = manifest_of(checkpoints, "mixtral")
    shard = manifest.experts[ExpertKey(0, 0)]
    (converted / shard.file).write_bytes(bytes(shard.size))
    seed = open_seed(parse_seed(str(converted)), manifest)
    with pytest.raises(SeedChanged, match=r"experts/00000/00000\.safetensors does not match"):
        seed.chunk_list(shard.hash)
    assert not seed.offers(shard.hash)


def test_an_object_that_is_not_the_models(checkpoints: Checkpoints) -> None:
    seed = open_seed(parse_seed(str(checkpoints.source("mixtral"))), manifest_of(checkpoints, "mixtral"))
    unknown = ShardHash("0" * 64)
    assert not seed.offers(unknown)
    with pytest.raises(SeedError, match="no object"):
        seed.chunk_list(unknown)


def test_a_hub_that_breaks_off_is_asked_for_the_rest(checkpoints: Checkpoints, hub: HubServer) -> None:
    manifest = manifest_of(checkpoints, "mixtral")
    seed = open_seed(parse_seed("hub:org/mixtral"), manifest)
    shard = manifest.experts[ExpertKey(0, 0)]
    hub.faults.break_off_after, hub.faults.breaks = 1000, 3
    assert whole(seed, shard) == (checkpoints.converted("mixtral") / shard.file).read_bytes()
    hub.faults.breaks = 1 << 30
    with pytest.raises(SeedError, match=r"seed hub:org/mixtral: model\S*safetensors of org/mixtral: the hub broke off"):
        seed.chunk_list(manifest.experts[ExpertKey(0, 1)].hash)


def test_a_hub_without_ranges_is_said_before_a_whole_file_travels(checkpoints: Checkpoints, hub: HubServer) -> None:
    hub.faults.ignore_ranges = True
    with pytest.raises(SeedError, match="does not send ranges"):
        open_seed(parse_seed("hub:org/mixtral"), manifest_of(checkpoints, "mixtral"))


def test_a_repository_that_is_not_there(checkpoints: Checkpoints, hub: HubServer) -> None:
    with pytest.raises(SeedError, match="seed hub:org/nothing: "):
        open_seed(parse_seed("hub:org/nothing"), manifest_of(checkpoints, "mixtral"))


# --- names ------------------------------------------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    assert parse_seed(str(tmp_path)) == SeedName(str(tmp_path), directory=tmp_path)
    assert parse_seed("hub:org/model") == SeedName("hub:org/model", repo="org/model")
    assert parse_seed(f"hub:org/model@{COMMIT}").revision == COMMIT
    assert parse_seed("hub:gpt2@refs/pr/1").revision == "refs/pr/1"


@pytest.mark.parametrize("text", ["/nowhere/at/all", "hub:", "hub:a/b/c", "hub:a/b@", "hub:a b", "hub:a/b@x y"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ConfigError, match="seed "):
        parse_seed(text)
