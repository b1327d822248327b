"""transformers: `from_pretrained` and `save_pretrained` of quantized models, after `import qtk`."""

import copy
import logging
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtk import assembly
from qtk.errors import BackendError, CheckpointError, ModelError
from qtk.integrations import compressed_tensors, folder, networks
from qtk.integrations.offload import blocks_on_disk, empty, load_offloaded
from qtk.integrations.saving import AtomicSave, Unfinished
from qtk.models import check_whole, is_network
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.floats import restore_floats
from qtk.packages.bundle import has_packages, read
from qtk.packages.served import output_class, serve
from qtk.record import Record

logger = logging.getLogger("qtk")


@register_quantization_config("qtk")
class QtkConfig(QuantizationConfigMixin):
    """What stands under `quantization_config` in a checkpoint's config.json."""

    def __init__(self, **record: Any) -> None:
        record.pop("quant_method", None)
        self.quant_method: Any = "qtk"
        self.record = Record.from_dict(record)

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
        assembly.skeleton(model, self.record)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _check_all_read(model)
        assembly.check_tensors(model)
        if self.dtype is not None:
            nn.Module.to(model, self.dtype)  # 5.17 leaves what it renames in the file's dtype
        assembly.finish(model)
        attach(model, self.record)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        """`model.dequantize()`: floats with the weights that the codes stand for."""
        restore_floats(model)
        for name in ("save_pretrained", "resize_token_embeddings"):
            model.__dict__.pop(name, None)
        model.is_quantized = False
        return nn.Module.to(model, dtype).requires_grad_(True)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def refuse_saving(model: Any) -> None:
    """Marks a model as half done, until `attach` says that it is whole."""
    model.save_pretrained = Unfinished()


def attach(model: Any, record: Record) -> None:
    """Tells transformers that the model is quantized, so that saving writes it as such.

    A plain network keeps the record itself, and gets a `save_pretrained`.
    """
    if is_network(model):
        model.qtk_record = record
        model.save_pretrained = AtomicSave(model)
        return
    config = QtkConfig(**record.to_dict())
    model.config.quantization_config = config
    model.hf_quantizer = QtkQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = "qtk"
    model.save_pretrained = AtomicSave(model)
    if any(isinstance(module, QuantEmbedding) for module in model.modules()):
        model.resize_token_embeddings = _refuse_resizing


def _refuse_resizing(*args: Any, **kwargs: Any) -> Any:
    raise ModelError(
        "the token table is quantized: resize the float model's embeddings, then quantize"
    )


def record_of(model: Any) -> Record:
    """How a quantized model was made.

    Raises:
        ModelError: it was not made by qtk.
    """
    if is_network(model) and isinstance(getattr(model, "qtk_record", None), Record):
        record: Record = model.qtk_record
        return record
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, QtkConfig):
        raise ModelError(f"{type(model).__name__} is not quantized by qtk; run qtk.quantize first")
    return config.record


