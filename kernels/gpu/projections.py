"""The two projections of the experts on the rows that were routed to them, and what finishes split sums.

A row is one choice of one token: row r = t * k + j is token t's j-th expert. `project` takes blocks of BM rows of one
expert each, which kernels/gpu/align.py makes, and BN columns of the output:

    gated:  out[r] = act(x[r // k] @ gate.T + bias, x[r // k] @ up.T + bias)    [T * k, I]
    plain:  out[r] = weight[r] * (x[r] @ down.T + bias)                         [T * k, H]

Experts are addressed one by one through a table of addresses, so each can be loaded and evicted alone. Blocks of
experts that are not here are skipped, and their rows of `out` are left as they were. Sums are fp32, in a fixed order.

Gate and up are one product: a tile has the columns of both, gate and up of a column next to each other. With two sums
instead, the largest tiles need more registers than there are.
"""

import triton
import triton.language as tl

from .activations import activate
from .tiles import (
    BIAS,
    DATA,
    INT4_GROUP,
    INT8_CHANNEL,
    PLAIN,
    SCALE,
    ZERO,
    part_pointer,
    scale_tile,
    weight_tile,
)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "stride_scale"])
def project(x, rows, blocks, count, table, row_weight, out, num_rows, N, K, num_experts, stride_x, stride_w,
            stride_scale, TOP_K: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr,
            LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZERO: tl.constexpr,
            FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
            HARDWARE_FP8: tl.constexpr, WT: tl.constexpr, ST: tl.constexpr, BT: tl.constexpr, CT: tl.constexpr,
            EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GM: tl.constexpr,
            SPLIT_K: tl.constexpr, SWAP: tl.constexpr, PERSISTENT: tl.constexpr):  # fmt: skip
    """One tile of the output, or for a PERSISTENT program every one whose number is its own modulo the programs.

    x [*, K]; out [num_rows, N], or with SPLIT_K > 1 fp32 [SPLIT_K, num_rows, N] (GATED: [.., 2 N], before the
    activation, columns in the weights' order); row_weight [num_rows].
    rows, blocks, count: AlignedRows' `rows`, `block_expert` and `count` for blocks of BM.
    table [4, num_experts] int64: addresses of each expert's data, scales, zero points and bias.
    Programs: (tiles, or fewer PERSISTENT ones; SPLIT_K).
    """
    split = tl.program_id(1)
    own = tl.program_id(0)
    blocks_m = tl.load(count) // BM
    tiles = blocks_m * tl.cdiv(N, BN)
    # The loop costs registers, hence programs that run beside each other, so one tile does without it.
    if PERSISTENT:
        for tile in tl.range(own, tiles, tl.num_programs(0)):
            project_tile(tile, blocks_m, split, x, rows, blocks, table, row_weight, out, num_rows, N, K,
                         num_experts, stride_x, stride_w, stride_scale, TOP_K, GATED, ACTIVATION, ALPHA,
                         LIMIT, INTERLEAVED, HAS_BIAS, HAS_ZERO, FORMAT, TRANSPOSED, ROWS, GROUP,
                         HARDWARE_FP8, WT, ST, BT, CT, EVEN_K, BM, BN, BK, GM, SPLIT_K, SWAP)  # fmt: skip
    elif own < tiles:
        project_tile(own, blocks_m, split, x, rows, blocks, table, row_weight, out, num_rows, N, K,
                     num_experts, stride_x, stride_w, stride_scale, TOP_K, GATED, ACTIVATION, ALPHA,
                     LIMIT, INTERLEAVED, HAS_BIAS, HAS_ZERO, FORMAT, TRANSPOSED, ROWS, GROUP,
                     HARDWARE_FP8, WT, ST, BT, CT, EVEN_K, BM, BN, BK, GM, SPLIT_K, SWAP)  # fmt: skip


