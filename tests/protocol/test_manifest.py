import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol import limits
from moehive.protocol.errors import ManifestError
from moehive.protocol.ids import ExpertKey, ShardHash
from moehive.protocol.manifest import (
    ITEM_SIZE,
    ExpertFfn,
    Gate,
    Layout,
    Manifest,
    ModelFacts,
    Quantization,
    QuantMethod,
    ShardEntry,
    ShardingStrategy,
    ShardType,
    TensorEntry,
    is_safe_path,
)

hashes = st.binary(min_size=32, max_size=32).map(lambda raw: ShardHash(raw.hex()))
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
numbers = st.floats(-1e9, 1e9)
ffns = st.builds(
    ExpertFfn, st.sampled_from(Gate), texts, st.booleans(), st.booleans(), st.none() | numbers, st.none() | numbers
)
quantizations = st.none() | st.builds(
    Quantization, st.sampled_from(QuantMethod), st.none() | st.tuples(st.integers(1, 512), st.integers(1, 512))
)

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A consistent manifest: every expert of every layer once, other files, tensors inside the files."""
    experts = draw(st.integers(1, 3))
    layers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True).map(sorted))
    cut = draw(st.integers(1, len(layers)))
    model = ModelFacts(
        name=draw(texts), model_type=draw(texts), architecture=draw(texts), dtype="BF16",
        hidden_size=draw(st.integers(1, 9999)), intermediate_size=draw(st.integers(1, 9999)), num_experts=experts,
        top_k=draw(st.integers(1, experts)), moe_layers=tuple(layers[:cut]), mtp_layers=tuple(layers[cut:]),
        ffn=draw(ffns), quantization=draw(quantizations),
    )  # fmt: skip
    keys: list[ExpertKey | None] = [ExpertKey(layer, expert) for layer in layers for expert in range(experts)]
    kinds = [ShardType.DENSE, ShardType.SHARED, ShardType.ASSET, ShardType.ADAPTER]
    shards = []
    for number, key in enumerate(keys + [None] * draw(st.integers(0, 3))):
        kind = ShardType.EXPERT if key else draw(st.sampled_from(kinds))
        group = draw(st.none() | st.just("mtp"))
        shards.append(ShardEntry(f"part/{number}.bin", kind, draw(st.integers(0, 1 << 34)), draw(hashes), key, group))
    tensors = {}
    for number, shard in enumerate(shards):
        dtype, shape = (
            draw(st.sampled_from(sorted(ITEM_SIZE))),
            draw(st.lists(st.integers(0, 9), max_size=3).map(tuple)),
        )
        size = ITEM_SIZE[dtype]
        for length in shape:
            size *= length
        if size <= shard.size:
            offset = draw(st.integers(0, shard.size - size))
            tensors[f"{number}.{draw(texts)}"] = TensorEntry(
                number, offset, size, shape, dtype, draw(st.sampled_from(Layout))
            )
    return Manifest(
        model, tuple(shards), tensors, draw(st.sampled_from(ShardingStrategy)), draw(st.sampled_from(Layout))
    )


@given(manifests())
def test_a_manifest_survives_its_bytes(manifest: Manifest) -> None:
    manifest.check()
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert again.to_bytes() == data
    assert again.model_id == manifest.model_id


@given(manifests(), st.data())
def test_perturbed_bytes_are_read_or_refused(manifest: Manifest, data: st.DataObject) -> None:
    """Never another exception; what is read is canonical, and then it is another model or the same bytes."""
    raw = bytearray(manifest.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        found = Manifest.from_bytes(bytes(raw))
    except ManifestError:
        return
    assert found.to_bytes() == bytes(raw)
    assert (found.model_id == manifest.model_id) == (bytes(raw) == manifest.to_bytes())


@given(documents)
def test_any_json_is_refused(document: Any) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_bytes(json.dumps(document).encode())


def small() -> Manifest:
    ffn = ExpertFfn(Gate.CONCATENATED, "silu")
    model = ModelFacts("m", "mixtral", "MixtralForCausalLM", "BF16", 4, 2, 2, 1, (0,), ffn)
    shards = tuple(
        ShardEntry(f"experts/{expert}", ShardType.EXPERT, 100, ShardHash(f"{expert}" * 64), ExpertKey(0, expert))
        for expert in range(2)
    )
    return Manifest(model, shards, {"w": TensorEntry(1, 84, 16, (2, 4), "BF16")})


def edited(path: str, value: Any) -> bytes:
    """The small manifest's canonical bytes with one place changed; a value of None removes it."""
    document = json.loads(small().to_bytes())
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is None:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def test_the_canonical_form_is_fixed() -> None:
    """The bytes whose hash is the model id: a change here is a new version of the format."""
    assert Manifest.from_bytes(edited("model.name", "m")) == small()
    assert small().to_bytes().startswith(b'{"chunkSize":1048576,"defaultWeightLayout":"row","format":"moehive",')
    assert small().model_id == "34bca19cf21aa6f916a70e50c48b243f46fba85a544317a24ce1bc08b422e893"


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("version", 2, "this build reads"),
        ("format", "other", "this build reads"),
        ("hashAlgorithm", "sha256", "this build reads"),
        ("chunkSize", 1 << 19, "chunkSize"),
        ("more", 1, "unknown key"),
        ("model.more", 1, "unknown key"),
        ("shards.0.more", 1, "unknown key"),
        ("tensors.w.more", 1, "unknown key"),
        ("model.name", None, "missing"),
        ("model.name", 1, "wrong type"),
        ("model.topK", True, "wrong type"),
        ("model.topK", 1 << 60, "too large"),
        ("model.topK", 3, "impossible model sizes"),
        ("model.hiddenSize", 0, "impossible model sizes"),
        ("model.numExperts", 3, "expert 0_2 is missing"),
        ("model.moeLayers", [], "moeLayers"),
        ("model.moeLayers", [0, 0], "moeLayers"),
        ("model.moeLayers", [1], "missing or is not one"),
        ("model.quantization", {"method": "fp8-block", "block": [0, 1]}, "positive sizes"),
        ("model.quantization", {"method": "fp8-block", "block": [1]}, "positive sizes"),
        ("model.quantization", {"method": "int3"}, "'method' is 'int3', not one of"),
        ("model.expertFfn.gate", "open", "not one of"),
        ("shards.0.expertKey", "00_0", "expertKey"),
        ("shards.0.expertKey", "0_1", "the same expert"),
        ("shards.0.file", "experts/1", "the same file"),
        ("shards.0.file", "../x", "not allowed"),
        ("shards.0.hash", "0" * 63, "malformed"),
        ("shards.0.hash", "A" * 64, "malformed"),
        ("shards.0.size", -1, "malformed"),
        ("shards.0.size", limits.MAX_SHARD_BYTES + 1, "malformed"),
        ("shards.0.type", "dense", "expertKey"),
        ("tensors.w.dtype", "F7", "unknown dtype"),
        ("tensors.w.shard", 2, "malformed"),
        ("tensors.w.shape", [-2, -4], "malformed"),
        ("tensors.w.shape", [1] * 9, "malformed"),
        ("tensors.w.shape", [2, 5], "do not fit"),
        ("tensors.w.offset", 85, "outside its shard"),
        ("tensors.w.offset", -1, "outside its shard"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(path: str, value: Any, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        Manifest.from_bytes(edited(path, value))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"[" * 200_000, small().to_bytes() + b"\n", b" " + small().to_bytes()]
)
def test_bytes_that_are_not_canonical_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_bytes(data)


def test_too_many_bytes_are_not_even_parsed() -> None:
    with pytest.raises(ManifestError, match="at most"):
        Manifest.from_bytes(bytes(limits.MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize("path", ["config.json", "experts/00001/00002.safetensors", "a-b_c.d"])
def test_safe_paths(path: str) -> None:
    assert is_safe_path(path)


@pytest.mark.parametrize(
    "path",
    ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "./a", ".hidden", "a/.b", "a\\b", "a\0b", "a b", "ä", "-rf", "x.py",
     "x.sh", "manifest.json", "a\n", "a" * 256],
)  # fmt: skip
def test_unsafe_paths(path: str) -> None:
    assert not is_safe_path(path)


@given(manifests())
def test_look_ups_agree_with_the_tables(manifest: Manifest) -> None:
    assert set(manifest.experts) == {shard.expert_key for shard in manifest.shards if shard.expert_key}
    assert {name for table in manifest.tensors_of.values() for name in table} == set(manifest.tensors)
    assert all(shard.group is None and shard.expert_key is None for shard in manifest.skeleton)


def test_one_changed_fact_is_another_model() -> None:
    other = dataclasses.replace(small(), model=dataclasses.replace(small().model, top_k=2))
    assert other.model_id != small().model_id
