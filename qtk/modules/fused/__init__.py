"""One transformer block on integers, fused: one dataflow, two seams.

    pre-norm                                    post-norm
    codes      = quantize(norm1(x))             codes      = quantize(x)
    context    = attention(codes @ qkv)         context    = attention(codes @ qkv)
    y          = quantize(context) @ out        y          = quantize(context) @ out
    x          = x + y                          x          = norm1(x + y)
    codes      = quantize(norm2(x))             codes      = quantize(x)
    h          = codes @ up                     h          = codes @ up
    y          = quantize(act(h)) @ down        y          = quantize(act(h)) @ down
    return x + y                                return norm2(x + y)

`block.py` says when a block runs so and in which order, `parts.py` what it is made of. The seams
are the places where floats become codes between two products; `kernels.py` fills them with one
kernel each, `onednn.py` with PyTorch's operations on a CPU.
"""
