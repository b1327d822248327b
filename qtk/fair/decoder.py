"""Latents to rows: what the latent probe moves in.

A variational autoencoder (Kingma, Welling 2014, https://arxiv.org/abs/1312.6114): one-hot -> 64 ->
mean and log variance of 16, and 16 -> 64 -> logits of each position; loss: cross entropy, summed
over positions, + KL / 2. A decoder from elsewhere has `size`, the width of a latent, and `decode`.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.fair.domain import Domain

SIZE = 16
HIDDEN = 64
KL = 0.5
EPOCHS = 30
BATCH = 128
LR = 2e-3


class Decoder(Protocol):
    size: int

    def decode(self, z: Tensor) -> Tensor:
        """[N, size] of standard normal latents -> valid rows [N, T] int64."""
        ...


class Vae(nn.Module):
    """Made by `fit`."""

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        self.domain, self.size = domain, SIZE
        width = sum(domain.sizes)
        self.encoder = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU())
        self.posterior = nn.Linear(HIDDEN, 2 * SIZE)
        self.decoder = nn.Sequential(nn.Linear(SIZE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))

    def loss(self, ordinals: Tensor, generator: torch.Generator) -> Tensor:
        """[B, T] -> mean over the batch of the negative bound, nats."""
        hot = [F.one_hot(o, n) for o, n in zip(ordinals.T, self.domain.sizes, strict=True)]
        mean, log_var = self.posterior(self.encoder(torch.cat(hot, 1).float())).chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator)
        logits = self.decoder(mean + (0.5 * log_var).exp() * noise).split(self.domain.sizes, 1)
        error = sum(
            F.cross_entropy(own, o, reduction="sum")
            for own, o in zip(logits, ordinals.T, strict=True)
        )
        kl = 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum()
        return (error + KL * kl) / len(ordinals)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The likeliest id of each position."""
        logits = self.decoder(z).split(self.domain.sizes, 1)
        return self.domain.tokens(torch.stack([own.argmax(1) for own in logits], 1))


def fit(rows: Tensor, domain: Domain, seed: int = 0, epochs: int = EPOCHS) -> Vae:
    """Learns the rows [N, T]: Adam, batches of 128. The global random state stays as it is."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Vae(domain)
        ordinals, generator = domain.ordinals(rows), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), LR)
        for _ in range(epochs):
            for chosen in torch.randperm(len(rows), generator=generator).split(BATCH):
                optimizer.zero_grad()
                model.loss(ordinals[chosen], generator).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)
