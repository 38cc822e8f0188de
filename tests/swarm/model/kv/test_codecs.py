"""What a stored block holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moehive.swarm.model.kv.codecs import Codec, EightBitCodec, RawCodec, _widen
from moehive.swarm.model.kv.layout import KvLayout

TOKENS, COUNT = 5, 3

# codec, and half a step of its code relative to a vector's largest number
EIGHT_BITS = [
    pytest.param(EightBitCodec(torch.int8), 0.5 / 127, id="int8"),
    pytest.param(EightBitCodec(torch.float8_e4m3fn), 2**-4, id="fp8"),
]


def random_pair(seed: int, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, tokens, 7, generator=generator) * torch.logspace(-6, 6, tokens).view(-1, 1)
    return keys.to(dtype), torch.randn(2, 1, tokens, 4, generator=generator).to(dtype)


def there_and_back(codec: Codec, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Encoded in COUNT blocks, decoded at once to places with gaps between the heads."""
    layout = KvLayout.of(keys, values)
    blocks = torch.empty(COUNT, codec.nbytes(layout, TOKENS), dtype=torch.uint8)
    for index, (some_keys, some_values) in enumerate(zip(keys.split(TOKENS, 2), values.split(TOKENS, 2), strict=True)):
        codec.encode(layout, some_keys, some_values, blocks[index])
    found = [torch.nn.functional.pad(torch.zeros_like(part), (0, 0, 1, 1), value=9.0) for part in (keys, values)]
    codec.decode(layout, blocks, *(part[:, :, 1:-1] for part in found))
    assert all(bool((part[:, :, [0, -1]] == 9).all()) for part in found)
    return found[0][:, :, 1:-1], found[1][:, :, 1:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=st.integers(0, 1000))
def test_raw_blocks_give_back_the_same_bits(dtype: torch.dtype, seed: int) -> None:
    keys, values = random_pair(seed, dtype, COUNT * TOKENS)
    found = there_and_back(RawCodec(), keys, values)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)


@pytest.mark.parametrize(("codec", "step"), EIGHT_BITS)
@given(seed=st.integers(0, 1000))
def test_eight_bits_round_each_vector_on_its_own_scale(codec: EightBitCodec, step: float, seed: int) -> None:
    pair = random_pair(seed, torch.float32, COUNT * TOKENS)
    for exact, found in zip(pair, there_and_back(codec, *pair), strict=True):
        largest = exact.abs().amax(-1, keepdim=True).double()
        error = (found.double() - exact.double()).abs()
        assert bool((error <= largest * step * 1.001).all())
        assert not torch.equal(found, exact)


@pytest.mark.parametrize(("codec", "step"), EIGHT_BITS)
def test_zeros_stay_zeros_and_what_is_not_a_number_stays_none(codec: EightBitCodec, step: float) -> None:
    keys, values = random_pair(0, torch.float32, COUNT * TOKENS)
    keys[:, :, 2] = 0
    values[0, 0, 3, 1] = torch.nan
    found_keys, found_values = there_and_back(codec, keys, values)
    assert not found_keys[:, :, 2].any()
    assert bool(found_values[0, 0, 3].isnan().all())
    assert int(found_values.isnan().sum()) == values.shape[3]


@pytest.mark.parametrize(("codec", "step"), EIGHT_BITS)
def test_eight_bits_take_a_byte_for_a_number_and_four_for_a_vector(codec: EightBitCodec, step: float) -> None:
    layout = KvLayout(1, (4, 4), (128, 128), torch.bfloat16, torch.device("cpu"))
    assert codec.nbytes(layout, 256) == 2 * 4 * 256 * (128 + 4)


def test_every_float8_code_is_widened_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    torch.testing.assert_close(_widen(codes), codes.float(), rtol=0, atol=0, equal_nan=True)
