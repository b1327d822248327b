"""compressed-tensors: what vLLM, SGLang and transformers read.

W8A8, static or per token, is `int-quantized`; weights alone, and 4-bit weights with any
activations, are `pack-quantized`: codes plus 2^(bits-1), the first in the lowest bits of an int32.
transformers computes such a model in floats, on weights that it has unpacked at the first call.

Scales of tokens are found when the model runs, by compressed-tensors' rule (absmax / 127.5), not by
qtk's, which clips; and transformers finds one for all tokens where a linear reads a matrix, as in
OPT's MLP.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import BackendError, SchemeError
from qtk.formats import Exported, Source
from qtk.formats._compare import compared, needs_float_attention, needs_float_patches
from qtk.grids import LinearSpec
from qtk.modules.floats import restore_floats
from qtk.scheme import Format

PACKED = (2, 4, 8)  # bits of which a whole number fits into an int32


def write(source: Source, folder: Path) -> Exported:
    try:
        import compressed_tensors
    except ImportError as error:
        raise BackendError(f"pip install 'qtk-torch[compressed-tensors]': {error}") from None
    specs = source.linears
    for name, spec in specs.items():
        if fault := _fault(spec):
            raise SchemeError(f"{name} is {spec.scheme.name}: {fault}")
    plain = copy.deepcopy(source.model)
    restore_floats(plain)
    for name in ("save_pretrained", "hf_quantizer"):
        plain.__dict__.pop(name, None)
    plain.is_quantized = False
    state = plain.state_dict()
    for name, spec in specs.items():
        if f"{name}.weight" in state:  # not so inside a patch embedding
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": value for key, value in _tensors(spec).items()}
    plain.config.quantization_config = _config(plain, specs)
    plain.save_pretrained(folder, state_dict=state)
    files = tuple(sorted(path.name for path in folder.iterdir()))
    served = type(source.model).from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def run(batch: dict[str, Tensor]) -> dict[str, Any]:
        out = served(**batch, return_dict=True)
        return {k: v.float().numpy() for k, v in out.items() if isinstance(v, Tensor)}

    return compared(source, run, format="compressed-tensors", files=files, notes=_notes(source),
                    checked_in=f"compressed-tensors {compressed_tensors.__version__}")  # fmt: skip


def _notes(source: Source) -> tuple[str, ...]:
    notes = [*needs_float_attention(source.model), *needs_float_patches(source.model)]
    if source.embeddings:
        notes.append("embeddings are in floating point, with the values of their codes")
    schemes = {spec.scheme for spec in source.linears.values()}
    if any(s.a is not None and s.a.granularity == "token" for s in schemes):
        notes.append("scales of tokens are found by compressed-tensors' rule, absmax / 127.5")
    return tuple(notes)


def _fault(spec: LinearSpec) -> str | None:
    """Why a layer has no form, and what to do."""
    w, change = spec.steps.fmt, spec.grid.change
    if w.kind != "int":
        return "e4m3 is not written yet; quantize with w=8, a=8"
    if change.rotation or change.shift is not None:
        return (
            "it shifts, scales or rotates its input, which the format has no field for; quantize "
            "with method='none'"
        )
    if not w.symmetric:
        return (
            "transformers does not load packed weights with zero points; quantize with "
            "weights='symmetric'"
        )
    if w.bits not in PACKED:
        return f"codes are packed in {', '.join(map(str, PACKED))} bits; quantize with one of these"
    K = spec.codes.shape[1]
    if w.group_size is not None and K % w.group_size:
        return f"groups of {w.group_size} do not divide its {K} channels; take a size that does"
    return None


def _tensors(spec: LinearSpec) -> dict[str, Tensor]:
    """What stands in the file for a weight, by the last part of its name."""
    found = {"weight_scale": spec.steps.scale.float().cpu().contiguous()}
    codes = spec.codes.cpu()
    if _is_packed(spec):
        found["weight_packed"] = pack(codes, spec.steps.fmt.bits)
        found["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
    else:
        found["weight"] = codes.contiguous()
    if spec.grid.static is not None:
        scale, zero_point = (value.cpu() for value in spec.grid.static)
        found["input_scale"] = scale.float().reshape(1).clone()
        found["input_zero_point"] = zero_point.to(torch.int8).reshape(1)
    return found


def _is_packed(spec: LinearSpec) -> bool:
    return spec.grid.fmt is None or spec.steps.fmt.bits < 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """[N, K] int8 -> [N, K * bits / 32] int32, the first of each in the lowest bits."""
    each = 32 // bits
    lifted = codes.long() + 2 ** (bits - 1)
    lifted = nn.functional.pad(lifted, (0, -codes.shape[1] % each))
    shifts = torch.arange(each) * bits
    words = (lifted.view(len(codes), -1, each) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _config(model: nn.Module, specs: dict[str, LinearSpec]) -> dict[str, Any]:
    """What stands under `quantization_config`; without the package's newer keys."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name in linears:
        if name in specs:
            group = _group(specs[name])
            groups.setdefault(repr(group), (group, []))[1].append(name)
    formats = {group["format"] for group, _ in groups.values()}
    single = len(groups) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [name for name in linears if name not in specs],
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if single else names, **group}
            for i, (group, names) in enumerate(groups.values())
        },
    }


def _group(spec: LinearSpec) -> dict[str, Any]:
    w, a = spec.steps.fmt, spec.grid.fmt
    weights = {**_args(w), "strategy": w.granularity, "dynamic": False}
    if w.group_size is not None:
        weights["group_size"] = w.group_size
    group: dict[str, Any] = {
        "format": "pack-quantized" if _is_packed(spec) else "int-quantized", "weights": weights,
    }  # fmt: skip
    if a is not None:
        dynamic = a.granularity == "token"
        group["input_activations"] = {**_args(a), "strategy": a.granularity, "dynamic": dynamic}
    return group


def _args(fmt: Format) -> dict[str, Any]:
    return {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric}
