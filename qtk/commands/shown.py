"""What commands load, and what they print."""

import json
from typing import Any

import typer
from rich.console import Console

from qtk.commands.options import Dtype
from qtk.errors import ModelError

errors = Console(stderr=True)


def load(model: str, dtype: Dtype | None, device: str | None) -> Any:
    from qtk.integrations.transformers import load_float

    return moved(load_float(model), dtype, device)


def moved(model: Any, dtype: Dtype | None, device: str | None) -> Any:
    import torch

    try:
        return model.to(device=device, dtype=dtype and getattr(torch, dtype.value))
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ModelError(f"--device {device}: {error}") from None


def show(result: Any, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(result.table())


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))
