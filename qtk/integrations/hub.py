"""A saved model goes to the hub as it lies in its folder: checksums, tokenizer and card with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Upload:
    """What `save_pretrained(push_to_hub=True, ...)` says of the upload."""

    repo_id: str
    token: str | bool | None = None
    private: bool | None = None
    revision: str | None = None
    commit_message: str | None = None
    create_pr: bool = False

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any], folder: Path) -> "Upload | None":
        """Takes its words out of `kwargs`, but for the token, which others may need."""
        if not kwargs.pop("push_to_hub", False):
            return None
        words = ("repo_id", "private", "revision", "commit_message", "create_pr")
        told = {word: kwargs.pop(word) for word in words if word in kwargs}
        return cls(**{"repo_id": folder.resolve().name, "token": kwargs.get("token"), **told})

    def __call__(self, folder: Path, names: Sequence[str]) -> None:
        """Uploads these files of a folder that is whole, in one commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        repo = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(names), revision=self.revision,
            commit_message=self.commit_message or "Upload a quantized model",
            create_pr=self.create_pr,
        )  # fmt: skip
