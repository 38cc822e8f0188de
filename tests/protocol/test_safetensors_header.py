import contextlib
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from moehive.protocol.errors import CheckpointError
from moehive.protocol.manifest import ITEM_SIZE
from moehive.protocol.safetensors_header import (
    PREFIX_SIZE,
    TensorSpan,
    TensorSpec,
    build_header,
    json_length,
    parse_header,
)

names = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda name: name != "__metadata__")
specs = st.lists(
    st.builds(
        TensorSpec, names, st.sampled_from(sorted(ITEM_SIZE)), st.lists(st.integers(0, 5), max_size=4).map(tuple)
    ),
    unique_by=lambda spec: spec.name,
    max_size=6,
)


def parse(data: bytes) -> dict[str, TensorSpan]:
    length = json_length(data[:PREFIX_SIZE], len(data))
    return parse_header(data[PREFIX_SIZE : PREFIX_SIZE + length], len(data))


def file_of(document: Any, payload: int = 0) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + bytes(payload)


@given(specs)
def test_what_is_built_is_read_back(tensors: list[TensorSpec]) -> None:
    header = build_header(tensors)
    assert len(header) % 4096 == 0
    found = parse(header + bytes(sum(spec.size for spec in tensors)))
    assert {name: (span.dtype, span.shape, span.size) for name, span in found.items()} == {
        spec.name: (spec.dtype, spec.shape, spec.size) for spec in tensors
    }
    offset = len(header)
    for spec in tensors:
        assert found[spec.name].offset == offset
        offset += spec.size


def test_the_safetensors_library_reads_what_is_built() -> None:
    tensors = [TensorSpec("a", "F8_E4M3", (3, 4)), TensorSpec("b", "F32", (2,)), TensorSpec("c", "U8", (0, 7))]
    payload = random.Random(0).randbytes(20)
    found = dict(deserialize(build_header(tensors) + payload))
    assert {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in found.items()} == {
        "a": ("F8_E4M3", [3, 4], payload[:12]),
        "b": ("F32", [2], payload[12:]),
        "c": ("U8", [0, 7], b""),
    }


@given(specs.filter(bool), st.data())
def test_perturbed_bytes_are_read_or_refused(tensors: list[TensorSpec], data: st.DataObject) -> None:
    """Never another exception, and never a span outside the file."""
    whole = bytearray(build_header(tensors).rstrip() + bytes(sum(spec.size for spec in tensors)))
    whole[:8] = (len(build_header(tensors).rstrip()) - 8).to_bytes(8, "little")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    with contextlib.suppress(CheckpointError):
        for span in parse(cut).values():
            assert 8 <= span.offset <= span.offset + span.size <= len(cut)


def entry(begin: int, end: int, dtype: str = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "too short"),
        (b"\xff" * 16, "not a safetensors file"),
        ((50).to_bytes(8, "little") + b"{}", "truncated"),
        (file_of({"a": entry(0, 4)}, 3), "truncated"),
        (file_of({"a": entry(0, 4)}, 5), "belong to nothing"),
        (file_of({"a": entry(1, 4)}, 4), "a hole or an overlap"),
        (file_of({"a": entry(0, 4), "b": entry(3, 6)}, 6), "a hole or an overlap"),
        (file_of({"a": entry(0, 4), "b": entry(5, 6)}, 6), "a hole or an overlap"),
        (file_of({"a": entry(0, 4, "U8", [5])}, 4), "do not fit"),
        (file_of({"a": entry(0, 4, "F4")}, 4), "not known"),
        (file_of({"a": entry(0, 4, "U8", [2, -2])}, 4), "malformed"),
        (file_of({"a": entry(0, 4, "U8", [True, 4])}, 4), "malformed"),
        (file_of({"a": entry(0, 4, "U8", [1] * 9 + [4])}, 4), "malformed"),
        (file_of({"a": {**entry(0, 4), "more": 1}}, 4), "malformed"),
        (file_of({"a": []}), "malformed"),
        (file_of([]), "not a JSON object"),
        (file_of(b"{"), "not JSON"),
        (file_of(b"[" * 100_000), "not JSON"),
        (file_of(b'{"a":1,"a":2}'), "twice"),
    ],
)
def test_a_malformed_file_is_refused_with_its_reason(file: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        parse(file)
