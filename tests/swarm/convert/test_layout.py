from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.manifest import ITEM_SIZE, ShardType
from moehive.protocol.safetensors_header import TensorSpec
from moehive.swarm.convert.layout import Piece, Span, merge_spans, tensor_file


def piece(name: str, dtype: str, *shape: int) -> Piece:
    spec = TensorSpec(name, dtype, shape)
    return Piece(spec, Span("source", 0, spec.size))


def test_the_given_order_is_kept_where_every_tensor_is_aligned() -> None:
    planned = tensor_file("x", ShardType.EXPERT, [piece("gate", "F8_E4M3", 4, 3), piece("scale", "F32", 1, 1)])
    assert [part.spec.name for part in planned.pieces] == ["gate", "scale"]


@given(st.lists(st.tuples(st.sampled_from(sorted(ITEM_SIZE)), st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_every_tensor_lies_at_a_multiple_of_its_item_size(tensors: list[tuple[str, int, int]]) -> None:
    """Three odd bytes of fp8 before an fp32 scale would make a file that no reader can view in place."""
    pieces = [piece(str(number), dtype, rows, columns) for number, (dtype, rows, columns) in enumerate(tensors)]
    planned = tensor_file("x", ShardType.EXPERT, pieces)
    assert sorted(planned.pieces, key=lambda part: part.spec.name) == pieces
    for entry in planned.tensor_entries(0).values():
        assert entry.offset % ITEM_SIZE[entry.dtype] == 0
        assert entry.offset + entry.size <= planned.size


def test_touching_spans_are_one_read() -> None:
    spans = [Span("b", 0, 5), Span("a", 10, 5), Span("a", 0, 10), Span("a", 16, 1), Span("b", 5, 1)]
    assert merge_spans(spans) == [Span("a", 0, 15), Span("a", 16, 1), Span("b", 0, 6)]
