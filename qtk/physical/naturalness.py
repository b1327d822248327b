"""A network that says how natural an image looks: dual prior alignment (DPA, CVPR 2023,
github.com/zhangsn-19/PAN).

A ViT whose head are five prototypes e_k, for the ratings 1 to 5; f is what it makes of an image:

    p = softmax(cos(f, e_k) / tau),    score = sum_k k p_k
    L = (score - mean rating)^2 + .6 KL(ratings || p) + 8 mean (map - gaze)^2

The second term is the rating prior, the third the attentive one. DPA has no tau, so that its scores
lie in [1.88, 4.12]; here tau is learned. DPA's map is Grad-CAM, which is for convolutions; a ViT's
is attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): the product of the blocks'
(A + I) / 2, of which the first token's row says what it read of the others. It is normalised image
by image, not over a batch as DPA's is.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from qtk.errors import CalibrationError, SchemeError
from qtk.physical.ratings import LEVELS
from qtk.physical.scores import rollout
from qtk.pipeline.progress import progress_bar

RATING, ATTENTIVE = 0.6, 8.0  # weights of the priors; DPA's 3, of a mean over 5 ratings
TAU = 0.2  # to begin with
BATCH = 32


class Prototypes(nn.Module):
    """[B, H] -> [B, 5], cosines with the ratings' prototypes over a temperature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(LEVELS, width))
        self.log_tau = nn.Parameter(torch.tensor(math.log(TAU)))

    def forward(self, features: Tensor) -> Tensor:
        cosines = F.normalize(features, dim=-1) @ F.normalize(self.prototypes, dim=-1).T
        return cosines / self.log_tau.exp()


class Assessor(ViTForImageClassification):
    """Its logits are those of the ratings 1 to 5; quantized, the prototypes stay in float."""

    def __init__(self, config: ViTConfig) -> None:
        config.num_labels = LEVELS
        super().__init__(config)
        self.add_module("classifier", Prototypes(config.hidden_size))


def build(
    size: int = 32, patch: int = 4, width: int = 64, layers: int = 3, seed: int = 0
) -> Assessor:
    """Untrained, for images of `size` pixels a side; the global random state stays as it is."""
    sizes: dict[str, Any] = {
        "image_size": size, "patch_size": patch, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 16), "intermediate_size": 2 * width,
        "attn_implementation": "eager",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Assessor(ViTConfig(**sizes))


def train(
    images: Tensor, ratings: Tensor, gaze: Tensor, *, model: Assessor | None = None,
    epochs: int = 5, lr: float = 1e-3, rating: float = RATING, attentive: float = ATTENTIVE,
    seed: int = 0, progress: bool = True,
) -> Assessor:  # fmt: skip
    """An assessor of images [N, 3, H, W] in [0, 1].

    Args:
        ratings: [N, 5], shares of raters that say 1 to 5.
        gaze: [N, H, W] in [0, 1], where they looked.
        model: an untrained one, which is trained in place; None builds the usual one.
        epochs: of AdamW with `lr` at most, batches of 32.
        rating, attentive: weights of the two priors; 0 leaves one out.
        seed: of the model and of the order of images.
        progress: shows a bar.

    Raises:
        CalibrationError: images, ratings and maps that do not fit.
        SchemeError: a negative weight, or no epoch.
    """
    _check(images, ratings, gaze)
    if min(rating, attentive) < 0 or epochs < 1:
        raise SchemeError("weights of priors are not negative, and an epoch is needed")
    model = model or build(images.shape[-1], seed=seed)
    levels = torch.arange(1, LEVELS + 1).float()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    done = 0
    with torch.enable_grad(), progress_bar(progress) as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
                bar.show("assessor", done, steps)
                out = model(images[chosen] * 2 - 1, output_attentions=attentive > 0)
                log_p, told = out.logits.log_softmax(1), ratings[chosen]
                loss = F.mse_loss(log_p.exp() @ levels, told @ levels)
                loss = loss + rating * F.kl_div(log_p, told, reduction="batchmean")
                if attentive > 0:
                    seen = rollout(out.attentions, images.shape[-2:])
                    loss = loss + attentive * F.mse_loss(seen, gaze[chosen])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
    return model.eval()


def _check(images: Tensor, ratings: Tensor, gaze: Tensor) -> None:
    n = len(images)
    if not n or ratings.shape != (n, LEVELS) or gaze.shape != (n, *images.shape[-2:]):
        raise CalibrationError(
            f"images {list(images.shape)}, ratings {list(ratings.shape)} and gaze "
            f"{list(gaze.shape)} do not fit: give [N, 3, H, W], [N, {LEVELS}] and [N, H, W]"
        )
    if not torch.allclose(ratings.sum(1), torch.ones(n), atol=1e-3) or bool((ratings < 0).any()):
        raise CalibrationError("ratings are shares of raters: give rows that add up to 1")
