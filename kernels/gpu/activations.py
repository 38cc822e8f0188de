"""What stands between the two projections, inside a kernel, in fp32."""

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
RELU_SQUARED = tl.constexpr(4)
CLAMPED = tl.constexpr(5)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """act(gate) * up; CLAMPED is GPT-OSS's (transformers, `GptOssExperts._apply_gate`)."""
    if ACTIVATION == CLAMPED:
        gate = tl.minimum(gate, LIMIT)
        activated = gate * tl.sigmoid(gate * ALPHA)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    elif ACTIVATION == SILU:
        activated = gate * tl.sigmoid(gate)
    elif ACTIVATION == GELU:
        activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:  # 0.5 (1 + tanh z) is sigmoid(2 z)
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif ACTIVATION == RELU:
        activated = tl.maximum(gate, 0.0)
    else:
        activated = tl.maximum(gate, 0.0)
        activated = activated * activated
    return activated * up
