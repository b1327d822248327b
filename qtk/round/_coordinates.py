"""Coordinate descent on the codes: each is set to the best integer while the others stay.

    error(q) = (q s - w) H (q s - w)^T,      q_i <- round(q_i - g_i / (H_ii s_i)),   g = (q s - w) H

No step raises the error, so that what comes out is never worse than what goes in. The columns go
by as in GPTQ, the largest H_ii first.
"""

import torch
from torch import Tensor

from qtk.scheme import Format

BLOCK = 64  # columns whose changes are carried on together
SWEEPS = 2  # more lower the error on the calibration data alone


def descended(codes: Tensor, scale: Tensor, weight: Tensor, hessian: Tensor, fmt: Format) -> Tensor:
    """Codes [N, K] after SWEEPS passes; `scale` is [N, K], `hessian` [K, K]."""
    order = hessian.diag().argsort(descending=True)
    H = hessian[order][:, order]
    q, step = codes[:, order].clone(), scale[:, order]
    g = (q * step - weight[:, order]) @ H
    for _ in range(SWEEPS):
        for start in range(0, len(H), BLOCK):
            part = slice(start, start + BLOCK)
            change = _pass(q[:, part], g[:, part].clone(), step[:, part], H[part, part], fmt)
            g += change @ H[part]
    return q[:, order.argsort()]


def _pass(q: Tensor, g: Tensor, step: Tensor, H: Tensor, fmt: Format) -> Tensor:
    """Sets one block's codes `q` in place; returns by how much the weights changed."""
    change = torch.zeros_like(q)
    for i in range(len(H)):
        best = (q[:, i] - g[:, i] / (H[i, i] * step[:, i])).round().clamp(fmt.qmin, fmt.qmax)
        change[:, i] = (best - q[:, i]) * step[:, i]
        g += change[:, i, None] * H[i]
        q[:, i] = best
    return change
