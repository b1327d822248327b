"""Rotations merged into a model's weights: they cost nothing when it runs.

The residual stream of a pre-norm model rotates as a whole: what writes into it, and what reads it
behind a norm, whose gain and offset go into those readers first. The values of every attention
head rotate too. QuaRot (https://arxiv.org/abs/2404.00456) turns LayerNorm into RMSNorm for this,
because a rotation does not keep the mean that LayerNorm takes off. Here the rotation is one that
leaves the vector of ones where it is, so that it keeps the mean, and LayerNorm stays LayerNorm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtk.hadamard import rotate
from qtk.models import QKV, Block, Stream, stream_of


@torch.no_grad()
def prepare(model: nn.Module, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Rotates the residual stream and the values of a pre-norm model, in place, its function kept.

    Returns:
        The blocks, marked as rotated; unchanged, and the model too, where there is no such stream:
        post-norm models, models whose output is the stream, norms without a gain.
    """
    stream = stream_of(model)
    if stream is None or not all(block.anatomy and block.anatomy.pre_norm for block in blocks):
        return tuple(blocks)
    if any(not _is_affine(model.get_submodule(name)) for name in _norms(blocks, stream)):
        return tuple(blocks)
    _untie(model, stream)
    R = keeping_ones(_norm(model, stream.norm).normalized_shape[0])
    for name, axis in stream.embeddings.items():
        parameter = model.get_parameter(name)
        parameter.copy_((parameter.double().movedim(axis, -1) @ R).movedim(-1, axis))
    for block in blocks:
        _rotate_block(model, block, R)
    heads = [_linear(model, name) for name in stream.heads]
    _absorb(_norm(model, stream.norm), heads, R)
    return tuple(block.rotated(QKV, "out", "up") for block in blocks)


def keeping_ones(width: int) -> Tensor:
    """[width, width] float64, orthogonal, u R = u for u the vector of ones over sqrt(width).

    A Householder reflection takes the image of u under the Hadamard rotation back to u: a
    correction of rank one, so that all entries but a row's and a column's stay near 1/sqrt(width).
    """
    H = rotate(torch.eye(width, dtype=torch.float64))
    u = torch.full((width,), width**-0.5, dtype=torch.float64)
    v = u @ H - u
    size = v @ v
    return H if size < 1e-24 else H - 2 * torch.outer(H @ v, v) / size


def _rotate_block(model: nn.Module, block: Block, R: Tensor) -> None:
    """Readers of the stream get W R, writers R^T W; every head's values are rotated apart."""
    anatomy = block.anatomy
    assert anatomy is not None
    q, k, v, out, *up, down = (_linear(model, name) for name in block.linears)
    _absorb(_norm(model, f"{block.name}.{anatomy.norm1}"), [q, k, v], R)
    _absorb(_norm(model, f"{block.name}.{anatomy.norm2}"), up, R)
    heads = torch.eye(anatomy.attention.heads, dtype=torch.float64)
    D = v.out_features // anatomy.attention.heads
    V = torch.kron(heads, rotate(torch.eye(D, dtype=torch.float64)))
    _rotate_output(v, V)
    out.weight.copy_(out.weight.double() @ V)
    for writer in (out, down):
        _rotate_output(writer, R)


def _absorb(norm: nn.LayerNorm, readers: Sequence[nn.Linear], R: Tensor) -> None:
    """Moves a norm's gain and offset into the linears that read it, and rotates their inputs.

    A reader without a bias (a language model's head) cannot take the offset: it stays in the norm,
    divided by the gain and rotated.
    """
    gain, offset = norm.weight.double().clone(), norm.bias.double().clone()
    stays = any(reader.bias is None for reader in readers)
    for reader in readers:
        weight = reader.weight.double()
        if not stays:
            reader.bias.copy_(reader.bias.double() + weight @ offset)
        reader.weight.copy_(weight * gain @ R)
    norm.weight.fill_(1)
    norm.bias.copy_(offset / gain @ R if stays else torch.zeros_like(offset))


def _rotate_output(linear: nn.Linear, R: Tensor) -> None:
    linear.weight.copy_(R.T @ linear.weight.double())
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() @ R)


def _untie(model: nn.Module, stream: Stream) -> None:
    """Gives a head that shares the token table a table of its own: they rotate differently."""
    tables = [model.get_parameter(name) for name in stream.embeddings]
    for name in stream.heads:
        head = _linear(model, name)
        if any(head.weight is table for table in tables):
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
            model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _norms(blocks: Sequence[Block], stream: Stream) -> list[str]:
    pairs = [(b.name, b.anatomy) for b in blocks if b.anatomy is not None]
    return [f"{name}.{n}" for name, a in pairs for n in (a.norm1, a.norm2)] + [stream.norm]


def _is_affine(norm: nn.Module) -> bool:
    """Whether gain and offset are there, and every gain can be divided by."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    return bool((norm.weight.abs() > 1e-6).all())


def _norm(model: nn.Module, name: str) -> nn.LayerNorm:
    module = model.get_submodule(name)
    assert isinstance(module, nn.LayerNorm), name
    return module


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear), name
    return module
