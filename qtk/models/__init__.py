"""Where the parts of a model are: names only, one file a family, found by `config.model_type`.

A network that is no model of transformers needs no file: `_network.py` finds its blocks.

Whatever a family is made of, its blocks have groups of linears that read one tensor each; that is
all that quantizing needs. A block with an anatomy - attention and an MLP with a LayerNorm before
each (pre-norm) or after each (post-norm) - can also be fused, and its rotations merged.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qtk.discover import available, load
from qtk.errors import ModelError

QKV = "qkv"  # the name of the group that is q, k and v of one attention, in this order


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor, and so share one input quantizer.

    Attributes:
        name: of the group inside its block; `QKV` is q, k and v.
        linears: full module names.
        norm: full name of the LayerNorm whose output they read, if one stands right before them.
        rotated: what they read is rotated already, offline (qtk/transform/_merge.py).
    """

    name: str
    linears: tuple[str, ...]
    norm: str | None = None
    rotated: bool = False


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T / sqrt(D)) v and the projection after it; names relative to the block."""

    q: str
    k: str
    v: str
    out: str
    heads: int
    causal: bool = False

    @property
    def module(self) -> str:
        """The module that q, k and v belong to."""
        return self.q.rpartition(".")[0]


@dataclass(frozen=True)
class Mlp:
    """down(activation(up(x))); names relative to the block.

    Attributes:
        up: linears whose outputs are joined; two where one is the gate.
        activation: a name in `qtk_kernels.activation`, None for one that has no kernel.
        gated: the first half of the joined outputs is the gate: activation(gate) * rest.
    """

    up: tuple[str, ...]
    down: str
    activation: str | None
    gated: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Everything a fused block computes, and in which order; names relative to the block.

    Attributes:
        norm1, norm2: the LayerNorms before (pre-norm) or after (post-norm) attention and MLP.
        scales: vectors that multiply the output of attention and MLP (LayerScale), or none.
    """

    attention: Attention
    mlp: Mlp
    norm1: str
    norm2: str
    pre_norm: bool
    scales: tuple[str, str] | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """In the order of computation."""
        attention, mlp = self.attention, self.mlp
        return attention.q, attention.k, attention.v, attention.out, *mlp.up, mlp.down


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        name: full module name.
        groups: its linears, in the order of computation.
        anatomy: None for a block that is quantized, but neither fused nor merged.
        follows: it reads what the block before it gives, tokens [B, T, H], and nothing else that
            changes. Of others only the model knows what they read, and when.
    """

    name: str
    groups: tuple[Group, ...]
    anatomy: Anatomy | None = None
    follows: bool = True

    @classmethod
    def of(cls, name: str, anatomy: Anatomy, input_norm: str | None) -> "Block":
        """With the groups that follow from an anatomy.

        Args:
            input_norm: full name of the LayerNorm whose output q, k and v read, None for none.
        """
        q, k, v, out, *up, down = (f"{name}.{linear}" for linear in anatomy.linears)
        norm = f"{name}.{anatomy.norm2 if anatomy.pre_norm else anatomy.norm1}"
        groups = (
            Group(QKV, (q, k, v), input_norm), Group("out", (out,)),
            Group("up", tuple(up), norm), Group("down", (down,)),
        )  # fmt: skip
        return cls(name, groups, anatomy)

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of all linears, in the order of computation."""
        return tuple(name for group in self.groups for name in group.linears)

    @property
    def attention(self) -> str | None:
        """Full name of the module that q, k and v belong to, where the anatomy tells."""
        return None if self.anatomy is None else f"{self.name}.{self.anatomy.attention.module}"

    @property
    def causal(self) -> bool:
        return self.anatomy is not None and self.anatomy.attention.causal

    def ordered(self, place: Mapping[str, int]) -> "Block":
        """The same with those groups alone whose linears have a place, in that order."""
        known = [group for group in self.groups if group.linears[0] in place]
        return replace(self, groups=tuple(sorted(known, key=lambda g: place[g.linears[0]])))

    def inside(self, name: str) -> str:
        """A full name relative to the block, "" for the block itself."""
        return name.removeprefix(self.name).removeprefix(".")

    def rotated(self, *groups: str) -> "Block":
        """The same with what these groups read marked as rotated."""
        marked = (replace(g, rotated=g.rotated or g.name in groups) for g in self.groups)
        return replace(self, groups=tuple(marked))


@dataclass(frozen=True)
class Stream:
    """The two ends of a pre-norm model's residual stream, by full names.

    Attributes:
        embeddings: parameters that write into it, each with the axis that is H wide.
        norm: the LayerNorm that it ends in.
        heads: the linears that read that norm, and nothing else does.
    """

    embeddings: dict[str, int]
    norm: str
    heads: tuple[str, ...]


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def fused_activation(name: object) -> str | None:
    """The kernel's name of a transformers activation, None where there is no kernel for it."""
    return ACTIVATIONS.get(name) if isinstance(name, str) else None


