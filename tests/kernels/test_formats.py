"""What a weight matrix refuses to be made of."""

import pytest
import torch
from torch import Tensor

from moehive.kernels.formats import ExpertMatrices, WeightFormat, WeightMatrix, pack_nibbles, unpack_nibbles

F = WeightFormat


def floats(*shape: int) -> Tensor:
    return torch.ones(shape)


def bytes_(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def plain(rows: int, columns: int) -> WeightMatrix:
    return WeightMatrix(F.PLAIN, floats(rows, columns))


E4M3, INT8 = floats(4, 6).to(torch.float8_e4m3fn), torch.zeros(4, 6, dtype=torch.int8)


@pytest.mark.parametrize(
    ("arguments", "shape", "grid"),
    [
        ((F.PLAIN, floats(4, 6)), (4, 6), ()),
        ((F.FP8_BLOCK, E4M3, floats(2, 2), None, (3, 4)), (4, 6), (2, 2)),
        ((F.INT8_CHANNEL, INT8, floats(4), None, (1, 6)), (4, 6), (4,)),
        ((F.INT4_GROUP, bytes_(4, 6), floats(4, 2), bytes_(4, 2), (1, 8)), (4, 12), (4, 2)),
        ((F.MXFP4, bytes_(4, 32), bytes_(4, 2), None, (1, 32)), (4, 64), (4, 2)),
    ],
)
def test_shapes(arguments: tuple, shape: tuple[int, int], grid: tuple[int, ...]) -> None:
    matrix = WeightMatrix(*arguments)
    assert (matrix.shape, matrix.grid) == (shape, grid)
    assert matrix.rows(0, 4).shape == shape
    assert matrix.nbytes == sum(part.nbytes for part in arguments if isinstance(part, Tensor))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((F.PLAIN, floats(4)), r"plain data are torch.float32 \(4,\)"),
        ((F.PLAIN, INT8), "plain data are torch.int8"),
        ((F.PLAIN, floats(4, 6), floats(4)), "plain weights have no scales"),
        ((F.FP8_BLOCK, INT8, floats(1, 1), None, (8, 8)), "fp8-block data are torch.int8"),
        ((F.FP8_BLOCK, E4M3, floats(2, 1), None, (8, 8)), r"need scales \(1, 1\)"),
        ((F.FP8_BLOCK, E4M3, floats(1, 1).bfloat16(), None, (8, 8)), "torch.bfloat16"),
        ((F.FP8_BLOCK, E4M3, floats(1, 1)), r"in blocks of \(0, 0\)"),
        ((F.FP8_BLOCK, E4M3, floats(1, 1), floats(1, 1), (8, 8)), r"zeros \(1, 1\)"),
        ((F.INT8_CHANNEL, INT8, floats(4), None, (1, 5)), r"in blocks of \(1, 5\)"),
        ((F.INT8_CHANNEL, INT8, None, None, (1, 6)), r"need scales \(4,\): None"),
        ((F.INT4_GROUP, bytes_(4, 6), floats(4, 3), None, (1, 8)), r"need scales \(4, 2\)"),
        ((F.INT4_GROUP, bytes_(4, 6), floats(4, 2), bytes_(4, 1), (1, 8)), r"zeros \(4, 1\)"),
        ((F.INT4_GROUP, bytes_(4, 6), floats(4, 2), None, (2, 8)), r"in blocks of \(2, 8\)"),
        ((F.MXFP4, bytes_(4, 32), bytes_(4, 2), None, (1, 16)), r"in blocks of \(1, 16\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightMatrix(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((plain(6, 4), plain(4, 2)), r"not \[2I, H\] and \[H, I\]"),
        ((plain(5, 4), plain(4, 2)), r"not \[2I, H\] and \[H, I\]"),
        ((plain(6, 4), plain(4, 3), floats(5)), r"bias \(5,\) where \[6\]"),
        ((plain(6, 4), plain(4, 3), None, floats(3)), r"bias \(3,\) where \[4\]"),
    ],
)
def test_matrices_that_make_no_expert_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertMatrices(*arguments)


def test_an_expert_counts_its_bytes() -> None:
    assert ExpertMatrices(plain(6, 4), plain(4, 3), floats(6), floats(4)).nbytes == 4 * (24 + 12 + 6 + 4)


def test_nibbles_go_low_half_first() -> None:
    codes = torch.tensor([[1, 2, 3, 15]])
    assert pack_nibbles(codes).tolist() == [[0x21, 0xF3]]
    assert unpack_nibbles(pack_nibbles(codes)).tolist() == codes.tolist()
    with pytest.raises(ValueError, match="3 columns"):
        pack_nibbles(codes[:, :3])
