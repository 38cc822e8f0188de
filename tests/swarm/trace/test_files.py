"""The file format of routing traces: what was written comes back, anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from moehive.protocol.errors import StorageError, TraceError
from moehive.swarm.trace import files
from moehive.swarm.trace.files import read_trace, trace_bytes, trace_from_bytes, write_trace
from moehive.swarm.trace.routing import HiddenSamples, RoutingTrace


def make(calls: tuple[int, ...] = (5, 1, 1), *, experts: int = 8, top_k: int = 2, seed: int = 0) -> RoutingTrace:
    random, tokens = np.random.default_rng(seed), sum(calls)
    rows = np.arange(min(2, tokens), dtype=np.int64)
    hidden = random.standard_normal((len(rows), 2, 4)).astype(np.float16)
    return RoutingTrace(
        model="m",
        layers=(1, 3),
        num_experts=experts,
        tokens=np.array(calls, dtype=np.int32),
        starts=np.arange(len(calls)) == 0,
        experts=random.integers(0, experts, (tokens, 2, top_k)).astype(np.uint16),
        samples=HiddenSamples(rows, hidden, -hidden),
    )


@given(st.lists(st.integers(1, 9), max_size=5), st.sampled_from([1, 8, 256, 257, 5000]), st.integers(1, 3))
def test_what_is_written_comes_back(calls: list[int], experts: int, top_k: int) -> None:
    trace = make(tuple(calls), experts=experts, top_k=top_k)
    found = trace_from_bytes(trace_bytes(trace))
    assert (found.model, found.layers, found.num_experts) == (trace.model, trace.layers, trace.num_experts)
    assert found.samples is not None
    assert trace.samples is not None
    for ours, theirs in (
        (trace.tokens, found.tokens),
        (trace.starts, found.starts),
        (trace.experts, found.experts),
        (trace.samples.inputs, found.samples.inputs),
        (trace.samples.residuals, found.samples.residuals),
    ):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_an_expert_takes_one_byte_where_that_is_enough() -> None:
    small, large = (len(trace_bytes(make((4000,), experts=experts))) for experts in (256, 257))
    assert large - small == pytest.approx(4000 * 2 * 2, abs=64)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for seed in (1, 2):
        write_trace(make(seed=seed), path)
    assert np.array_equal(read_trace(path).experts, make(seed=2).experts)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="cannot write"):
        write_trace(make(), tmp_path / "nowhere" / "trace")


@pytest.mark.parametrize("name", ["missing", "", "trace/below"])
def test_a_path_that_is_no_file_is_the_callers_mistake(name: str, tmp_path: Path) -> None:
    write_trace(make(), tmp_path / "trace")
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(tmp_path / name)


@given(st.data())
def test_a_damaged_file_is_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    good = trace_bytes(make())
    cut = data.draw(st.integers(0, len(good) - 1))
    with pytest.raises(TraceError):
        trace_from_bytes(good[:cut])
    with pytest.raises(TraceError):
        trace_from_bytes(data.draw(st.binary(max_size=64)))


def facts(**changes: object) -> bytes:
    """A trace whose facts were changed."""
    trace = make()
    arrays = {"tokens": trace.tokens, "starts": trace.starts.astype(np.uint8), "experts": trace.experts}
    found: dict[str, object] = {"model": "m", "layers": [1, 3], "numExperts": 8} | changes
    metadata = {"format": "moehive-trace", "version": "1", "facts": json.dumps(found)}
    return bytes(save(arrays, metadata))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [3, 1]}, "ascending"),
        ({"layers": []}, "cannot be"),
        ({"layers": [-1, 3]}, "ascending"),
        ({"layers": [1, 3, 4]}, "contradicts itself: its experts are not"),
        ({"numExperts": 3}, "experts that the model has not"),
        ({"numExperts": 0}, "cannot be"),
        ({"numExperts": "8"}, "cannot be"),
        ({"model": None}, "cannot be"),
    ],
)
def test_facts_that_contradict_the_arrays_are_refused(changes: dict[str, object], message: str) -> None:
    assert trace_from_bytes(facts()).layers == (1, 3)
    with pytest.raises(TraceError, match=message):
        trace_from_bytes(facts(**changes))


def test_another_version_and_another_kind_are_named() -> None:
    data = files.pack("moehive-trace", "2", {}, {"x": np.zeros(1)})
    with pytest.raises(TraceError, match="version '2' of its format; this build reads version 1"):
        trace_from_bytes(data)
    with pytest.raises(TraceError, match="is no moehive-trace but 'something'"):
        trace_from_bytes(files.pack("something", "1", {}, {"x": np.zeros(1)}))


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace"
    write_trace(make(), path)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", path.stat().st_size)
    read_trace(path)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(TraceError, match="larger than"):
        read_trace(path)