@triton.jit
def project_tile(tile, blocks_m, split, x, rows, blocks, table, row_weight, out, num_rows, N, K, num_experts,
                 stride_x, stride_w, stride_scale, TOP_K: tl.constexpr, GATED: tl.constexpr,
                 ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
                 INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZERO: tl.constexpr,
                 FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
                 HARDWARE_FP8: tl.constexpr, WT: tl.constexpr, ST: tl.constexpr, BT: tl.constexpr,
                 CT: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 GM: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Tile number `tile` of `project`. GM blocks of rows use a column of weights before the next column is read."""
    blocks_n = tl.cdiv(N, BN)
    first_m = tile // (GM * blocks_n) * GM
    height = tl.minimum(blocks_m - first_m, GM)
    m = first_m + tile % (GM * blocks_n) % height
    first_n = tile % (GM * blocks_n) // height * BN
    expert = tl.load(blocks + m)
    if expert >= 0:
        row = tl.load(rows + m * BM + tl.arange(0, BM))  # [BM]
        row_inside = row < num_rows
        W: tl.constexpr = 2 * BN if GATED else BN
        j = tl.arange(0, W)
        if not GATED:
            i = first_n + j
            n = i
        elif TRANSPOSED and not INTERLEAVED:  # BN gates, then BN ups: neighbours in memory stay neighbours
            i = first_n + j % BN
            n = i + j // BN * N
        else:
            i = first_n + j // 2
            n = 2 * first_n + j if INTERLEAVED else i + j % 2 * N
        n_inside = n < 2 * N if GATED and INTERLEAVED else i < N
        data = part_pointer(table, DATA, expert, num_experts, WT)
        scale = data if FORMAT == PLAIN else part_pointer(table, SCALE, expert, num_experts, ST)
        zero = part_pointer(table, ZERO, expert, num_experts, tl.uint8) if HAS_ZERO else data
        total = accumulate(x, row // TOP_K, row_inside, data, scale, zero, n, n_inside, split, K, stride_x, stride_w,
                           stride_scale, HAS_ZERO, FORMAT, TRANSPOSED, ROWS, GROUP, HARDWARE_FP8, CT, EVEN_K, BM, W, BK,
                           SPLIT_K, SWAP)  # [BM, W]  # fmt: skip
        if FORMAT == INT8_CHANNEL:
            total *= tl.load(scale + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            bias = part_pointer(table, BIAS, expert, num_experts, BT)
            once = n_inside & (tl.zeros_like(n) + split == 0)  # not in every part of a split sum
            total += tl.load(bias + n, mask=once, other=0.0).to(tl.float32)[None, :]
        if not GATED:
            total *= tl.load(row_weight + row, mask=row_inside, other=0.0).to(tl.float32)[:, None]
        row = row.to(tl.int64)
        if SPLIT_K > 1:
            columns = 2 * N if GATED else N
            at = (split.to(tl.int64) * num_rows + row)[:, None] * columns + n[None, :]
            tl.store(out + at, total, mask=row_inside[:, None] & n_inside[None, :])
        else:
            if GATED:
                if TRANSPOSED and not INTERLEAVED:
                    gate, up = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN)), (0, 2, 1)))
                else:
                    gate, up = tl.split(tl.reshape(total, (BM, BN, 2)))
                total = activate(gate, up, ACTIVATION, ALPHA, LIMIT)  # [BM, BN]
            column = first_n + tl.arange(0, BN)
            tl.store(
                out + row[:, None] * N + column[None, :],
                total.to(out.dtype.element_ty),
                mask=row_inside[:, None] & (column < N)[None, :],
            )


@triton.jit
def accumulate(x, x_row, row_inside, data, scale, zero, n, n_inside, split, K, stride_x, stride_w, stride_scale,
               HAS_ZERO: tl.constexpr, FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
               GROUP: tl.constexpr, HARDWARE_FP8: tl.constexpr, CT: tl.constexpr, EVEN_K: tl.constexpr,
               BM: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, SPLIT_K: tl.constexpr,
               SWAP: tl.constexpr):  # fmt: skip
    """Rows x_row [BM] of x [*, K] times rows n [W] of one expert's matrix, over the tiles of K that `split` has.

    SWAP computes the transpose: on sm_90 the weights are then the side of 64 rows that warpgroup instructions need.
    """
    # One scale of two bytes a row is too narrow for an asynchronous copy, so it is read one tile ahead instead.
    AHEAD: tl.constexpr = FORMAT == INT4_GROUP and GROUP >= BK
    total = tl.zeros((W, BM) if SWAP else (BM, W), tl.float32)
    x_row = x + x_row.to(tl.int64)[:, None] * stride_x
    if AHEAD:
        factor, offset = scale_tile(
            scale, zero, n, n_inside, split * BK, K, stride_scale, FORMAT, HAS_ZERO, ROWS, GROUP, BK
        )
    for first in range(split * BK, K, BK * SPLIT_K):
        k = first + tl.arange(0, BK)
        inside = row_inside[:, None] if EVEN_K else row_inside[:, None] & (k < K)[None, :]
        a = tl.load(x_row + k[None, :], mask=inside, other=0.0).to(CT)  # [BM, BK]
        if not AHEAD:
            factor, offset = scale_tile(
                scale, zero, n, n_inside, first, K, stride_scale, FORMAT, HAS_ZERO, ROWS, GROUP, BK
            )
        w = weight_tile(data, factor, offset, n, n_inside, first, K, stride_w, FORMAT, HAS_ZERO, TRANSPOSED, GROUP,
                        HARDWARE_FP8, W, BK, EVEN_K, CT)  # [BK, W]  # fmt: skip
        if AHEAD:
            factor, offset = scale_tile(
                scale, zero, n, n_inside, first + BK * SPLIT_K, K, stride_scale, FORMAT, HAS_ZERO, ROWS, GROUP, BK
            )
        if SWAP:
            total = tl.dot(tl.trans(w), tl.trans(a), total, input_precision="ieee")
        else:
            total = tl.dot(a, w, total, input_precision="ieee")
    return tl.trans(total) if SWAP else total


@triton.jit(do_not_specialize=["num_rows"])
def activate_partials(partials, rows, blocks, count, out, num_rows, N, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr,
                      LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT_K: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr):  # fmt: skip
    """out [num_rows, N] from what a GATED `project` with SPLIT_K > 1 left; splits are added in order."""
    m = tl.program_id(0)
    if m < tl.load(count) // BM:
        if tl.load(blocks + m) >= 0:
            row = tl.load(rows + m * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
            i = tl.program_id(1) * BN + tl.arange(0, BN)
            inside = (row < num_rows)[:, None] & (i < N)[None, :]
            gate = tl.zeros((BM, BN), tl.float32)
            up = tl.zeros((BM, BN), tl.float32)
            for split in tl.static_range(SPLIT_K):
                at = partials + (split * num_rows + row)[:, None] * 2 * N
                gate += tl.load(at + (2 * i if INTERLEAVED else i)[None, :], mask=inside, other=0.0)
                up += tl.load(at + (2 * i + 1 if INTERLEAVED else i + N)[None, :], mask=inside, other=0.0)
            h = activate(gate, up, ACTIVATION, ALPHA, LIMIT)
            tl.store(out + row[:, None] * N + i[None, :], h.to(out.dtype.element_ty), mask=inside)
