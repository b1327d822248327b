"""foolbox's attacks behind our protocol: its random numbers come from our generator."""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from qtk.errors import QtkError


def run(
    name: str, model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """The images that `foolbox.attacks.<name>(**settings)` finds inside the budget.

    Raises:
        QtkError: foolbox is not installed.
    """
    try:
        import foolbox
    except ImportError:
        raise QtkError(
            "this attack needs foolbox: pip install 'qtk-torch[robust]', or choose among "
            "apgd_ce, apgd_dlr, square and noise"
        ) from None
    attack = getattr(foolbox.attacks, name)(**settings)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # foolbox draws from the global generator
        target = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        _, found, _ = attack(target, x, y, epsilons=budget)
    result: Tensor = found.detach()
    return result
