"""Attention's two products and softmax on integers: what replaces the float function between q, k
and v and the output projection, in fused blocks and in transformers' own modules alike.

q and k become codes with one scale per token and head, found when they are there, so that neither
padding nor later tokens change a result; v has one static scale a channel, because its tokens are
what the product sums over. Probabilities are divided by the sum of their quantized values.

Codes of fewer than 8 bits are stored as int8 and multiplied as such: they cost what 8 bits cost.
The kernel reads packed int4 q and k and float8 v too, which nothing here makes yet. On a CPU the
products are of float32 tensors that hold the codes: exact, with no speed to gain.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from qtk.models import Attention
from qtk.modules.base import Float32Buffers
from qtk.scheme import AttentionScheme
from qtk_kernels.dispatch import backend_of
from qtk_kernels.heads_quantize import heads_quantize
from qtk_kernels.quantized_attention import attention_weights, quantized_attention

CHILD = "qtk_attention"  # its name inside the attention module of a model
KINDS = {"log-sqrt2": "log2"}  # kinds that the kernel calls otherwise


class QuantAttention(Float32Buffers):
    """softmax(q k^T) v, quantized. H heads, D head size.

    Buffers (`state_dict`):
        v_scale: [H, D] float32, with integer products only.
        softmax_step: [H] float32, of "matthew" only.
    """

    v_scale: Tensor | None
    softmax_step: Tensor | None

    def __init__(
        self, heads: int, head_size: int, scheme: AttentionScheme, *, backend: str = "auto",
        device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.head_size, self.scheme, self.backend = heads, head_size, scheme, backend
        shapes = {
            "v_scale": (heads, head_size) if scheme.bits else None,
            "softmax_step": (heads,) if scheme.softmax == "matthew" else None,
        }
        for name, shape in shapes.items():
            value = None if shape is None else torch.ones(shape, device=device)
            self.register_buffer(name, value)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
        mask: Tensor | None = None, causal: bool = False, **sequences: Any,
    ) -> Tensor:  # fmt: skip
        """Attention; gradients are those of the float attention at the same q, k and v.

        Args:
            q, k, v: [B, H, T, D], floats.
            scale: of the logits, D ** -0.5 if not given.
            mask: bool, or float with 0 where a key may be seen and a large negative number
                elsewhere; broadcast against [B, H, Tq, Tk].
            causal: hide the keys after each query.
            sequences: `sequences` and `longest` of `quantized_attention`, without gradients.

        Returns:
            [B, Tq, H * D] in q's dtype.
        """
        if mask is not None and mask.dtype != torch.bool:
            mask = mask >= 0
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out: Tensor = _StraightThrough.apply(q, k, v, self, scale, mask, causal)
            return out
        return self.attend(q, k, v, scale, mask, causal, **sequences)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None,
        causal: bool, **sequences: Any,
    ) -> Tensor:  # fmt: skip
        backend, dtype = backend_of(q, self.backend), q.dtype
        (q, k, v), scales = self.codes(q, k, v, bool(sequences))
        return quantized_attention(
            q, k, v, **scales, v_scale=None if self.v_scale is None else self.v_scale[None],
            **self.softmax(), scale=scale, mask=mask, causal=causal, out_dtype=dtype,
            backend=backend, **sequences,
        )  # fmt: skip

    def weights(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
        mask: Tensor | None = None, causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """The quantized probabilities, [B, H, Tq, Tk] float32; arguments as `forward`."""
        if mask is not None and mask.dtype != torch.bool:
            mask = mask >= 0
        (q, k, v), scales = self.codes(q, k, v)
        return attention_weights(
            q, k, v, **scales, **self.softmax(), scale=scale, mask=mask, causal=causal
        )

    def softmax(self) -> dict[str, Any]:
        """The arguments of the kernel that say how probabilities are quantized."""
        kind = self.scheme.softmax
        bits = self.scheme.softmax_bits if kind not in ("float", "code") else None
        return {
            "softmax": KINDS.get(kind, kind), "bits": bits or 8, "steps": self.scheme.steps,
            "step": self.softmax_step, "renormalize": kind not in ("float", "code"),
        }  # fmt: skip

    def codes(
        self, q: Tensor, k: Tensor, v: Tensor, packed: bool = False
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """q, k and v as codes, with the scales of q and k; floats stay as they are.

        Args:
            packed: they are the tokens of several sentences, one after another.
        """
        bits = self.scheme.bits
        if bits is None or self.v_scale is None:
            return (q, k, v), {}
        # a product of bytes wants the tokens of v side by side; one sentence after another, they
        # begin anywhere
        bytes_ = self.scheme.softmax in ("uniform", "matthew") and not packed
        found = heads_quantize(
            q, k, v, 1 / self.v_scale, bits, transposed=bytes_, backend=self.backend
        )
        return found[:3], {"q_scale": found.q_scale, "k_scale": found.k_scale}

    @property
    def kernel(self) -> str:
        """The name of what really computes."""
        device = next((b for b in self.buffers()), torch.empty(0))
        backend = backend_of(device, self.backend)
        if backend == "triton":
            return "triton quantized_attention"
        return "torch quantized_attention (float32)"

    def blank(self) -> "QuantAttention":
        return QuantAttention(self.heads, self.head_size, self.scheme, device="meta")

    def extra_repr(self) -> str:
        return f"{self.heads} heads of {self.head_size}, {self.scheme.name}"


def attend(
    qkv: Tensor, anatomy: Attention, layer: int, mask: Tensor | None, cache: Any = None,
    products: QuantAttention | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(D) + mask) v, quantized or in floating point.

    Args:
        qkv: [B, T, 3 * H].
        layer: the block's place, by which a cache knows it.
        mask: bool, or float that is added, broadcast against [B, heads, T, Tk].

    Returns:
        [B, T, H].
    """
    B, T, width = qkv.shape
    heads, D = anatomy.heads, width // (3 * anatomy.heads)
    q, k, v = qkv.view(B, T, 3, heads, D).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
    if cache is not None:
        k, v = cache.update(k, v, layer)
    causal = anatomy.causal and mask is None and T > 1
    if products is not None:
        return products(q, k, v, mask=mask, causal=causal)
    if mask is not None and mask.dtype == torch.bool and not mask.is_cuda:
        # added, not selected: a CPU's attention takes 5.6 ms instead of 9 for 16x12x128x32
        blocked = torch.finfo(q.dtype).min
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, blocked)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return context.transpose(1, 2).reshape(B, T, heads * D)