def load_float(model: Any) -> Any:
    """A model as it is, or one read from a folder or hub name as the class that it was saved from.

    Raises:
        ModelError: not a model, or nothing that can be loaded.
    """
    if isinstance(model, (str, os.PathLike)):
        return _read(str(model))
    if isinstance(model, nn.Module):
        check_whole(model)
    else:
        raise ModelError(
            f"a {type(model).__name__} is not a transformers model or a torch.nn.Module; give a "
            "model, a folder or a hub name"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ModelError("the model's parameters are on the meta device: load its weights first")
    return model


def open_model(model: Any) -> Any:
    """A model as it is, or one read from a folder or hub name, quantized by qtk or not.

    Raises:
        ModelError, CheckpointError: as `load_float` and `load`.
    """
    if isinstance(model, (str, os.PathLike)) and folder.is_quantized(model):
        return load(model)
    return load_float(model)


def load(
    path: str | os.PathLike[str], net: networks.Made | None = None, *, backend: str | None = None,
    verify: bool = True, compiled: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """Reads a model that `save_pretrained` of a quantized model wrote, and checks every tensor.

    Checkpoints that others made with compressed-tensors, of integer weights alone or with integer
    activations, are read as well. A save that was whole when its process ended, but not yet in
    place, is finished first. No code of the checkpoint runs unless `compiled` says so, and
    config.json decides neither which attention nor which files.

    Args:
        path: the folder.
        net: for a folder of a plain network: one with the same layers, in floating point, which
            becomes the quantized one, or what makes it, such as its class.
        backend: "auto", "triton", "cpu" or "reference"; what the model was made for if not given.
        verify: compares config.json and each tensor with the checksums that were saved; without, a
            config that was edited by hand is believed. Files of older versions have none.
        compiled: run by the packages that `qtk.compile` made and `save_pretrained` kept: native
            code, so only from whom you trust. Where none was made for this kind of CPU and this
            PyTorch, the log says so once, and the model runs as it does without.
        kwargs: passed to the class's `from_pretrained`. With device_map="auto", or one that says
            "disk", blocks that memory does not hold come from their files at each call.

    Returns:
        The model, computing what the saved one did, bit for bit.

    Raises:
        CheckpointError: no such folder, not written by qtk, truncated, or with tensors that are
            missing, unknown, of another shape, impossible, or not those that were saved.
        BackendError: there is no such backend, or it cannot run where the model is.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a {type(path).__name__} is not a path; give the folder of a model")
    if compressed_tensors.is_one(Path(path)):
        return _load_translated(path, backend, kwargs)
    saved = folder.read(path, kwargs.get("variant"), verify)
    if networks.is_one(saved.config):
        return _load_network(path, saved, net, backend)
    if net is not None:
        raise CheckpointError(f"{path} holds a transformers model: leave out the network")
    try:
        model, info = _built(path, saved, kwargs, backend)
    except (CheckpointError, BackendError, ModelError, MemoryError):
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read, truncated perhaps: {error}") from error
    except Exception as error:  # whatever transformers makes of a config that does not fit
        raise CheckpointError(f"{path} does not fit its own config: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            names = sorted(map(str, info[what]))
            raise CheckpointError(f"{path}: {what.replace('_', ' ')}: {', '.join(names[:5])}")
    if backend is not None and not hasattr(model, "qtk_on_disk"):
        assembly.run_on(model, backend)
        attach(model, replace(saved.record, backend=backend))
    return _with_packages(model, Path(path), backend) if compiled else _bare(model, Path(path))


def _with_packages(model: Any, folder: Path, backend: str | None) -> Any:
    """The model served by the packages of its folder, where they run here and are of its kind."""
    parameter = next(model.parameters())
    if hasattr(model, "qtk_on_disk") or parameter.device.type != "cpu" or backend is not None:
        logger.warning("packages are for a whole model on a CPU: this one runs eager")
        return model
    bundle = read(folder)
    if bundle is None:
        return model
    try:
        for route in bundle.routes.values():
            output_class(route.signature.returns, type(model))
    except AttributeError as error:
        raise CheckpointError(f"{folder}: its packages return what there is not: {error}") from None
    served = serve(model, bundle)
    attach(served, record_of(model))
    return served


def _bare(model: Any, folder: Path) -> Any:
    """The model, and a word where packages were left aside."""
    if has_packages(folder):
        logger.info("%s has compiled packages: qtk.load(..., compiled=True) runs them", folder)
    return model


def _load_network(
    path: Any, saved: folder.Saved, net: networks.Made | None, backend: str | None
) -> nn.Module:
    """A plain network, its layers replaced by those that were saved."""
    model = networks.made(net, saved.config, path).eval()
    assembly.check_float(model)
    assembly.skeleton(model, saved.record)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.weight_files(Path(path)):
        tensors |= load_file(file)
    networks.fill(model, tensors, path)
    assembly.check_tensors(model)
    assembly.finish(model)
    attach(model, saved.record)
    if backend is not None:
        assembly.run_on(model, backend)
        attach(model, replace(saved.record, backend=backend))
    return model


def _load_translated(path: Any, backend: str | None, kwargs: dict[str, Any]) -> Any:
    """A checkpoint of compressed-tensors, by way of one of qtk's in a temporary folder."""
    with tempfile.TemporaryDirectory() as work:
        compressed_tensors.translate(Path(path), Path(work))
        model = load(work, backend=backend, **kwargs)
    model.name_or_path = model.config._name_or_path = str(path)
    return model


def _built(
    path: Any, saved: folder.Saved, kwargs: dict[str, Any], backend: str | None
) -> tuple[Any, Any]:
    """The model and what transformers says of the loading, from a config that was looked at."""
    from transformers import CONFIG_MAPPING

    config = saved.config
    cls, kwargs = folder.class_of(config), {"trust_remote_code": False, **kwargs}
    if "config" not in kwargs:
        own: Any = getattr(cls, "config_class", None) or CONFIG_MAPPING[config["model_type"]]
        dtypes: dict[str, Any] = {
            key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs
        }
        read, kwargs = own.from_dict(config, return_unused_kwargs=True, **kwargs)
        kwargs |= {"config": read, **dtypes}
    device_map = kwargs.get("device_map")
    if device_map == "auto" or isinstance(device_map, dict):
        model = empty(cls, copy.deepcopy(kwargs["config"]))
        assembly.skeleton(model, saved.record)
        on_disk = blocks_on_disk(model, device_map, kwargs.get("max_memory"))
        if on_disk:
            model = load_offloaded(Path(path), model, on_disk, backend)
            attach(model, replace(saved.record, backend=backend or saved.record.backend))
            return model, {}
    with torch.random.fork_rng(devices=[]):  # a class may initialise what it then reads
        return cls.from_pretrained(path, output_loading_info=True, use_safetensors=True, **kwargs)


def _check_all_read(model: nn.Module) -> None:
    """Raises CheckpointError for a quantized tensor that the file did not have."""
    held = {**assembly.quantized_layers(model), **assembly.quantized_attentions(model)}
    for name, layer in held.items():
        for key, value in layer.named_buffers(recurse=False):
            # transformers marks what it reads, and leaves the rest as the memory happened to be
            if not value.is_meta and not getattr(value, "_is_hf_initialized", False):
                raise CheckpointError(f"the checkpoint has no {name}.{key}")


def _read(path: str) -> Any:
    from transformers import AutoConfig

    if not Path(path).is_dir() and (Path(path).is_absolute() or path.startswith(".")):
        raise ModelError(f"cannot load {path!r}: no such folder")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]):
            cls = folder.class_of(config.to_dict())
            return cls.from_pretrained(path, dtype="auto", trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # a folder may hold anything
        raise ModelError(f"cannot load {path!r}: {error}") from error
