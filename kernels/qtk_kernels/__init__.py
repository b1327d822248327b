"""Kernels for low-bit inference: one file per op, each with its definition in plain PyTorch.

`from qtk_kernels.int8_linear import int8_linear`, and so on; importing the package loads no op.
"""
