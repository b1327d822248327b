"""For which sizes packages are made."""

from collections.abc import Iterable
from typing import Any

from qtk.errors import SchemeError
from qtk.packages.package import Size

DEFAULT = ((1, 16), (1, 32), (1, 64), (1, 128))  # one sentence at a time
OFFSET = 2  # position tables of RoBERTa's kin begin so far in


def checked(model: Any, sizes: Iterable[Any]) -> list[Size]:
    """Rows and tokens, or rows alone for images; each size once, the smallest first.

    Raises:
        SchemeError: not sizes, or more tokens than the model has positions for.
    """
    images = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    if images and sizes is DEFAULT:
        return [(1, None)]
    expected = "numbers of images" if images else "pairs of rows and tokens, such as (1, 128)"
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
        raise SchemeError(f"sizes={sizes!r}: give a list of {expected}")
    most = None if images else _positions(model)
    found = set()
    for size in sizes:
        rows, tokens = _read(size, images, expected)
        if most is not None and (tokens or 0) > most:
            if sizes is DEFAULT:
                continue
            raise SchemeError(f"{size!r}: the model has positions for {most} tokens")
        found.add((rows, tokens))
    return sorted(found, key=lambda size: size[0] * (size[1] or 1))


def _read(size: Any, images: bool, expected: str) -> Size:
    parts: Any = (size,) if images and not isinstance(size, (tuple, list)) else size
    wanted = 1 if images else 2
    good = isinstance(parts, (tuple, list)) and len(parts) == wanted and all(map(_is_count, parts))
    if not good:
        raise SchemeError(f"{size!r} is no size: give {expected}")
    return parts[0], None if images else parts[1]


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n > 0


def _positions(model: Any) -> int | None:
    """The most tokens, None where positions are relative."""
    found = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    starts_late = getattr(model.config, "model_type", "") in LATE
    return found - OFFSET if starts_late else found


LATE = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet")
