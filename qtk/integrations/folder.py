"""What is looked at in a saved folder before anything is built from it.

Every size that a file claims is held against what the file holds, so that a folder of some
kilobytes cannot ask for a model of gigabytes; no name leads out of the folder.
"""

import json
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qtk import integrity
from qtk.errors import CheckpointError
from qtk.integrations.replacement import settle
from qtk.record import Record, shown

Stored = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of tensors by name

MOST_JSON = 64 * 2**20  # bytes
MOST_TENSORS = 100_000
SMALLEST_BOUND = 2**20  # sizes up to here are believed: they cost no memory to speak of
BLOCKS = ("num_hidden_layers", "n_layers", "num_layers")
# dtypes, as safetensors spells them, of what is beside a quantized weight
BESIDE = {
    "weight_scale": "F32", "weight_zero_point": "I8", "bias": "F32", "input_scale": "F32",
    "input_zero_point": "I32", "input_clip": "F32", "input_shift": "F32",
    "input_channel_scale": "F32",
}  # fmt: skip
# What a checkpoint may not decide: whose code runs, and which files are read.
NOT_THEIRS = (
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
    "transformers_weights", "custom_pipelines", "name_or_path", "_name_or_path",
)  # fmt: skip
# What a config.json may say otherwise than when it was saved: who wrote it, and where it runs.
NOT_SUMMED = ("transformers_version", *NOT_THEIRS)
CONFIG_SUM = "qtk.config"  # the key of the metadata of files of tensors


@dataclass(frozen=True)
class Saved:
    """A folder that a quantized model was saved in.

    Attributes:
        config: config.json, without what it may not decide.
        record: what it says of the quantization.
        stored: dtype and shape of every tensor.
    """

    config: dict[str, Any]
    record: Record
    stored: Stored


def read(path: Any, variant: str | None = None, verify: bool = True) -> Saved:
    """Looks at a folder; an interrupted save is finished first.

    Args:
        variant: the middle of the weights' name, model.VARIANT.safetensors.
        verify: whether checksums are compared, which reads all tensors; else none is read.

    Raises:
        CheckpointError: no such folder, not saved by qtk, or not what it says it is.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    settle(folder)
    config = _json(folder / "config.json", f"{folder} has no config.json: not a saved model")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "qtk":
        raise CheckpointError(f"{folder} was not saved by qtk; qtk.quantize makes such a model")
    record = Record.from_dict({k: v for k, v in quantization.items() if k != "quant_method"})
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    files = weight_files(folder, variant)
    for file in files:
        stored |= _header(file)
    _check_sizes(config, record, stored)
    _check_dtypes(record, stored)
    if verify:
        _verify(folder, config, files)
    return Saved(harmless(config), record, stored)


def harmless(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what it may not decide."""
    return {k: v for k, v in config.items() if k not in NOT_THEIRS}


