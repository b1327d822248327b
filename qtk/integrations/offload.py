"""Models that memory does not hold: blocks come from a folder of .safetensors, one at a time.

accelerate builds the model without its weights; what lies outside the blocks is read at once.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qtk import assembly, integrity
from qtk.errors import ModelError
from qtk.integrations.card import may_write
from qtk.integrations.companions import copy_companions
from qtk.integrations.folder import CONFIG_SUM, class_of, config_sum
from qtk.integrations.replacement import replacing
from qtk.integrations.saving import folder_to_save, write_card
from qtk.models import Block, describe
from qtk.modules.attention import QuantAttention, install
from qtk.modules.fused.block import FusedBlock, fuse
from qtk.modules.linear import QuantLinear

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shards:
    """The tensors of a float model's folder, and which file each is in.

    Attributes:
        dtype: that they are read as; None for the file's.
    """

    files: dict[str, Path]
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype | None = None) -> "Shards":
        """Raises ModelError where the folder has no .safetensors."""
        try:
            if (folder / INDEX).is_file():
                places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
                return cls({name: folder / Path(file).name for name, file in places.items()}, dtype)
            file = folder / "model.safetensors"
            with safe_open(file, "pt") as tensors:
                return cls(dict.fromkeys(tensors.keys(), file), dtype)
        except (*integrity.UNREADABLE, KeyError, AttributeError) as error:
            raise ModelError(f"{folder} has no .safetensors that can be read: {error}") from None

    def read(self, name: str) -> Tensor:
        """One tensor; finite, or a ModelError."""
        try:
            with safe_open(self.files[name], "pt") as file:
                value: Tensor = file.get_tensor(name).clone()
        except integrity.UNREADABLE as error:
            raise ModelError(f"{self.files[name]} cannot be read: {error}") from None
        if value.is_floating_point():
            if not torch.isfinite(value).all():
                raise ModelError(f"the model's {name} holds nan or inf; load its weights again")
            value = value.to(self.dtype or value.dtype)
        return value

    def fill(self, model: nn.Module, names: Iterator[str] | list[str]) -> None:
        """Reads parameters and buffers by full name."""
        from accelerate.utils import set_module_tensor_to_device

        for name in names:
            value = self.read(self.key(model, name))
            set_module_tensor_to_device(model, name, "cpu", value=value, dtype=value.dtype)

    def key(self, model: nn.Module, name: str) -> str:
        """A tensor's name in the files, which may be those of the model with or without a head.

        Raises:
            ModelError: it is under neither name.
        """
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for key in (name, name.removeprefix(prefix), f"{prefix}{name}"):
            if key in self.files:
                return key
        raise ModelError(
            f"the files have no {name}: write them by save_pretrained of this class first"
        )

    def sums(self) -> dict[str, str]:
        """A checksum of every tensor, read one at a time."""
        return {name: integrity.checksum(self.read(name)) for name in sorted(self.files)}

    def bring(self, model: nn.Module, block: Block) -> None:
        """The float weights of a block come into memory."""
        module = model.get_submodule(block.name)
        self.fill(model, [f"{block.name}.{name}" for name in module.state_dict()])

    def release(self, model: nn.Module, block: Block) -> None:
        """A block's weights go, but for its norms, which the next block may ask for."""
        module = model.get_submodule(block.name)
        for name, part in list(module.named_modules()):
            if isinstance(part, (QuantLinear, QuantAttention)):
                module.set_submodule(name, nn.Identity())
            elif isinstance(part, nn.Linear):
                part.to("meta")


def empty(cls: Any, config: Any) -> Any:
    """A model whose parameters are on the meta device.

    Raises:
        ModelError: accelerate is not installed.
    """
    try:
        from accelerate import init_empty_weights
    except ImportError:
        raise ModelError("this needs accelerate: install qtk[offload]") from None
    with init_empty_weights(include_buffers=False):
        return cls._from_config(config) if hasattr(cls, "_from_config") else cls.from_config(config)


