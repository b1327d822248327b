"""Calibration data in any form to batches that the model reads."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.observe import Batch

SAMPLES = 256  # sentences or images taken from a file or folder
BATCH_SIZE = 32
MAX_LENGTH = 256  # tokens
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def prepare(
    model: nn.Module, calib: Any, tokenizer: Any = None, seed: int = 0, samples: int = SAMPLES
) -> list[Batch]:
    """Batches on the model's device, checked.

    Args:
        calib: an iterable of batches (dicts of tensors, or tensors), a list of strings, or a path
            to a text file (one sample a line) or a folder of images.
        tokenizer: a tokenizer or image processor; looked for beside the model when it is needed.
        samples: how many a file or folder gives at most.

    Raises:
        CalibrationError: empty, not finite, of the wrong kind, or tokens beyond the vocabulary.
    """
    if isinstance(calib, (str, Path)):
        calib = _read(Path(calib), seed, samples)
    if isinstance(calib, (dict, Tensor)):
        calib = [calib]
    if not isinstance(calib, Iterable):
        raise CalibrationError(
            f"calib is a {type(calib).__name__}; give batches (dicts of tensors), a list of "
            "strings, or a path to a text file or a folder of images"
        )
    items = list(calib)
    if not items:
        raise CalibrationError("calib is empty: give at least one batch, or calib=None for none")
    if all(isinstance(item, str) for item in items):
        items = tokenize(model, items, tokenizer)
    elif all(hasattr(item, "__array_interface__") for item in items):  # of PIL or numpy
        items = process_images(model, items, tokenizer)
    return [_check(model, _as_dict(model, item), i) for i, item in enumerate(items)]


def tokenize(model: nn.Module, texts: Sequence[str], tokenizer: Any = None) -> list[Batch]:
    """Texts to padded batches, longest with longest so that little is padding."""
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationError("calib holds only empty strings; give sentences")
    tokenizer = tokenizer or _beside(model, "AutoTokenizer")
    if not callable(tokenizer) or not hasattr(tokenizer, "pad_token"):
        raise CalibrationError(f"a {type(tokenizer).__name__} is not a tokenizer; pass tokenizer=")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    length = min(MAX_LENGTH, _positions(model) or MAX_LENGTH)
    ordered = sorted(texts, key=len)
    return [
        dict(tokenizer(
            ordered[i : i + BATCH_SIZE], padding=True, truncation=True, max_length=length,
            return_tensors="pt",
        ))
        for i in range(0, len(ordered), BATCH_SIZE)
    ]  # fmt: skip


def process_images(model: nn.Module, images: Sequence[Any], processor: Any = None) -> list[Batch]:
    """PIL images to batches of pixel values."""
    processor = processor or _beside(model, "ViTImageProcessorPil")
    return [
        dict(processor(list(images[i : i + BATCH_SIZE]), return_tensors="pt"))
        for i in range(0, len(images), BATCH_SIZE)
    ]


def _read(path: Path, seed: int, samples: int) -> list[Any]:
    """At most `samples` lines of a text file, or images of a folder, drawn without repetition."""
    if not path.exists():
        raise CalibrationError(f"calib path {str(path)!r} does not exist")
    if path.is_file():
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise CalibrationError(f"{path} is not a UTF-8 text file") from None
        found: list[Any] = [line for line in lines if line]
    else:
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
    if not found:
        raise CalibrationError(f"{path} holds no text lines and no images {IMAGES}")
    chosen = random.Random(seed).sample(found, min(samples, len(found)))
    if path.is_file():
        return chosen
    from PIL import Image

    return [_open(Image, p) for p in chosen]


def _open(library: Any, path: Path) -> Any:
    try:
        return library.open(path).convert("RGB")
    except OSError as error:
        raise CalibrationError(f"{path} is not an image that can be read ({error})") from None


def _positions(model: nn.Module) -> int | None:
    """The longest sequence that the model has positions for."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit and config.model_type == "roberta":  # counts from behind the padding index
        limit -= config.pad_token_id + 1
    return limit


def _beside(model: nn.Module, loader: str) -> Any:
    """The tokenizer or processor in the folder or hub repository that the model came from."""
    import transformers

    source = getattr(model.config, "_name_or_path", "") or ""
    try:
        if not source:
            raise OSError("the model was not loaded from a folder")
        return getattr(transformers, loader).from_pretrained(source)
    except Exception as error:
        raise CalibrationError(
            f"calib needs a tokenizer or image processor and none was found beside the model "
            f"({error}); pass tokenizer="
        ) from error


def _as_dict(model: nn.Module, item: Any) -> Batch:
    if isinstance(item, Tensor):
        name = getattr(model, "main_input_name", "input_ids")
        return {name: item}
    if isinstance(item, (tuple, list)):
        return _as_dict(model, item[0]) if item else {}
    if not hasattr(item, "keys"):
        raise CalibrationError(
            f"calib holds a {type(item).__name__}; give batches (dicts of tensors), only strings, "
            "or only images"
        )
    return {k: v for k, v in dict(item).items() if k != "labels" and v is not None}


def _check(model: nn.Module, batch: Batch, index: int) -> Batch:
    where = f"calibration batch {index}"
    main = getattr(model, "main_input_name", "input_ids")
    if main not in batch and "inputs_embeds" not in batch:
        raise CalibrationError(
            f"{where} has {sorted(batch)}, but {type(model).__name__} reads {main!r}; "
            "is this the right tokenizer or image processor?"
        )
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise CalibrationError(
                f"{where}: {name!r} is a {type(value).__name__}, not a tensor; "
                "call the tokenizer with return_tensors='pt'"
            )
        if value.is_meta or value.layout != torch.strided:
            kind = "on the meta device" if value.is_meta else f"of layout {value.layout}"
            raise CalibrationError(f"{where}: {name!r} is {kind}; give dense tensors with data")
        if value.numel() == 0:
            raise CalibrationError(f"{where}: {name!r} is empty, shape {list(value.shape)}")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CalibrationError(f"{where}: {name!r} holds nan or inf; drop or repair the batch")
    ids, vocabulary = batch.get("input_ids"), getattr(model.config, "vocab_size", None)
    if ids is not None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise CalibrationError(f"{where}: input_ids are {ids.dtype}; they must be int64")
        if ids.dim() != 2:
            raise CalibrationError(
                f"{where}: input_ids have shape {list(ids.shape)}; it must be [batch, tokens]"
            )
        lowest, highest = int(ids.min()), int(ids.max())
        if vocabulary and (highest >= vocabulary or lowest < 0):
            worst = lowest if lowest < 0 else highest
            raise CalibrationError(
                f"{where}: token id {worst} is outside the model's vocabulary of {vocabulary}; "
                "this is another model's tokenizer"
            )
        limit = _positions(model)
        if limit and ids.shape[-1] > limit:
            raise CalibrationError(
                f"{where}: {ids.shape[-1]} tokens, but the model has {limit} positions; "
                "truncate to that length"
            )
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and ids is not None and mask.shape != ids.shape:
        raise CalibrationError(
            f"{where}: attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}"
        )
    if mask is not None and not mask.bool().any():
        raise CalibrationError(f"{where}: attention_mask hides every token")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in batch.items()
    }
