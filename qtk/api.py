"""quantize() as users call it; where bits are to be chosen, they are chosen first."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qtk.errors import SchemeError
from qtk.integrations.sentence_transformers import rewrap, unwrap
from qtk.integrations.transformers import load_float
from qtk.mixed_precision import auto
from qtk.mixed_precision.search import OPTIONS, search
from qtk.models import is_network
from qtk.observe.batches import prepare
from qtk.pipeline import opened, run
from qtk.pipeline.request import Request
from qtk.pipeline.state import check
from qtk.security.audit import audit as look

logger = logging.getLogger("qtk")

Part = Any  # a name, a module with `find`, or such a function


def quantize(
    model: nn.Module | str | Path,
    w: int | str = 8,
    a: int | str = 8,
    calib: Any = None,
    tokenizer: Any = None,
    *,
    activations: str = "static",
    weights: str = "symmetric",
    group_size: int | None = None,
    attention: str = "float",
    softmax: str = "float",
    softmax_bits: int | None = None,
    method: Part | None = None,
    rounding: Part | None = None,
    ranges: Part | None = None,
    learn: str | None = None,
    preset: str | None = None,
    bits: Mapping[str, Any] | str | None = None,
    budget: str | Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    blocks: Sequence[str] | None = None,
    backend: str = "auto",
    resume: str | Path | None = None,
    audit: bool = False,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """Turns a transformers BERT, OPT or ViT into the same model computing in low-bit integers.

    A network of Conv2d, Linear and BatchNorm that is no model of transformers is taken as well,
    with `calib`: BatchNorms are folded, every convolution and linear is quantized.

    Args:
        model: a model in floating point, or the path or hub name of one; a SentenceTransformer or
            CrossEncoder, whose tokenizer and length then serve for `calib`; or any other network.
        w, a: bits of weights (2 to 8, or 16) and activations (4 to 8, or 16); 16 is floating point.
            "fp8" for both is e4m3: weights per channel, activations per token.
        calib: batches (dicts of tensors), strings, or a path to a text file or image folder.
            Without any, activations are dynamic and the norms' own parameters give shift and scale.
        tokenizer: tokenizer or image processor for `calib`; looked for beside the model.

        activations: What is quantized, and on which grids. "static" (one scale per tensor) or
            "token" (dynamic, one scale per token).
        weights: "symmetric", or "asymmetric" (a zero point for each scale), which needs a=16.
        group_size: weights that share a scale along the input; None, or more than a row has, is a
            whole row.
        attention: operands of attention's two products: "float", or "int8" to "int4", which
            needs `calib` for v's scales; q and k have one dynamic scale per token and head. Codes
            of fewer than 8 bits are stored and multiplied as int8.
        softmax: "float", "uniform", "matthew" (APQ-ViT; needs `calib`), "log2", "log-sqrt2", or
            "code" (logarithmic, without an exponential); see `qtk_kernels/_softmax.py`.
        softmax_bits: of its codes; by default the activations' for "uniform" and "matthew", 4 for
            the logarithms. Of "code" 5, 6 or 7: one, two or four steps an octave (the default).

        method: How. The equivalent transform: "os+", "smoothquant", "rotate", "os+rotate",
            "equalize+rotate", "none". This, `rounding` and `ranges` may also be a module with a
            function `find`, or such a function; see CONTRIBUTING.
        rounding: how weights become codes: "nearest", "gptq", "adaround", "flexround"; "flipped"
            breaks backdoors that rounding to nearest would wake; "block" and "tuned" are "gptq" and
            then learn="block" or "model".
        ranges: where activation grids end; "auto" or a file in qtk/ranges.
        learn: what goes on learning from the codes: "block" (one after the other), "model" (end to
            end) or "none". One choice of the whole model.
        preset: "fast", "balanced" (the default) or "best": fills in method, rounding and ranges
            where they are not given, for each layer by its own bits; qtk/pipeline/recipes.py says
            with what, benchmarks what each costs.

        bits: Where. {pattern of module names: (w, a)}, first match wins, the rest as `w` and `a`
            say. In the place of a pair a dict of w, a, group_size, activations, weights, method,
            rounding and ranges. Heads, pooler and embeddings stay in floating point unless a
            pattern names them alone. "auto" keeps the most sensitive layers at 8 bits, a tenth of
            the weights at most; "auto:0.2" a fifth.
        budget: in the place of w, a and bits: `qtk.search` chooses the bits under it, such as
            "cosine 0.99", "0.6x bytes" or "0.8x latency". Half of `calib` is held back to verify.
        skip: patterns of module names left in floating point.
        blocks: of a plain network: patterns of the names of modules that are quantized one after
            the other, and kept when finished; what lies in none stays in floating point. Every
            child with a convolution or linear if None.

        backend: Bookkeeping. "auto" (by device), "triton", "cpu" or "reference".
        resume: a folder that keeps every finished block and the state of learning, and is gone on
            from: interrupted at any moment, the same call ends with the same model, and makes the
            unfinished block alone again. Delete it when the model is saved.
        audit: looks for a backdoor first that rounding would wake (`qtk.audit`; classifiers), and
            says so in the log; it quantizes all the same.
        seed: of what is drawn: samples from a file or folder, rows where there is no `calib`,
            labels for ranges="hessian", and the order in which learning sees its batches.
        progress: shows a bar over the blocks.
        inplace: changes `model` itself instead of a copy. Interrupted, it refuses to be saved.

    Returns:
        The model, same class and outputs, in eval mode, its parameters frozen, in the
        SentenceTransformer or CrossEncoder that was around it.

    Raises:
        QtkError: see `qtk.errors`; each message names the module and the remedy.
    """
    options: dict[str, Any] = {
        "activations": activations, "weights": weights, "group_size": group_size,
        "attention": attention, "softmax": softmax, "softmax_bits": softmax_bits, "method": method,
        "rounding": rounding, "ranges": ranges, "learn": learn, "preset": preset, "skip": skip,
        "seed": seed,
    }  # fmt: skip
    folder = check(resume)
    given = unwrap(model, calib, tokenizer)
    bare, calib, tokenizer = given.model, given.data, given.tokenizer
    if audit:
        bare = load_float(bare)
        calib = _audited(bare, w, calib, tokenizer, seed)
    if (budget is not None or isinstance(bits, str)) and is_network(bare):
        raise SchemeError("bits are chosen for models of transformers: give w, a and bits")
    if budget is not None:
        if bits is not None or (w, a) != (8, 8):
            raise SchemeError("budget chooses the bits: leave out w, a and bits, or budget")
        bare = opened(bare, backend)[0]
        passed = {name: options[name] for name in OPTIONS}
        found = search(bare, budget, calib, tokenizer, backend=backend, seed=seed,
                       progress=progress, **passed)  # fmt: skip
        bits, calib = found.bits, found.calib
    elif isinstance(bits, str):
        pairs = auto.pairs_of(bits, w, a, calib)
        request = Request.of(w, a, calib, bits=None, **options)
        bare = opened(bare, backend)[0]
        calib = prepare(bare, calib, tokenizer, seed, request.samples)
        bits = auto.sensitive(bare, calib, bits, pairs, options, backend)
    request = Request.of(w, a, calib, bits=bits, blocks=blocks, **options)
    qmodel = run(
        bare, calib, tokenizer, request, backend=backend, resume=folder, progress=progress,
        inplace=inplace,
    )  # fmt: skip
    whole: nn.Module = rewrap(model, qmodel, inplace=inplace)
    return whole


def _audited(model: nn.Module, w: int | str, calib: Any, tokenizer: Any, seed: int) -> list[Any]:
    """Says in the log what an audit finds, before anything is quantized; the data, in batches."""
    if calib is None or not isinstance(w, int) or w > 8:
        raise SchemeError("audit=True looks at integer weights of classifiers, on calib=")
    batches = prepare(model, calib, tokenizer, seed)
    found = look(model, batches, w=w, seed=seed)
    if found.suspicious:
        logger.warning("%s", found.verdict)
    else:
        logger.info("%s", found.verdict)
    return batches
