"""What every layer of a quantized model is, and what really runs it."""

import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from qtk import assembly
from qtk.integrations.sentence_transformers import unwrap
from qtk.integrations.transformers import load, record_of
from qtk.models import describe
from qtk.modules.conv import QuantConv2d
from qtk.packages.served import bundle_of
from qtk.record import Layer
from qtk.table import finite, ruled

BRACKETS = re.compile(r"(.*?) \((.*?)\)")  # "kernel (remark)"


@dataclass(frozen=True)
class LayerSummary:
    """One linear layer, or an embedding in integers.

    Attributes:
        scheme: "W8A8", or "float".
        kernel: the name of what computes it on this machine.
        fused: the layer runs inside a fused block.
        bytes, float_bytes: of the weight as stored, and as float32.
        sqnr: of the layer's output on the calibration data, dB; None where it was not measured.
        recipe: the parts that it was made with, in words; None where that is not known.
    """

    name: str
    scheme: str
    kernel: str
    fused: bool
    bytes: int
    float_bytes: int
    sqnr: float | None
    recipe: str | None = None


@dataclass(frozen=True)
class Summary:
    """A quantized model, layer by layer.

    Attributes:
        layers: the linears of the blocks, in order; then heads and embeddings in integers.
        recipe: how it was made.
        other_bytes: of everything else: embeddings, norms, heads.
        attention: how attention's products and softmax compute, "float" or in words.
        attention_kernel: the name of what computes them on this machine.
        packages: native code that serves calls of its sizes, "plain-1x16".
    """

    layers: tuple[LayerSummary, ...]
    recipe: dict[str, Any]
    other_bytes: int
    attention: str = "float"
    attention_kernel: str = "torch scaled_dot_product_attention"
    packages: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        return sum(layer.float_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an error that is not finite becomes None."""
        return finite({
            "layers": [asdict(layer) for layer in self.layers],
            "recipe": self.recipe,
            "attention": self.attention,
            "attention_kernel": self.attention_kernel,
            "packages": self.packages,
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            "other_bytes": self.other_bytes,
        })  # fmt: skip

    def table(self) -> str:
        """Plain text, a line a layer, and the totals.

        What lines would repeat - the start of the names, the kernel, whether it is fused, what is
        in brackets after a kernel - stands once, below.
        """
        root = common_prefix([layer.name for layer in self.layers])
        kernels = {(layer.kernel, layer.fused) for layer in self.layers}
        each = len(kernels) > 1
        head = ["layer", "scheme", *(["kernel", "fused"] if each else []), "kB", "of fp32", "SQNR"]
        rows = [_row(layer, root, each) for layer in self.layers]
        totals = [
            f"layers {_megabytes(self.bytes)} of {_megabytes(self.float_bytes)} in float32, "
            f"everything else {_megabytes(self.other_bytes)}",
        ]
        if not each:
            kernel, fused = next(iter(kernels), ("-", False))
            totals.append(f"all run by {kernel}, {'in fused blocks' if fused else 'not fused'}")
        else:
            totals += sorted({f"{found[1]}: {found[2]}" for kernel, _ in kernels
                              if (found := BRACKETS.match(kernel))})  # fmt: skip
        if self.attention != "float":
            totals.append(f"attention: {self.attention}, run by {self.attention_kernel}")
        if self.packages:
            totals.append(f"compiled: {', '.join(self.packages)}; other calls run as above")
        totals += _made_with(self.layers, self.recipe)
        if root:
            totals.append(f"names start with {root!r}")
        return "\n".join([*ruled(head, rows), "", *totals, "SQNR in dB, on calibration data"])


def summary(qmodel: nn.Module | str | os.PathLike[str]) -> Summary:
    """Every linear of the blocks, and what else is quantized: scheme, kernel, size and error.

    Args:
        qmodel: a quantized model, a SentenceTransformer or CrossEncoder around one, or a folder.

    Raises:
        ModelError: the model was not quantized by qtk.
        CheckpointError: the folder holds no such model.
    """
    model = load(qmodel) if isinstance(qmodel, (str, os.PathLike)) else unwrap(qmodel).model
    record = record_of(model)
    quantized = assembly.replaced_layers(model)
    blocks = assembly.fused_blocks(model)
    for fused in blocks.values():
        if not fused.is_fused:
            fused.prepare()  # moving a model drops what its first call would build again
    layers = []
    for block in describe(model):
        is_fused = block.name in blocks and blocks[block.name].is_fused
        for name in (n for group in block.groups for n in group.linears):
            if name in quantized:
                made = record.layers[assembly.base_name(model, name)]
                layers.append(_quantized(name, quantized[name], is_fused, made))
            else:
                layers.append(_float(name, model.get_submodule(name)))
    shown = {layer.name for layer in layers}
    others = [name for name in quantized if name not in shown]  # heads and embeddings asked for
    for name in others:
        made = record.layers[assembly.base_name(model, name)]
        layers.append(_quantized(name, quantized[name], False, made))
    parts = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    rest = sum(parts.values()) - sum(layer.bytes for layer in layers)  # tied weights count once
    products = next(iter(assembly.quantized_attentions(model).values()), None)
    bundle = bundle_of(model)
    found = Summary(
        tuple(layers), record.recipe, rest, packages=() if bundle is None else bundle.names()
    )
    if products is None:
        return found
    return replace(found, attention=products.scheme.name, attention_kernel=products.kernel)


def common_prefix(names: list[str]) -> str:
    """The part that all dotted names start with, up to and with a dot."""
    folders = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)


def _quantized(name: str, layer: Any, fused: bool, made: Layer) -> LayerSummary:
    inner: Any = layer.linear if isinstance(layer, QuantConv2d) else layer
    held = (inner.stored_weight(), inner.weight_scale, inner.weight_zero_point)
    size = sum(x.nbytes for x in held if x is not None)
    return LayerSummary(
        name, layer.scheme.name, layer.kernel, fused, size,
        4 * inner.in_features * inner.out_features, made.sqnr,
        None if made.recipe is None else str(made.recipe),
    )  # fmt: skip


def _float(name: str, linear: Any) -> LayerSummary:
    weight = linear.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    kernel = f"torch {type(linear).__name__.lower()} {dtype}"
    return LayerSummary(
        name, "float", kernel, False, weight.numel() * weight.element_size(), 4 * weight.numel(),
        None,
    )  # fmt: skip


def _made_with(layers: tuple[LayerSummary, ...], recipe: dict[str, Any]) -> list[str]:
    """How many layers were made with which parts, and what was learned after."""
    counts = Counter(layer.recipe for layer in layers if layer.recipe is not None)
    lines = [f"{count} made with {parts}" for parts, count in counts.items()]
    learning = recipe.get("learning")
    if isinstance(learning, dict):
        came = "" if learning.get("changed") else ": nothing, held-out data did not confirm"
        lines.append(f"then the {learning.get('of')} learned{came}")
    return lines


def _row(layer: LayerSummary, root: str, with_kernel: bool) -> list[str]:
    kernel = BRACKETS.sub(r"\1", layer.kernel)
    runs = [kernel, "yes" if layer.fused else "no"] if with_kernel else []
    return [
        layer.name.removeprefix(root), layer.scheme, *runs, f"{layer.bytes / 1e3:.1f}",
        f"{layer.bytes / max(1, layer.float_bytes):.3f}",
        "-" if layer.sqnr is None else f"{layer.sqnr:.1f}",
    ]  # fmt: skip


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
