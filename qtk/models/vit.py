"""ViT: pre-norm, GELU, no mask."""

from functools import partial

from torch import nn

from qtk.models import Stream
from qtk.models._layout import Layout
from qtk.models._tiny import image

LAYOUT = Layout(
    layers="layers",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    norm1="layernorm_before",
    norm2="layernorm_after",
    pre_norm=True,
)

blocks = partial(LAYOUT.blocks, base="vit")


def stream(
    model: nn.Module, base: str = "vit", heads: tuple[str, ...] = ("classifier",)
) -> Stream | None:
    """Of a classifier: the bare model's output is the stream itself."""
    found = tuple(n for n in heads if isinstance(getattr(model, n, None), nn.Linear))
    if not hasattr(model, base) or not found:
        return None
    patches = f"{base}.embeddings.patch_embeddings.projection"
    tokens = ("cls_token", "distillation_token", "position_embeddings")
    embeddings = {f"{base}.embeddings.{n}": 2 for n in tokens}
    embeddings |= {f"{patches}.weight": 0, f"{patches}.bias": 0}
    names = dict(model.named_parameters())
    present = {n: axis for n, axis in embeddings.items() if n in names}
    return Stream(present, f"{base}.layernorm", found)


tiny = partial(image, "ViTForImageClassification", num_labels=5)
