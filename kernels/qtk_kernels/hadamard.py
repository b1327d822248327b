"""Hadamard rotations of any width that has one, by two small matrix products.

H of order n = f * p is the Kronecker product of one of order f and one of order p, so x H costs
f + p multiplications a channel instead of n. Orders that are no power of two come from Paley's
constructions over a prime field (Paley 1933): q + 1 for primes q = 3 mod 4, 2 (q + 1) for primes
q = 1 mod 4. A width without a Hadamard matrix is rotated in equal blocks of the largest order
that divides it.
"""

from functools import cache

import torch
from torch import Tensor

PALEY = {12: 11, 20: 19, 28: 13, 36: 17, 44: 43, 60: 59, 68: 67, 76: 37}  # order: prime


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    """Multiplies the last axis by an orthogonal matrix that spreads every channel over all.

    Args:
        x: [..., K], floating point.
        inverse: undoes the rotation.

    Returns:
        [..., K], x's dtype; lengths of rows are kept.
    """
    K = x.shape[-1]
    blocks, f, p = split(K)
    if f * p == 1:
        return x
    left = orthogonal_on(f, x.device, x.dtype, transposed=not inverse)
    right = orthogonal_on(p, x.device, x.dtype, transposed=inverse)
    y = x.reshape(*x.shape[:-1], blocks, f, p) @ right  # [..., blocks, f, p]
    return (left @ y).reshape(x.shape)


@cache
def split(K: int) -> tuple[int, int, int]:
    """(blocks, f, p) with K = blocks * f * p, f and p orders of Hadamard matrices, f near p."""
    order = next((n for n in range(K, 0, -1) if K % n == 0 and _base(n)), 1)
    pairs = [(f, order // f) for f in range(1, order + 1) if order % f == 0]
    pairs = [(f, p) for f, p in pairs if _base(f) and _base(p)]
    f, p = min(pairs, key=lambda pair: sum(pair))
    return K // order, f, p


def _base(n: int) -> int:
    """The Paley order (or 1) that n is a power of two times, 0 where there is none."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    return next((b for b in PALEY if b // (b & -b) == odd and n % b == 0), 0)


def orthogonal(n: int) -> Tensor:
    """[n, n] float64: a Hadamard matrix over sqrt(n), for n = 1, 2, and the orders of `split`."""
    return signs(n).double() / n**0.5


@cache
def signs(n: int) -> Tensor:
    """[n, n] float32: the Hadamard matrix itself."""
    base = _base(n)
    H = _paley(base) if base > 1 else torch.ones(1, 1)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


@cache
def orthogonal_on(n: int, device: torch.device, dtype: torch.dtype, transposed: bool) -> Tensor:
    """`orthogonal`, copied once to a device: a copy at every call would make the host wait.

    Transposed, it is a tensor of its own: Inductor loses a constant that is read both ways.
    """
    H = orthogonal(n).to(device, dtype)
    return H.T.contiguous() if transposed else H


@cache
def signs_on(n: int, device: torch.device) -> Tensor:
    return signs(n).to(device)


def _paley(order: int) -> Tensor:
    """A Hadamard matrix from the quadratic residues of a prime field."""
    q = PALEY[order]
    residue = torch.full((q,), -1.0)
    residue[torch.arange(1, q).square() % q] = 1
    residue[0] = 0
    i = torch.arange(q)
    Q = residue[(i[:, None] - i) % q]  # Jacobsthal matrix
    edge = torch.ones(1, q)
    if q % 4 == 3:
        S = torch.cat([torch.cat([torch.zeros(1, 1), edge], 1), torch.cat([-edge.T, Q], 1)])
        return S + torch.eye(q + 1)
    S = torch.cat([torch.cat([torch.zeros(1, 1), edge], 1), torch.cat([edge.T, Q], 1)])
    on, off = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(S, on) + torch.kron(torch.eye(q + 1), off)
