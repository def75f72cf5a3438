"""Small Triton kernels for the tests of the tools around kernels."""

import triton
import triton.language as tl


@triton.jit
def matmul_fwd(a_ptr, b_ptr, c_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K: tl.constexpr):
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    inner = tl.arange(0, K)
    a = tl.load(a_ptr + rows * K + inner[None, :])  # [BLOCK_M, K]
    b = tl.load(b_ptr + inner[:, None] * BLOCK_N + columns)  # [K, BLOCK_N]
    tl.store(c_ptr + rows * BLOCK_N + columns, tl.dot(a, b).to(tl.bfloat16))
