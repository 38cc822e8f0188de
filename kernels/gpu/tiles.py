"""Weights of one expert, tile by tile: from any of the formats to the dtype that is multiplied.

A matrix is [N, K] (N outputs, K inputs), laid out as kernels/formats.py says. Everything here runs inside a kernel.

What is added to the formats' arithmetic is only how it is written: nibbles are decoded in pairs, since on a GPU the
instructions for unpacking, not the memory, set the speed of 4-bit weights. CT is the dtype that is multiplied. Triton's
interpreter computes bf16 wrongly, so CT is float32 there, and no bf16 arithmetic happens unless CT is bfloat16.
"""

import triton
import triton.language as tl

# WeightFormat as a constexpr
PLAIN = tl.constexpr(0)
FP8_BLOCK = tl.constexpr(1)
INT8_CHANNEL = tl.constexpr(2)
INT4_GROUP = tl.constexpr(3)
MXFP4 = tl.constexpr(4)

# Where the parts of an expert stand in a table of addresses [4, E]
DATA = tl.constexpr(0)
SCALE = tl.constexpr(1)
ZERO = tl.constexpr(2)
BIAS = tl.constexpr(3)


@triton.jit
def part_pointer(table, part: tl.constexpr, expert, num_experts, dtype: tl.constexpr):
    """The pointer to one part of one expert. The promise of 16 bytes is what makes loads wide and asynchronous."""
    address = tl.load(table + part * num_experts + expert)
    pointer = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if part == DATA else pointer