def open_empty(path: str | Path, dtype: torch.dtype | None) -> tuple[Any, Shards]:
    """A float model of which only what lies outside its blocks is in memory, and where the rest is.

    Raises:
        ModelError: no such folder, not a model of a known family, or accelerate is not installed.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{str(path)!r} is no folder; fetch the model into one first")
    shards = Shards.of(folder, dtype)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = empty(class_of(config.to_dict()), config)
    except ModelError:
        raise
    except Exception as error:  # a folder may hold anything
        raise ModelError(f"cannot build {str(path)!r}: {error}") from error
    model.eval().requires_grad_(False)
    model.config._name_or_path = str(folder)
    inside = tuple(f"{block.name}." for block in describe(model))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = [n for n in model.state_dict() if not n.startswith(inside) and n not in tied]
    shards.fill(model, names)
    model.tie_weights()
    return model, shards


def save_blockwise(
    model: Any, blocks: list[tuple[Block, Path]], folder: object, sources: list[str | Path]
) -> list[str]:
    """Writes a quantized model whose blocks lie in files: a shard a block, and one of the rest.

    Args:
        model: with `attach`ed record; its blocks need not be in memory.
        blocks: each with the file of its state_dict.
        sources: as `qtk.integrations.saving.save` takes them.

    Returns:
        The names of the files that came along.
    """
    target = folder_to_save(folder)
    with replacing(target) as work:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(work)
        if model.can_generate():
            model.generation_config.save_pretrained(work)
        config = json.loads((work / "config.json").read_text(encoding="utf-8"))
        head = {"format": "pt", CONFIG_SUM: config_sum(config)}
        places: dict[str, str] = {}
        size = 0
        for i, (prefix, tensors) in enumerate(_parts(model, blocks)):
            name = f"model-{i + 1:05}-of-{len(blocks) + 1:05}.safetensors"
            named = {f"{prefix}{key}": value for key, value in tensors.items()}
            integrity.write(work / name, named, head)
            places |= dict.fromkeys(named, name)
            size += sum(value.nbytes for value in named.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        integrity.write_text(work / INDEX, json.dumps(index, indent=2))
        copied = {name for source in sources for name in copy_companions(source, work)}
        if may_write(target):
            write_card(work, type(model).__name__, model.config.quantization_config.record)
        return sorted(copied)


def _parts(model: Any, blocks: list[tuple[Block, Path]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of every block, then all others; one block is in memory at a time."""
    for block, file in blocks:
        yield f"{block.name}.", integrity.read(file)[0]
    inside = tuple(f"{block.name}." for block, _ in blocks)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict().items()
    yield "", {n: v.contiguous() for n, v in state if not n.startswith(inside) and n not in tied}


def load_offloaded(folder: Path, model: Any, on_disk: Sequence[Block], backend: str | None) -> Any:
    """Fills a quantized model but for some blocks, which come from their files at each call.

    accelerate's hooks bring a block before its forward and let it go after.

    Args:
        model: a skeleton on the meta device.
        on_disk: the blocks that memory does not hold.
    """
    from accelerate.hooks import add_hook_to_module

    if backend is not None:
        for layer in assembly.quantized_layers(model).values():
            layer.backend = backend  # type: ignore[assignment]
    shards, blocks = Shards.of(folder), describe(model)
    outside = tuple(f"{block.name}." for block in on_disk)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shards.fill(
        model, [n for n in model.state_dict() if not n.startswith(outside) and n not in tied]
    )
    model.tie_weights()
    assembly.check_tensors(model)
    for name, products in assembly.quantized_attentions(model).items():
        install(model.get_submodule(name.rpartition(".")[0]), products)
    for block in blocks:
        module = model.get_submodule(block.name)
        if block in on_disk:
            _bring(shards, model, block)
        fuse(model, blocks, only=[block])
        if block in on_disk:
            _let_go(module)
            add_hook_to_module(module, _hook(shards, model, block))
    for layer in assembly.quantized_layers(model).values():
        layer.prepare()
    model.qtk_on_disk = [block.name for block in on_disk]
    return model.eval().requires_grad_(False)


def _hook(shards: Shards, model: Any, block: Block) -> Any:
    from accelerate.hooks import ModelHook

    class OnDisk(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            _bring(shards, model, block)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            _let_go(module)
            return output

    return OnDisk()


def _bring(shards: Shards, model: Any, block: Block) -> None:
    module = model.get_submodule(block.name)
    names = {n: shards.key(model, f"{block.name}.{n}") for n in module.state_dict()}
    module.load_state_dict({n: shards.read(key) for n, key in names.items()}, assign=True)


def _let_go(module: nn.Module) -> None:
    if isinstance(module, FusedBlock):
        module.unprepare()
    module.to("meta")


def blocks_on_disk(model: Any, device_map: Any, max_memory: Any) -> list[Block]:
    """Which blocks of an empty quantized model a device map leaves on disk.

    Args:
        device_map: "auto", or a dict of module names, as accelerate takes it.
        max_memory: as accelerate takes it, for "auto".

    Raises:
        ModelError: something else than whole blocks would be on disk.
    """
    from accelerate import infer_auto_device_map

    blocks, found = describe(model), device_map
    if device_map == "auto":
        whole = {type(model.get_submodule(block.name)).__name__ for block in blocks}
        found = infer_auto_device_map(model, max_memory, sorted(whole))
    names = [name for name, device in found.items() if device == "disk"]
    inside = [b for b in blocks if any(f"{b.name}.".startswith(f"{n}.") for n in names)]
    if device_map != "auto":
        others = sorted(set(names) - {block.name for block in inside})
        if others:
            raise ModelError(f"only whole blocks may be on disk, not {', '.join(others)}")
    return inside
