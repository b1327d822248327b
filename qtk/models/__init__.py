"""Where the parts of a model are: names only, one file a family, found by `config.model_type`.

Every supported family is a stack of the same block: attention (q, k, v, out) and a two-layer MLP
(fc1, activation, fc2), with a LayerNorm before each (pre-norm) or after each (post-norm).
"""

from dataclasses import dataclass

from torch import nn

from qtk.discover import available, load
from qtk.errors import ModelError


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor, and so share one input quantizer.

    Attributes:
        name: "qkv", "out", "fc1" or "fc2".
        linears: full module names.
        norm: full name of the LayerNorm whose output they read, if one stands right before them.
    """

    name: str
    linears: tuple[str, ...]
    norm: str | None = None
    rotated: bool = False  # what they read is rotated already, offline (qtk/transform/rotate.py)


@dataclass(frozen=True)
class Block:
    """One transformer block. Names are relative to the block, but `name` and `input_norm`.

    Attributes:
        input_norm: full name of the LayerNorm whose output q, k and v read, None if there is none.
        activation: "gelu", "gelu_tanh" or "relu"; None for one that has no fused kernel.
        rotated: the residual stream and the heads' values were rotated offline.
    """

    name: str
    q: str
    k: str
    v: str
    out: str
    fc1: str
    fc2: str
    norm1: str
    norm2: str
    input_norm: str | None
    pre_norm: bool
    heads: int
    activation: str | None
    causal: bool = False
    rotated: bool = False

    @property
    def attention(self) -> str:
        """Full name of the module that q, k and v belong to."""
        return f"{self.name}.{self.q.rpartition('.')[0]}"

    @property
    def groups(self) -> tuple[Group, ...]:
        """In the order of computation."""
        mlp_norm = f"{self.name}.{self.norm2 if self.pre_norm else self.norm1}"
        return (
            Group(
                "qkv",
                tuple(f"{self.name}.{n}" for n in (self.q, self.k, self.v)),
                self.input_norm,
                self.rotated,
            ),
            Group("out", (f"{self.name}.{self.out}",), None, self.rotated),
            Group("fc1", (f"{self.name}.{self.fc1}",), mlp_norm, self.rotated),
            Group("fc2", (f"{self.name}.{self.fc2}",)),
        )


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
    "relu": "relu",
}


def fused_activation(name: object) -> str | None:
    """The kernel's name of a transformers activation, None where there is no kernel for it."""
    return ACTIVATIONS.get(name) if isinstance(name, str) else None


def describe(model: nn.Module) -> tuple[Block, ...]:
    """The blocks of a transformers model, in order.

    Raises:
        ModelError: the architecture is not supported, or its family file names what is not there.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = str(model_type).replace("-", "_")
    if family not in available("models"):
        raise ModelError(
            f"{type(model).__name__} (model_type {model_type!r}) is not supported; "
            f"supported: {', '.join(available('models'))}"
        )
    blocks = tuple(load("models", family).blocks(model))
    _check(model, blocks, family)
    return blocks


def stream_of(model: nn.Module) -> Stream | None:
    """The model's residual stream, None where it is not pre-norm or where its output is the stream.

    A family file without a function `stream` has none.
    """
    family = str(model.config.model_type).replace("-", "_")  # type: ignore[union-attr]
    find = getattr(load("models", family), "stream", None)
    return None if find is None else find(model)


def prefix(model: nn.Module, base: str) -> str:
    """ "bert." when the encoder sits inside a model with a head, "" when it is the model."""
    return f"{base}." if hasattr(model, base) else ""


def _check(model: nn.Module, blocks: tuple[Block, ...], family: str) -> None:
    modules = dict(model.named_modules())
    for block in blocks:
        norms = [f"{block.name}.{block.norm1}", f"{block.name}.{block.norm2}"]
        linears = [name for group in block.groups for name in group.linears]
        missing = [n for n in linears + norms + [block.input_norm or norms[0]] if n not in modules]
        if missing:
            raise ModelError(
                f"qtk/models/{family}.py does not fit {type(model).__name__}: no {missing}; "
                "this transformers release names its modules differently"
            )
