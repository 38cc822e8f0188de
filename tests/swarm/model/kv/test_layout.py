"""How keys and values lie in a buffer."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.model.kv.layout import ALIGNMENT, KvLayout

sizes = st.integers(1, 4)
layouts = st.builds(
    KvLayout,
    batch=sizes,
    heads=st.tuples(sizes, sizes),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    device=st.just(torch.device("cpu")),
)


def random_buffer(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))


@given(layouts, st.integers(0, 20))
def test_keys_and_values_are_contiguous_aligned_and_apart(layout: KvLayout, tokens: int) -> None:
    buffer = torch.zeros(layout.spaced(tokens), dtype=torch.uint8)
    keys, values = layout.spaced_views(buffer, tokens)
    assert keys.shape == (layout.batch, layout.heads[0], tokens, layout.dims[0])
    assert values.shape == (layout.batch, layout.heads[1], tokens, layout.dims[1])
    for part in (keys, values):
        assert part.is_contiguous()
        assert (part.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0 or part.numel() == 0
    keys.fill_(1)
    assert not values.any()
    assert KvLayout.of(keys, values) == layout


@given(layouts, st.integers(1, 6), st.integers(1, 4))
def test_the_bytes_of_blocks_go_to_their_tokens_places(layout: KvLayout, tokens: int, count: int) -> None:
    total = count * tokens + 3
    blocks = random_buffer(count * layout.packed(tokens)).view(count, -1)
    buffer = torch.zeros(layout.spaced(total), dtype=torch.uint8)
    for index in range(count):
        at = 0
        for start, end in layout.runs(total, index * tokens, tokens):
            buffer[start:end] = blocks[index, at : at + end - start]
            at += end - start
        assert at == layout.packed(tokens)
    for whole, parts in zip(layout.spaced_views(buffer, total), layout.block_views(blocks, tokens), strict=True):
        shape = (*whole.shape[:2], count * tokens, whole.shape[3])
        assert torch.equal(
            whole[:, :, : count * tokens].contiguous().view(torch.uint8),
            parts.reshape(shape).contiguous().view(torch.uint8),
        )
        assert not whole[:, :, count * tokens :].any()
