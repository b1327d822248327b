"""transformers: `from_pretrained` and `save_pretrained` of quantized models, after `import qtk`."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtk import checkpoint
from qtk.errors import CheckpointError, ModelError
from qtk.models import check_whole


@register_quantization_config("qtk")
class QtkConfig(QuantizationConfigMixin):
    """What stands under `quantization_config` in a checkpoint's config.json."""

    def __init__(self, **record: Any) -> None:
        record.pop("quant_method", None)
        self.quant_method: Any = "qtk"
        self.record = checkpoint.Record.from_dict(record)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": "qtk", **self.record.to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer("qtk")
class QtkQuantizer(HfQuantizer):
    """Builds the empty quantized modules before the weights are read, and readies them after."""

    requires_calibration = True

    def __init__(self, quantization_config: QtkConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.record = quantization_config.record
        self.dtype: torch.dtype | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        checkpoint.skeleton(model, self.record)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _check_all_read(model)
        checkpoint.check_tensors(model)
        if self.dtype is not None:
            nn.Module.to(model, self.dtype)  # 5.17 leaves what it renames in the file's dtype
        checkpoint.finish(model)
        attach(model, self.record)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class AtomicSave:
    """`save_pretrained` of a quantized model: what was there stays whole until all is written."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        target = Path(save_directory)
        for part in (target, *target.parents):
            if part.is_file():
                raise CheckpointError(f"{part} is a file; give a folder to save into")
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.resolve().name)
        is_new = not target.exists()
        target.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            type(self.model).save_pretrained(self.model, work, **kwargs)
            _put_in_place(work, target)
        except SafetensorError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if is_new and not any(target.iterdir()):
                target.rmdir()


class Unfinished:
    """`save_pretrained` of a model that is being quantized, or whose quantizing ended early."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ModelError(
            "quantizing this model ended before it was done: some of its layers are integers, "
            "others are not, and it cannot be saved; load the floating-point model again"
        )


def refuse_saving(model: Any) -> None:
    """Marks a model as half done, until `attach` says that it is whole."""
    model.save_pretrained = Unfinished()


def attach(model: Any, record: checkpoint.Record) -> None:
    """Tells transformers that the model is quantized, so that saving writes it as such."""
    config = QtkConfig(**record.to_dict())
    model.config.quantization_config = config
    model.hf_quantizer = QtkQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = "qtk"
    model.save_pretrained = AtomicSave(model)


def record_of(model: Any) -> checkpoint.Record:
    """How a quantized model was made.

    Raises:
        ModelError: it was not made by qtk.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, QtkConfig):
        raise ModelError(f"{type(model).__name__} is not quantized by qtk; run qtk.quantize first")
    return config.record


def load_float(model: Any) -> Any:
    """A model as it is, or one read from a folder or hub name as the class that it was saved from.

    Raises:
        ModelError: not a transformers model, or nothing that can be loaded.
    """
    if isinstance(model, (str, os.PathLike)):
        return _read(str(model))
    if isinstance(model, nn.Module):
        check_whole(model)
    else:
        raise ModelError(
            f"a {type(model).__name__} is not a transformers model; give a model, a folder or a "
            "hub name"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ModelError("the model's parameters are on the meta device: load its weights first")
    return model


def open_model(model: Any) -> Any:
    """A model as it is, or one read from a folder or hub name, quantized by qtk or not.

    Raises:
        ModelError, CheckpointError: as `load_float` and `load`.
    """
    if isinstance(model, (str, os.PathLike)) and _is_quantized(Path(model)):
        return load(model)
    return load_float(model)


def load(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Reads a model that `save_pretrained` of a quantized model wrote, and checks every tensor.

    Args:
        path: the folder.
        kwargs: passed to the class's `from_pretrained`.

    Returns:
        The model, computing what the saved one did, bit for bit.

    Raises:
        CheckpointError: no such folder, not written by qtk, truncated, or with tensors that are
            missing, unknown or of another shape.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a {type(path).__name__} is not a path; give the folder of a model")
    folder = Path(path)
    config = _read_config(folder)
    try:
        model, info = _class(config).from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, **kwargs
        )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read, truncated perhaps: {error}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit its own config: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            names = sorted(map(str, info[what]))
            raise CheckpointError(f"{folder}: {what.replace('_', ' ')}: {', '.join(names[:5])}")
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder that qtk has saved."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json: not a saved model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error})") from None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "qtk":
        raise CheckpointError(f"{folder} was not saved by qtk; qtk.quantize makes such a model")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has no .safetensors file; qtk reads no other kind")
    return config


def _put_in_place(work: Path, target: Path) -> None:
    """Moves finished files into a folder, which is no checkpoint until the last one is there."""
    new = sorted(work.iterdir(), key=lambda path: path.name == "config.json")
    (target / "config.json").unlink(missing_ok=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for old in target.glob(pattern):
            old.unlink()
    for path in new:
        os.replace(path, target / path.name)


def _check_all_read(model: nn.Module) -> None:
    """Raises CheckpointError for a quantized tensor that the file did not have."""
    modules = {**checkpoint.quantized_layers(model), **checkpoint.quantized_attentions(model)}
    for name, layer in modules.items():
        for key, value in layer.named_buffers(recurse=False):
            # transformers marks what it reads, and leaves the rest as the memory happened to be
            if not value.is_meta and not getattr(value, "_is_hf_initialized", False):
                raise CheckpointError(f"the checkpoint has no {name}.{key}")


def _read(path: str) -> Any:
    from transformers import AutoConfig

    if not Path(path).is_dir() and (Path(path).is_absolute() or path.startswith(".")):
        raise ModelError(f"cannot load {path!r}: no such folder")
    try:
        config = AutoConfig.from_pretrained(path)
        return _class(config.to_dict()).from_pretrained(path, dtype="auto")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load {path!r}: {error}") from error


def _is_quantized(folder: Path) -> bool:
    """Whether a config.json says that qtk made what lies beside it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == "qtk"


def _class(config: dict[str, Any]) -> Any:
    """The class that a model was saved from, or AutoModel where the config does not say."""
    import transformers

    names = config.get("architectures") or [""]
    found = getattr(transformers, str(names[0]), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel
