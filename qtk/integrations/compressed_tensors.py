"""Checkpoints of compressed-tensors, made by others, as checkpoints of qtk.

Read are integer weights of 2, 4 or 8 bits, per tensor, channel or group, alone or with activations
of 4 to 8 bits: static per tensor, or dynamic per token. Codes and scales stay what they are. The
package itself is not needed.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtk.assembly import base_name
from qtk.errors import CheckpointError, SchemeError
from qtk.integrations import folder as folders
from qtk.modules.storage import store
from qtk.record import Layer, Record
from qtk.scheme import Format, Scheme

METHOD = "compressed-tensors"
PACKED_BITS = (2, 4, 8)
PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    "input_scale", "input_zero_point", "input_global_scale", "weight_global_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """One of `config_groups`.

    Attributes:
        targets: names or classes of modules, or regular expressions after "re:".
    """

    targets: tuple[str, ...]
    scheme: Scheme


def is_one(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return folders.quant_method(folder) == METHOD


def translate(folder: Path, target: Path) -> None:
    """Writes the checkpoint as qtk would have saved it.

    Args:
        target: an existing folder.

    Raises:
        CheckpointError: what qtk has no layer for, or a tensor that is missing.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    groups, ignore = _read(folder, config.pop("quantization_config"))
    model = _empty(config)
    tensors: dict[str, Tensor] = {}
    try:
        for file in folders.weight_files(folder):
            tensors |= load_file(file)
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    tensors = _renamed(model, tensors)
    layers = {}
    for name, scheme in _schemes(model, groups, ignore):
        prefix = _in_file(name, tensors)
        parts = {p: tensors.pop(f"{prefix}.{p}") for p in PARTS if f"{prefix}.{p}" in tensors}
        converted = _converted(prefix, scheme, parts)
        tensors |= {f"{prefix}.{part}": value for part, value in converted.items()}
        layer = Layer(_fitted(scheme, converted), f"{prefix}.bias" in tensors, False)
        layers[base_name(model, name)] = layer
        if layer.bias:
            tensors[f"{prefix}.bias"] = tensors[f"{prefix}.bias"].float()
    left = [key for key in tensors if key.endswith((".weight_packed", ".weight_shape"))]
    if left:
        raise CheckpointError(f"{folder}: no group of its config.json targets {left[0]}")
    record = Record(layers, _recipe(layers.values()), "auto", None)
    config["quantization_config"] = {"quant_method": "qtk", **record.to_dict()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _renamed(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With names of the model in memory, where transformers keeps older ones in files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]

    def renamed(key: str) -> str:
        for rule in rules:
            key, _ = rule.rename_source_key(key)
        return key

    return {renamed(key): value for key, value in tensors.items()}


def _read(folder: Path, found: Any) -> tuple[list[Group], list[str]]:
    """The groups, and what they leave out."""
    try:
        groups = [
            Group(tuple(group["targets"]), _scheme(group))
            for group in found["config_groups"].values()
        ]
        return groups, [str(name) for name in found.get("ignore") or ()]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: its quantization_config is not one of {METHOD} ({error!r})"
        ) from None
    except SchemeError as error:
        raise CheckpointError(f"{folder} is quantized in a way that qtk has not: {error}") from None


def _scheme(group: dict[str, Any]) -> Scheme:
    """Raises SchemeError for what qtk has no layer for."""
    weights, inputs = group["weights"], group.get("input_activations")
    if group.get("output_activations"):
        raise SchemeError("output_activations")
    if weights["type"] != "int" or weights["num_bits"] not in PACKED_BITS:
        raise SchemeError(f"weights of {weights['num_bits']} bits, {weights['type']}")
    strategy, size = weights["strategy"], weights.get("group_size")
    if strategy not in ("tensor", "channel", "group") or weights.get("actorder") == "group":
        raise SchemeError(f"weights with strategy {strategy!r}, actorder {weights.get('actorder')}")
    shared = "group" if strategy == "group" else "channel"
    w = Format(weights["num_bits"], bool(weights.get("symmetric", True)), shared,
               size if shared == "group" else None)  # fmt: skip
    return Scheme.from_dict(Scheme(w, _activations(inputs)).to_dict())


def _activations(inputs: dict[str, Any] | None) -> Format | None:
    if inputs is None:
        return None
    symmetric, dynamic = bool(inputs.get("symmetric", True)), inputs.get("dynamic", False)
    known = {("tensor", False): True, ("token", True): symmetric}
    if inputs["type"] != "int" or not known.get((inputs["strategy"], dynamic)):
        raise SchemeError(
            f"activations of type {inputs['type']}, strategy {inputs['strategy']!r}, "
            f"dynamic={dynamic}, symmetric={symmetric}"
        )
    token = bool(dynamic)
    return Format(inputs["num_bits"], symmetric=token, granularity="token" if token else "tensor")


def _empty(config: dict[str, Any]) -> nn.Module:
    """The float model on the meta device."""
    from transformers import CONFIG_MAPPING

    cls: Any = folders.class_of(config)
    if config.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(f"there is no model_type {config.get('model_type')!r}")
    known = CONFIG_MAPPING[config["model_type"]].from_dict(folders.harmless(config))
    with torch.device("meta"):
        model: nn.Module = cls.from_config(known) if hasattr(cls, "from_config") else cls(known)
    return model