def describe(model: nn.Module, wanted: Sequence[str] | None = None) -> tuple[Block, ...]:
    """The blocks of a model, in order.

    Args:
        wanted: patterns of the names of the blocks, of a plain network alone.

    Raises:
        ModelError: not a whole model, not a supported architecture, or one whose family file names
            what is not there.
    """
    check_whole(model)
    if is_network(model):
        return tuple(_network_blocks(model, wanted))
    if wanted is not None:
        raise ModelError(
            f"blocks= is for plain networks; those of a {type(model).__name__} are known"
        )
    family = _family(model)
    if family not in available("models"):
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise ModelError(
            f"{type(model).__name__} (model_type {model_type!r}) is not supported; "
            f"supported: {', '.join(available('models'))}. A family is one file of names: "
            "CONTRIBUTING.md says what stands in it"
        )
    blocks = tuple(load("models", family).blocks(model))
    _check(model, blocks, family)
    return blocks


def is_network(model: object) -> bool:
    """Whether it is a module that is no model of transformers."""
    import transformers

    return isinstance(model, nn.Module) and not isinstance(model, transformers.PreTrainedModel)


def main_input(model: nn.Module) -> str:
    """The name of what `forward` reads first."""
    if not is_network(model):
        return str(getattr(model, "main_input_name", "input_ids"))
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    found = next(iter(parameters), None)
    if found is None or found.kind not in kinds:
        raise ModelError(
            f"{type(model).__name__}.forward has no first argument with a name, such as "
            "forward(self, x)"
        )
    return found.name


def check_whole(model: nn.Module) -> None:
    """Raises ModelError for what holds a model of transformers, or is a part of one."""
    import transformers

    cls = type(model).__name__
    if isinstance(model, transformers.PreTrainedModel):
        return
    if hasattr(model, "merge_and_unload"):
        raise ModelError(f"a {cls} is a model with adapters: give model.merge_and_unload()")
    for name, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel):
            steps = (f"[{step}]" if step.isdigit() else f".{step}" for step in name.split("."))
            raise ModelError(
                f"a {cls} is a wrapper: give the transformers model inside it, "
                f"model{''.join(steps)}"
            )
    if type(model).__module__.startswith("transformers."):
        raise ModelError(
            f"a {cls} is no model of transformers, or only a part of one; give a model, a folder "
            "or a hub name"
        )


def stream_of(model: nn.Module) -> Stream | None:
    """The model's residual stream, None where it is not pre-norm or where its output is the stream.

    A family file without a function `stream` has none.
    """
    if is_network(model):
        return None
    find = getattr(load("models", _family(model)), "stream", None)
    return None if find is None else find(model)


@torch.no_grad()
def fold_scales(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Multiplies LayerScale's vectors into the linears before them, in place, and leaves ones.

    diag(s) (W x + b) = (diag(s) W) x + s b: the function is the same, up to one rounding.
    """
    for block in blocks:
        if block.anatomy is None or block.anatomy.scales is None:
            continue
        writers = (block.anatomy.attention.out, block.anatomy.mlp.down)
        for writer, name in zip(writers, block.anatomy.scales, strict=True):
            scale = model.get_parameter(f"{block.name}.{name}")
            linear = model.get_submodule(f"{block.name}.{writer}")
            assert isinstance(linear, nn.Linear)
            linear.weight.mul_(scale[:, None])
            if linear.bias is not None:
                linear.bias.mul_(scale)
            scale.fill_(1)


def _network_blocks(model: nn.Module, wanted: Sequence[str] | None) -> Iterator[Block]:
    from qtk.models import _network  # which stands on the words of this file

    return _network.blocks(model, wanted)


def _family(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return str(model_type).replace("-", "_")


def _check(model: nn.Module, blocks: tuple[Block, ...], family: str) -> None:
    modules = dict(model.named_modules())
    for block in blocks:
        names = [*block.linears, *(group.norm for group in block.groups if group.norm)]
        if block.anatomy is not None:
            norms = (block.anatomy.norm1, block.anatomy.norm2)
            names += [f"{block.name}.{norm}" for norm in norms]
        missing = [name for name in names if name not in modules]
        for name in block.linears:
            if hasattr(modules.get(name), "base_layer"):
                raise ModelError(
                    f"{name} is a {type(modules[name]).__name__} around a linear: merge the "
                    "adapters, as merge_and_unload() does, and give the plain model"
                )
        if missing:
            raise ModelError(
                f"qtk/models/{family}.py does not fit {type(model).__name__}: no {missing}; "
                "this transformers release names its modules differently: install the newest"
            )
