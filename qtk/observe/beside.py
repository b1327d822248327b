"""What belongs to a model and lies beside its weights: the tokenizer, the image processor."""

from pathlib import Path
from typing import Any

from torch import nn

from qtk.errors import CalibrationError


def beside(model: nn.Module, loader: str, source: Any = None, **options: Any) -> Any:
    """A tokenizer or processor from `source`, or from where the model came from.

    Args:
        loader: the class of transformers that reads it.

    Raises:
        CalibrationError: there is none.
    """
    import transformers

    place = "beside the model" if source is None else f"in {str(source)!r}"
    source = str(source or getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    try:
        if not source:
            raise OSError("the model was not loaded from a folder")
        if Path(source).is_absolute() and not Path(source).is_dir():
            raise OSError("no such folder")
        return getattr(transformers, loader).from_pretrained(source, **options)
    except Exception as error:
        raise CalibrationError(
            f"calib needs a tokenizer or image processor and none was found {place} "
            f"({error}); pass tokenizer="
        ) from error
