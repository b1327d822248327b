"""Plain networks: no config and no `save_pretrained` of their own, so both are given to them.

A saved one is a folder as transformers' are, config.json and model.safetensors. What the network is
stands in the caller's code alone: `qtk.load(folder, net)` fills a network that the caller made.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from qtk import integrity
from qtk.errors import CheckpointError, ModelError
from qtk.models import is_network
from qtk.record import Record

Made = nn.Module | Callable[[], nn.Module]


def config_of(model: nn.Module, record: Record) -> dict[str, Any]:
    """What stands in a saved network's config.json."""
    quantization = {"quant_method": "qtk", **record.to_dict()}
    return {"architectures": [type(model).__name__], "quantization_config": quantization}


def is_one(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a plain network's."""
    return "model_type" not in config


def write(model: nn.Module, folder: Path, record: Record) -> None:
    """Writes a network's tensors and config into a folder.

    Raises:
        CheckpointError: two of its layers share a tensor, or one is no tensor in memory.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    places = [value.data_ptr() for value in state.values() if value.numel()]
    if len(set(places)) < len(places):
        state = {name: value.clone() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    integrity.write_text(
        folder / "config.json", json.dumps(config_of(model, record), indent=2, sort_keys=True)
    )


def made(given: Made | None, config: Mapping[str, Any], path: object) -> nn.Module:
    """The network to fill: the one that was given, or what a constructor gives.

    Raises:
        CheckpointError: there is none, and the folder does not say what it would be.
        ModelError: it is none.
    """
    name = str((config.get("architectures") or ["Net"])[0])
    if given is None:
        raise CheckpointError(
            f"{path} holds a plain network, whose code it does not have: give it, "
            f"qtk.load({str(path)!r}, {name}())"
        )
    found = given if isinstance(given, nn.Module) else given()
    if not is_network(found):
        raise ModelError(f"{path} holds a plain network ({name}), not a {type(found).__name__}")
    return found


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: object) -> None:
    """Loads a saved network's tensors into one with the same layers, in integers.

    Raises:
        CheckpointError: it is another network.
    """
    try:
        model.load_state_dict(tensors, strict=True)
    except (RuntimeError, ModelError) as error:
        raise CheckpointError(f"{path} is of another network: {error}") from None