def _schemes(
    model: nn.Module, groups: list[Group], ignore: list[str]
) -> Iterator[tuple[str, Scheme]]:
    """Each quantized linear of the model and its scheme, by the package's rule."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or _matches(name, module, ignore):
            continue
        for group in groups:
            if _matches(name, module, group.targets):
                yield name, group.scheme
                break


def _matches(name: str, module: nn.Module, targets: Iterable[str]) -> bool:
    for target in targets:
        if target.startswith("re:"):
            try:
                if re.match(target[3:], name):
                    return True
            except re.error as error:
                raise CheckpointError(f"config.json has the pattern {target!r}: {error}") from None
        elif target in (name, type(module).__name__):
            return True
    return False


def _in_file(name: str, tensors: dict[str, Tensor]) -> str:
    """The module's name in the file, which may have or lack a prefix."""
    if f"{name}.weight_scale" in tensors:
        return name
    ends = [key for key in tensors if key.endswith(f".{name}.weight_scale")]
    shorter = f"{name.partition('.')[2]}.weight_scale"
    found = ends or [key for key in (shorter,) if key in tensors]
    if len(found) != 1:
        raise CheckpointError(f"the checkpoint has no {name}.weight_scale")
    return found[0].removesuffix(".weight_scale")


def _converted(prefix: str, scheme: Scheme, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one linear as `QuantLinear` keeps them."""
    w, a = scheme.w, scheme.a
    assert w is not None
    if unknown := {"weight_g_idx", "weight_global_scale", "input_global_scale"} & set(parts):
        raise CheckpointError(f"{prefix} has {', '.join(sorted(unknown))}, which qtk has not")
    codes = _codes(prefix, w, parts)
    scale = parts["weight_scale"].float().reshape(-1, parts["weight_scale"].shape[-1])
    if scale.numel() == 1:
        scale = scale.expand(len(codes), 1)
    found = {"weight": store(codes, w.bits), "weight_scale": scale.contiguous()}
    if not w.symmetric:
        zeros = _part(prefix, parts, "weight_zero_point")
        if zeros.dtype == torch.int32:
            zeros = unpack(zeros.T, w.bits, len(codes)).T
        found["weight_zero_point"] = zeros.to(torch.int8).contiguous()
    if a is not None and a.granularity == "tensor":
        found["input_scale"] = _part(prefix, parts, "input_scale").float().reshape(())
        zero = parts.get("input_zero_point", torch.zeros(()))
        found["input_zero_point"] = zero.to(torch.int32).reshape(())
    elif a is not None:  # their scale is the maximum over half the number of steps
        found["input_clip"] = torch.tensor(2 * a.qmax / (2**a.bits - 1))
    return found


def _codes(prefix: str, w: Format, parts: dict[str, Tensor]) -> Tensor:
    """[N, K] int8."""
    if "weight_packed" not in parts:
        codes = _part(prefix, parts, "weight")
        if codes.dtype != torch.int8:
            raise CheckpointError(f"{prefix}.weight is {codes.dtype}: not compressed, or not int8")
        return codes
    shape = _part(prefix, parts, "weight_shape").tolist()
    words = parts["weight_packed"]
    fits = len(shape) == 2 and words.dim() == 2 and words.dtype == torch.int32
    if not fits or shape[0] != len(words) or -(-shape[1] * w.bits // 32) != words.shape[1]:
        raise CheckpointError(
            f"{prefix}.weight_packed has shape {list(words.shape)} for a weight of {shape}"
        )
    return unpack(words, w.bits, shape[1])


def unpack(words: Tensor, bits: int, K: int) -> Tensor:
    """[N, K * bits / 32] int32 -> [N, K] int8, the lowest bits first, 2^(bits-1) taken off."""
    shifts = torch.arange(32 // bits) * bits
    lifted = (words.long()[..., None] >> shifts) & (2**bits - 1)
    return (lifted.flatten(-2)[:, :K] - 2 ** (bits - 1)).to(torch.int8)


def _part(prefix: str, parts: dict[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        raise CheckpointError(f"the checkpoint has no {prefix}.{name}")
    return parts[name]


def _fitted(scheme: Scheme, tensors: dict[str, Tensor]) -> Scheme:
    """Without groups where there is one a row."""
    w = scheme.w
    if w is None or w.group_size is None or tensors["weight_scale"].shape[1] > 1:
        return scheme
    return Scheme(replace(w, granularity="channel", group_size=None), scheme.a)


def _recipe(layers: Iterable[Layer]) -> dict[str, Any]:
    first = next(iter(layers), None)
    w = None if first is None else first.scheme.w
    a = None if first is None else first.scheme.a
    return {
        "method": "none", "rounding": METHOD, "ranges": None, "learning": None, "seed": 0,
        "w": 16 if w is None else w.bits, "a": 16 if a is None else a.bits,
        "calibration_batches": 0,
    }  # fmt: skip
