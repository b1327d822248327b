"""A plain flash attention in Triton, bfloat16, as others write it: what the quantized kernels'
instructions are counted against.

Dao 2023, https://arxiv.org/abs/2307.08691; full attention, no masks, head sizes of powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def flash_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, H, Tq, Tk, stride_b, stride_h, stride_t, multiplier,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Tq, BLOCK_M)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    start = (bh // H).to(tl.int64) * stride_b + (bh % H).to(tl.int64) * stride_h
    offs_m, offs_n = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    at = start + offs_m[:, None] * stride_t + offs_d[None, :]
    q = tl.load(q_ptr + at)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, Tk, BLOCK_N):
        kv_at = start + (first + offs_n)[:, None] * stride_t + offs_d[None, :]
        score = tl.dot(q, tl.trans(tl.load(k_ptr + kv_at)))
        new = tl.maximum(top, tl.max(score, axis=1) * multiplier)
        p = tl.exp2(score * multiplier - new[:, None])
        alpha = tl.exp2(top - new)
        total = total * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(tl.bfloat16), tl.load(v_ptr + kv_at), acc)
        top = new
    tl.store(out_ptr + at, acc / total[:, None])
