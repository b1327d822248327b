"""Samples in files: lines of a text, images of a folder. Nothing is held that is not asked for."""

import logging
import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from qtk.errors import CalibrationError

logger = logging.getLogger("qtk")

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MAX_LINE = 2**16  # characters kept of one line; a model reads some thousand
MAX_TEXT = 2**28  # characters of a file that lines are drawn from

Line = tuple[int, str]


def lines(path: Path, limit: int | None = None) -> Iterator[Line]:
    """The lines that are not blank, with their numbers from 1, without a byte order mark.

    A line ends at a newline and nowhere else. Of a longer one than `MAX_LINE` characters the start
    is kept.

    Args:
        limit: characters after which no new line is begun.

    Raises:
        CalibrationError: the file cannot be read, or is not UTF-8.
    """
    seen = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number in count(1):
                part = line = file.readline(MAX_LINE)
                while part and not part.endswith("\n"):
                    seen += len(part)
                    part = file.readline(MAX_LINE)
                seen += len(part)
                if line.strip():
                    yield number, line.strip()
                if not part:
                    return
                if limit is not None and seen >= limit:
                    logger.warning("of %s only the first %d characters are used", path, seen)
                    return
    except UnicodeDecodeError:
        raise CalibrationError(f"{path} is not a UTF-8 text file") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error


def draw_lines(path: Path, seed: int, samples: int) -> list[Line]:
    """At most `samples` lines, drawn without repetition; two passes, so only these are held."""
    total = sum(1 for _ in lines(path, MAX_TEXT))
    order = random.Random(seed).sample(range(total), min(samples, total))
    wanted = set(order)
    found = {i: line for i, line in enumerate(lines(path, MAX_TEXT)) if i in wanted}
    return [found[i] for i in order]


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES and path.is_file()


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if is_image(path))


def class_of(folder: Path, image: Path) -> str | None:
    """The folder that an image lies in, which names its class; None right in `folder`."""
    return None if image.parent == folder else image.parent.name


def classes(folder: Path) -> list[str]:
    """The names of all class folders, sorted."""
    return sorted({name for path in image_files(folder) if (name := class_of(folder, path))})
