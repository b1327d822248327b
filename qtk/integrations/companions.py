"""The files that belong beside a model's weights: tokenizer, image processor, pooling."""

import shutil
from pathlib import Path

from qtk.errors import ModelError

PATTERNS = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "spiece.model", "sentencepiece*.model", "chat_template*", "*processor_config.json",
    "modules.json", "sentence_*config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip


def copy_companions(source: str | Path, target: str | Path) -> list[str]:
    """Copies what is there of these files, so that the target folder is complete.

    Args:
        source: the folder of the float model, or its hub name.
        target: an existing folder.

    Returns:
        The names copied.

    Raises:
        ModelError: a hub name whose files cannot be fetched.
    """
    folder, copied = _folder(source), []
    for pattern in PATTERNS:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                name = file.relative_to(folder)
                (Path(target) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, Path(target) / name)
                copied.append(str(name))
    return copied


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(PATTERNS)))
    except Exception as error:
        raise ModelError(f"cannot fetch the tokenizer of {str(source)!r}: {error}") from error
