"""Models inside other objects: one message that says where the model is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtk
from tests.zoo import build


class Adapter(nn.Module):
    """A stand-in for an adapter's layer around a linear."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


class Adapted(nn.Module):
    """A stand-in for a model with adapters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model, self.config = model, model.config

    def merge_and_unload(self) -> nn.Module:
        return self.base_model


class Configured(nn.Sequential):
    """A pipeline that passes on its first module's config."""

    @property
    def config(self) -> Any:
        return self[0].config


@pytest.mark.parametrize("wrap, told", [
    (torch.compile, r"give the transformers model inside it, model\._orig_mod"),
    (nn.DataParallel, r"model\.module"),
    (lambda m: nn.Sequential(nn.ModuleDict({"auto_model": m})), r"model\[0\]\.auto_model"),
    (lambda m: Configured(m, nn.Identity()), r"model\[0\]"),
    (Adapted, r"model\.merge_and_unload\(\)"),
    (lambda m: m.encoder, "or only a part of one"),
])  # fmt: skip
def test_a_wrapped_model_is_told_where_the_model_is(wrap: Any, told: str) -> None:
    model, batch = build("BertModel")
    wrapped = wrap(model)
    for call in (
        lambda: qtk.quantize(wrapped, calib=[batch], progress=False),
        lambda: qtk.evaluate(wrapped, model, [batch]),
    ):
        with pytest.raises(qtk.ModelError, match=told) as caught:
            call()
        assert "names its modules differently" not in str(caught.value)


def test_the_first_part_of_a_sentence_transformer_is_told_where_its_model_is(
    tiny_bert: Path,
) -> None:
    st = pytest.importorskip("sentence_transformers")
    part = st.SentenceTransformer(str(tiny_bert), device="cpu")[0]
    with pytest.raises(qtk.ModelError, match="give the transformers model inside it, model"):
        qtk.quantize(part)


def test_an_adapter_inside_the_model_is_named() -> None:
    model, batch = build("BertModel")
    attention = model.encoder.layer[0].attention.self
    attention.query = Adapter(attention.query)
    with pytest.raises(qtk.ModelError, match=r"attention\.self\.query is a Adapter.*merge"):
        qtk.quantize(model, calib=[batch], progress=False)


def test_a_family_that_is_not_known_says_how_one_is_added() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9))
    with pytest.raises(qtk.ModelError, match=r"one file of names.*CONTRIBUTING\.md"):
        qtk.quantize(model)


@pytest.mark.parametrize("path", ["/no/such", "./no/such", Path("/no/such")])
def test_a_folder_that_is_not_there_is_told_as_such(path: Any) -> None:
    for call in (qtk.quantize, qtk.load, qtk.summary):
        with pytest.raises(qtk.QtkError, match="no such folder"):
            call(path)
