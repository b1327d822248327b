"""The Hadamard rotation, as the kernels define it: there is one definition of the matrix."""

from qtk_kernels.hadamard import PALEY, orthogonal, rotate, split

__all__ = ["PALEY", "orthogonal", "rotate", "split"]