@triton.jit
def weight_tile(data, factor, offset, n, n_inside, first, K, stride, FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr,
                TRANSPOSED: tl.constexpr, GROUP: tl.constexpr, HARDWARE_FP8: tl.constexpr, W: tl.constexpr,
                BK: tl.constexpr, EVEN_K: tl.constexpr, CT: tl.constexpr):  # fmt: skip
    """Rows `n` [W], columns first..first + BK as the right side of a product, CT [BK, W], 0 outside.

    `factor` and `offset` come from `scale_tile`. INT8_CHANNEL is left unscaled: its scale belongs to the finished sum.
    """
    if FORMAT == INT4_GROUP or FORMAT == MXFP4:
        column = first // 2 + tl.arange(0, BK // 2)
        byte = stored_tile(data, n, n_inside, column, K // 2, stride, False, EVEN_K)  # [W, BK / 2]
        tile = nibble_values(byte, factor, offset, FORMAT, HAS_ZERO, W, BK, CT)
    else:
        tile = stored_tile(data, n, n_inside, first + tl.arange(0, BK), K, stride, TRANSPOSED, EVEN_K)
        if FORMAT == FP8_BLOCK:
            tile = e4m3_values(tile, HARDWARE_FP8) * (tl.trans(factor) if TRANSPOSED else factor)
    tile = tile.to(CT)
    return tile if TRANSPOSED else tl.trans(tile)


@triton.jit
def stored_tile(data, n, n_inside, k, K, stride, TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr):
    """Elements as they are stored, 0 outside: [n, k], or of a TRANSPOSED matrix [k, n], so that neighbours stay so.

    `stride` parts rows, or columns of a transposed matrix.
    """
    if TRANSPOSED:
        at = k[:, None] * stride + n[None, :]
        inside = n_inside[None, :] if EVEN_K else n_inside[None, :] & (k < K)[:, None]
    else:
        at = n[:, None] * stride + k[None, :]
        inside = n_inside[:, None] if EVEN_K else n_inside[:, None] & (k < K)[None, :]
    return tl.load(data + at, mask=inside, other=0)


@triton.jit
def scale_tile(scale, zero, n, n_inside, first, K, stride, FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr,
               ROWS: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """What `weight_tile` scales columns first..first + BK of rows `n` with: (factor, offset) [W, groups in BK].

    The factor has the scales' dtype, fp32 for exponents. The offset is INT4_GROUP's zero point in the form that
    `nibble_values` adds, else unused. Formats without scales in the tile get a 1.
    """
    if FORMAT == PLAIN or FORMAT == INT8_CHANNEL:
        factor = 1.0
        offset = 0
    elif FORMAT == FP8_BLOCK:
        at = (n // ROWS) * stride + first // GROUP
        factor = tl.load(scale + at, mask=n_inside, other=0.0)[:, None]
        offset = 0
    else:
        GROUPS: tl.constexpr = 1 if GROUP >= BK else BK // GROUP
        group = first // GROUP + tl.arange(0, GROUPS)
        at = n[:, None] * stride + group[None, :]
        inside = n_inside[:, None] & (group < tl.cdiv(K, GROUP))[None, :]
        offset = 0
        if FORMAT == MXFP4:
            factor = e8m0_values(tl.load(scale + at, mask=inside, other=127))
        else:
            factor = tl.load(scale + at, mask=inside, other=0.0)
            if HAS_ZERO:
                offset = tl.load(zero + at, mask=inside, other=0).to(tl.int32) * -0x00010001
    return factor, offset


@triton.jit
def nibble_values(byte, factor, offset, FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr, W: tl.constexpr,
                  BK: tl.constexpr, CT: tl.constexpr):  # fmt: skip
    """Scaled values [W, BK] of bytes [W, BK / 2] with two columns each, in any floating dtype.

    A 32-bit word takes the two nibbles of a byte at once, each to where a 16-bit float in that half of the word has the
    bits: for integers the low end of the mantissa of a number whose unit in the last place is 1 (bf16 in [128, 256),
    fp16 in [1024, 2048)); for E2M1 the low end of bf16's exponent and the high end of its mantissa, which leaves the
    exponent's bias, 127 against 1. What is subtracted and multiplied then is exact but for the last rounding, to CT.
    """
    HALF_FLOAT: tl.constexpr = CT == tl.float16 and FORMAT == INT4_GROUP
    AT: tl.constexpr = CT if CT == tl.bfloat16 or HALF_FLOAT else tl.float32  # arithmetic
    GROUPS: tl.constexpr = factor.shape[1]
    HALF: tl.constexpr = BK // 2 // GROUPS
    word = tl.reshape(byte.to(tl.int32), (W, GROUPS, HALF))
    if FORMAT == MXFP4:
        word = ((word * 0x01001000) & -0x7FFF8000) | ((word * 0x00040040) & 0x01C001C0)
    elif HAS_ZERO:  # half way between two powers of two, so that a negative difference stays there too
        MIDDLE: tl.constexpr = 0x66006600 if HALF_FLOAT else 0x43404340
        word = ((word * 0x1001) & 0x000F000F) + (offset + MIDDLE)[:, :, None]
        base = tl.full((1, 1, 1), 1536.0 if HALF_FLOAT else 192.0, AT)
    else:
        word = ((word * 0x1001) & 0x000F000F) | (0x64006400 if HALF_FLOAT else 0x43004300)
        base = tl.full((1, 1, 1), 1032.0 if HALF_FLOAT else 136.0, AT)
    if AT == tl.float32:  # a bf16 is the upper half of a float32
        low = (word << 16).to(AT, bitcast=True)
        high = (word & -0x10000).to(AT, bitcast=True)
    else:
        low = word.to(tl.int16).to(AT, bitcast=True)
        high = (word >> 16).to(tl.int16).to(AT, bitcast=True)
    if FORMAT == MXFP4:
        rebias = tl.full((1, 1, 1), 8.507059173023462e37, AT)  # 2 ** 126
        factor = factor[:, :, None].to(AT)
        low = low * rebias * factor
        high = high * rebias * factor
    else:
        MT: tl.constexpr = AT if factor.dtype == AT else tl.float32  # scales are not rounded before they multiply
        factor = factor[:, :, None].to(MT)
        low = (low - base).to(MT) * factor
        high = (high - base).to(MT) * factor
    return tl.interleave(tl.reshape(low, (W, BK // 2)), tl.reshape(high, (W, BK // 2)))


@triton.jit
def e4m3_values(code, HARDWARE: tl.constexpr):
    """uint8 codes of float8_e4m3fn as fp32, exact. sm_80 has no HARDWARE for it."""
    if HARDWARE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:  # the bits moved to where fp32 has them, which leaves the exponent's bias, 127 against 7
        bits = code.to(tl.int32)
        moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        value = moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    return value


@triton.jit
def e8m0_values(exponent):
    """uint8 exponents with bias 127 as fp32. 2 ** -127 is a subnormal number; 255, NaN in the standard, is infinite."""
    bits = exponent.to(tl.int32)
    return tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)
