"""GGUF of BERT encoders: what llama.cpp and those who stand on it embed with.

Weights alone in groups of 32 are Q8_0 or Q4_0: one scale and 32 codes, (code - 8) * scale for four
bits. Codes map one to one, -8 and scales of either sign included. Scales are float16 in the file,
which rounds them by 2^-11 at most. llama.cpp rounds what a product reads to 8 bits when it runs,
and its GELU is the one with tanh; neither is in the check below, which reads the file back.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtk.errors import BackendError, ModelError, SchemeError
from qtk.formats import Exported, Source
from qtk.formats._compare import compared, needs_float_attention
from qtk.grids import LinearSpec
from qtk.modules.floats import restore_floats
from qtk.observe.tokens import find_tokenizer

GROUP = 32
FILE = "model.gguf"
SPECIAL = ("unk", "sep", "pad", "mask")  # BERT's [CLS] is the beginning


def write(source: Source, folder: Path) -> Exported:
    try:
        import gguf
    except ImportError as error:
        raise BackendError(f"pip install 'qtk-torch[gguf]': {error}") from None
    model, specs = source.model, source.linears
    _check(model, specs)
    tokenizer = find_tokenizer(model, source.tokenizer)
    writer = gguf.GGUFWriter(folder / FILE, "bert")
    _describe(gguf, writer, model, _bits(specs))
    _vocabulary(gguf, writer, tokenizer, model.config.vocab_size)
    plain = copy.deepcopy(model)
    restore_floats(plain)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, model.config.num_hidden_layers)
    tensors = {k: v for k, v in plain.state_dict().items() if not k.startswith("pooler.")}
    for key, value in tensors.items():
        name, spec = names.get_name(key, (".weight", ".bias")), specs.get(key[: -len(".weight")])
        if name is None:
            continue  # position_ids
        if spec is not None and key.endswith(".weight"):
            data, kind = blocks(spec), "Q8_0" if spec.steps.fmt.bits == 8 else "Q4_0"
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    served, worst = _read_back(gguf, folder / FILE, plain, names, specs)

    @torch.no_grad()
    def run(batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"last_hidden_state": served(**batch)[0].numpy()}

    notes = [*needs_float_attention(model)]
    if source.embeddings:
        notes.append("embeddings are in float32, with the values of their codes")
    notes.append(f"scales are float16: {worst:.1e} off at most, relative to each")
    notes.append("checked on weights read back from the file, not in llama.cpp")
    return compared(source, run, format="gguf", files=(FILE,), notes=tuple(notes),
                    checked_in="gguf, its weights in PyTorch")  # fmt: skip


def _check(model: Any, specs: dict[str, LinearSpec]) -> None:
    """Raises ModelError or SchemeError for what a GGUF of BERT does not hold."""
    if type(model).__name__ != "BertModel":
        raise ModelError(
            f"GGUF is written for BertModel, an encoder without a head; this is a "
            f"{type(model).__name__}"
        )
    for name, spec in specs.items():
        if fault := _fault(spec):
            raise SchemeError(f"{name} is {spec.scheme.name}: {fault}")


def _fault(spec: LinearSpec) -> str | None:
    w, change = spec.steps.fmt, spec.grid.change
    wanted = "quantize with w=4 or 8, a=16, group_size=32"
    if spec.grid.fmt is not None or w.kind != "int" or w.bits not in (4, 8):
        return f"Q8_0 and Q4_0 are weights alone, of 8 and 4 bits; {wanted}"
    if w.group_size != GROUP or spec.codes.shape[1] % GROUP:
        return f"blocks are of 32 input channels, and rows of whole blocks; {wanted}"
    if not w.symmetric:
        return f"there is no zero point; {wanted}, weights='symmetric'"
    if change.rotation or change.shift is not None:
        return f"its input is changed before the product; {wanted}, method='none'"
    return None


def _bits(specs: dict[str, LinearSpec]) -> int:
    return min((spec.steps.fmt.bits for spec in specs.values()), default=8)


def blocks(spec: LinearSpec) -> np.ndarray:
    """[N, K / 32 * bytes] uint8: a float16 scale and the codes of 32 weights, again and again.

    Four bits: byte j has code j in its low half and code j + 16 in the other.
    """
    (N, K), bits = spec.codes.shape, spec.steps.fmt.bits
    scale = spec.steps.scale.cpu().numpy().astype(np.float16).reshape(N, K // GROUP, 1)
    codes = spec.codes.cpu().numpy().reshape(N, K // GROUP, GROUP)
    if bits == 4:
        lifted = (codes + 8).astype(np.uint8)
        codes = lifted[..., : GROUP // 2] | lifted[..., GROUP // 2 :] << 4
    parts = (np.ascontiguousarray(scale).view(np.uint8), np.ascontiguousarray(codes).view(np.uint8))
    return np.concatenate(parts, -1).reshape(N, -1)


def _describe(gguf: Any, writer: Any, model: Any, bits: int) -> None:
    config = model.config
    writer.add_name(Path(str(config._name_or_path or "bert")).name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(config.type_vocab_size)
    kind = gguf.LlamaFileType.MOSTLY_Q8_0 if bits == 8 else gguf.LlamaFileType.MOSTLY_Q4_0
    writer.add_file_type(kind)


def _vocabulary(gguf: Any, writer: Any, tokenizer: Any, size: int) -> None:
    """The words as llama.cpp's WordPiece spells them: a mark where a word begins, no ## inside."""
    known = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    special = set(tokenizer.all_special_tokens)
    words, kinds = [], []
    for i in range(size):
        word = known[i] if i < len(known) else f"[PAD{i}]"
        control = word in special or i >= len(known)
        kinds.append(gguf.TokenType.CONTROL if control else gguf.TokenType.NORMAL)
        if not control:
            word = word[2:] if word.startswith("##") else f"\u2581{word}"
        words.append(word)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")  # by words and punctuation, as BERT's own
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    for name in SPECIAL:
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            getattr(writer, f"add_{name}_token_id")(found)
    if getattr(tokenizer, "cls_token_id", None) is not None:
        writer.add_bos_token_id(tokenizer.cls_token_id)


def _read_back(
    gguf: Any, path: Path, plain: Any, names: Any, specs: dict[str, LinearSpec]
) -> tuple[nn.Module, float]:
    """The float model with the file's weights, and how far its scales are from the specs'."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst, state = 0.0, plain.state_dict()
    for name, spec in specs.items():
        tensor = tensors[names.get_name(f"{name}.weight", (".weight", ".bias"))]
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        scale = spec.steps.scale.float().cpu()
        half = scale.half().float()
        worst = max(worst, float(((half - scale) / scale).abs().max()))
        wanted = spec.codes.cpu().float() * half.repeat_interleave(GROUP, 1)
        if not torch.equal(found.view_as(wanted), wanted):
            raise ModelError(f"the gguf file holds other codes than {name}")
        state[f"{name}.weight"] = found.view_as(wanted)
    plain.load_state_dict(state)
    return nn.Module.float(plain).eval(), worst