def reads_sequences(backend: str, products: QuantAttention | None, dtype: torch.dtype) -> bool:
    """Whether attention reads one sentence after another, in a block on this backend.

    A CPU computes on padded sentences with PyTorch's own attention, and so does a GPU in float32.
    """
    if products is not None:
        return backend != "cpu"
    return backend == "triton" and dtype.itemsize == 2


def attend_sequences(
    qkv: Tensor, anatomy: Attention, sequences: Tensor, longest: int, causal: bool,
    products: QuantAttention | None = None,
) -> Tensor:  # fmt: skip
    """`attend` on sentences one after another, without padding.

    With quantized products the bits are those of padded sentences. Floats are multiplied by the
    kernel for them, which sums in another order than PyTorch's attention.

    Args:
        qkv: [1, N, 3 * H].
        sequences, longest: as `quantized_attention` takes them.

    Returns:
        [1, N, H].
    """
    _, N, width = qkv.shape
    heads, D = anatomy.heads, width // (3 * anatomy.heads)
    q, k, v = qkv.view(1, N, 3, heads, D).permute(2, 0, 3, 1, 4)  # each [1, heads, N, D]
    if products is not None:
        return products(q, k, v, causal=causal, sequences=sequences, longest=longest)
    return quantized_attention(
        q, k, v, causal=causal, sequences=sequences, longest=longest, out_dtype=qkv.dtype
    )


class _StraightThrough(torch.autograd.Function):
    """Codes forward; backward as if nothing had been rounded."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, module: QuantAttention, scale: float | None,
        mask: Tensor | None, causal: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v)
        ctx.rest = scale, mask, causal
        return module.attend(q, k, v, scale, mask, causal)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, mask, causal = ctx.rest
        qkv = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        q, k, v = qkv
        if causal:
            Tq, Tk = q.shape[2], k.shape[2]
            below = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
            mask = below if mask is None else mask & below
        with torch.enable_grad():
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            y = y.transpose(1, 2).flatten(2)
        return *torch.autograd.grad(y, qkv, grads[0]), None, None, None, None


def install(parent: nn.Module, attention: QuantAttention) -> None:
    """Makes a transformers attention module compute its products with `attention`.

    The module gets a config of its own, because the model's says how masks look, and a caller may
    change that.
    """
    parent.add_module(CHILD, attention)
    config: Any = copy.copy(parent.config)
    config._attn_implementation = "qtk"
    parent.config = config


def qtk_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention interface: [B, H, T, D] each to [B, T, H, D] and the maps."""
    attention: QuantAttention = getattr(module, CHILD)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    options: dict[str, Any] = {"scale": scaling, "mask": attention_mask, "causal": causal}
    out = attention(query, key, value, **options)
    wanted = kwargs.get("output_attentions") or module._forward_hooks
    weights = attention.weights(query, key, value, **options).to(out.dtype) if wanted else None
    return out.unflatten(-1, (attention.heads, attention.head_size)), weights


AttentionInterface.register("qtk", qtk_attention_forward)