def class_of(config: dict[str, Any]) -> Any:
    """The class that a model was saved from, or AutoModel where the config does not say."""
    import transformers

    names = config.get("architectures") or [""]
    found = getattr(transformers, str(names[0]), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


def config_sum(config: dict[str, Any]) -> str:
    """The checksum of a config.json, but for what changes no number."""
    kept = {name: value for name, value in config.items() if name not in NOT_SUMMED}
    quantization = kept.get("quantization_config")
    if isinstance(quantization, dict):
        kept["quantization_config"] = {k: v for k, v in quantization.items() if k != "backend"}
    return integrity.digest(kept)


def _verify(folder: Path, config: dict[str, Any], files: list[Path]) -> None:
    """Compares tensors and config with what was saved, where a file says what that is."""
    wanted = integrity.verify(files).get(CONFIG_SUM)
    if wanted is not None and wanted != config_sum(config):
        raise CheckpointError(
            f"{folder}: config.json is not the one that was saved with these weights (checksums "
            "differ): copy it again from where it came, or load with verify=False if you changed it"
        )


def is_quantized(path: Any) -> bool:
    """Whether a folder holds what a quantized model was saved as."""
    return quant_method(path) == "qtk"


def quant_method(path: Any) -> str | None:
    """Who quantized the model of a folder, as its config says; None where none does."""
    try:
        settle(Path(path))
        quantization = _json(Path(path) / "config.json", "").get("quantization_config")
    except CheckpointError:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else None


def _json(file: Path, missing: str) -> dict[str, Any]:
    """An object from a regular file of a sane size."""
    if not _is_regular(file):
        raise CheckpointError(missing)
    try:
        if file.stat().st_size > MOST_JSON:
            raise CheckpointError(f"{file} is larger than {MOST_JSON >> 20} MB")
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({str(error)[:200]})") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    return data if isinstance(data, dict) else {}


def _is_regular(file: Path) -> bool:
    """Whether a name is that of a file, through links if need be; a pipe or a device is none."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError):
        return False


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that hold the tensors, all inside the folder.

    Raises:
        CheckpointError: there is none, or an index names something else.
    """
    middle = "" if variant is None else f".{variant}"
    single = folder / f"model{middle}.safetensors"
    if _is_regular(single):
        return [single]
    missing = f"{folder} has no .safetensors file; qtk reads no other kind"
    index = _json(folder / f"model.safetensors.index{middle}.json", missing)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{folder}: the index of its shards has no weight_map")
    for name in places.values():
        plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
        if not plain or not name.endswith(".safetensors") or not _is_regular(folder / name):
            raise CheckpointError(
                f"{folder}: its index names {shown(name)}, which is no .safetensors file in it"
            )
    return [folder / name for name in sorted(set(places.values()))]


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            if len(names) > MOST_TENSORS:
                raise CheckpointError(f"{file} lists {len(names)} tensors")
            slices = {name: tensors.get_slice(name) for name in names}
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read, truncated perhaps: {error}") from None


def _check_sizes(config: dict[str, Any], record: Record, stored: Stored) -> None:
    """Raises CheckpointError for a size in config.json that the tensors cannot bear out."""
    if len(record.layers) > len(stored):
        raise CheckpointError(
            f"config.json lists {len(record.layers)} quantized layers, the file only {len(stored)} "
            "tensors"
        )
    held = 0
    for _, shape in stored.values():
        size = 1
        for n in shape:
            size *= n
        held += size
    bound = max(held, SMALLEST_BOUND)
    for name, value in config.items():
        size = len(value) if isinstance(value, (list, dict)) else value
        if isinstance(size, bool) or not isinstance(size, int):
            continue
        if name in BLOCKS and not 0 <= size <= len(stored):
            raise CheckpointError(
                f"config.json has {name} {shown(value)}, the file {len(stored)} tensors"
            )
        if "heads" in name and size < 1:
            raise CheckpointError(f"config.json has {name} {shown(value)}, it must be at least 1")
        if not name.endswith(("_id", "_index")) and abs(size) > bound:
            raise CheckpointError(
                f"config.json has {name} {shown(value)}, the file {held} numbers in all"
            )


def _check_dtypes(record: Record, stored: Stored) -> None:
    """Raises CheckpointError for codes or scales that reading would cast.

    Tensors may have other names on disk than in the model: codes are counted, not looked up.
    """
    codes: Counter[str] = Counter()
    for prefix in (name.removesuffix(".weight_scale") for name in stored if _is_scale(name)):
        if f"{prefix}.weight" not in stored:
            raise CheckpointError(f"the checkpoint has no {prefix}.weight")
        codes[stored[f"{prefix}.weight"][0]] += 1
        for leaf, wanted in BESIDE.items():
            found = stored.get(f"{prefix}.{leaf}", (wanted, ()))[0]
            if found != wanted:
                raise CheckpointError(f"{prefix}.{leaf} is {found} in the file, not {wanted}")
    wanted_codes = Counter(
        "I8" if layer.scheme.w is not None and layer.scheme.w.bits == 8 else "U8"
        for layer in record.layers.values()
    )
    if too_many := codes - wanted_codes:
        raise CheckpointError(
            f"the file has codes of {dict(codes)}, its config.json describes {dict(wanted_codes)}: "
            f"{', '.join(too_many)} should be of another type"
        )


def _is_scale(name: str) -> bool:
    return name.endswith(".weight_scale")
