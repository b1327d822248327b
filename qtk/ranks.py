"""Several processes that quantize one model together, by torch.distributed.

Inside an initialised process group each rank runs its share of the calibration batches, and work
that falls into equal parts is shared out; the results come to all, in one order, so that every rank
ends with the same model. Without a group there is one rank, and nothing is sent.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from qtk.errors import BackendError

S = TypeVar("S")
T = TypeVar("T")


def world() -> int:
    """How many processes work together."""
    grouped = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if grouped else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints; before, in and after a group."""
    return int(os.environ.get("RANK", "0")) == 0 if launched() else rank() == 0


def launched() -> bool:
    """Whether torchrun started this process."""
    return distributed.is_available() and distributed.is_torchelastic_launched()


@contextmanager
def group(device: str) -> Iterator[str]:
    """The process group of the processes that torchrun started, if it did; and this one's device.

    Args:
        device: "cpu", or "cuda" for as many GPUs as there are processes on a machine.
    """
    if not launched() or distributed.is_initialized():
        yield device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{torch.cuda.current_device()}"
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def together(work: Callable[[], T]) -> list[T]:
    """What `work` gives on every rank, by rank; an error on one is raised on all.

    Raises:
        BackendError: a rank has ended.
    """
    if world() == 1:
        return [work()]
    mine: Any
    try:
        mine = (work(), None)
    except Exception as error:
        mine = (None, error)
    packed = io.BytesIO()
    torch.save(mine, packed)
    received: list[Any] = [None] * world()
    try:
        distributed.all_gather_object(received, packed.getvalue())
    except RuntimeError as error:
        raise BackendError(
            f"rank {rank()} of {world()} waits for one that has ended: see what that one said, and "
            f"start all again, with resume= to keep the finished blocks ({str(error)[:200]})"
        ) from None
    found = [_unpacked(data) for data in received]
    for _, failure in found:
        if failure is not None:
            raise failure
    return [result for result, _ in found]


def spread(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """function(item) of all items, in order, each computed by one rank."""
    if world() == 1:
        return [function(item) for item in items]
    mine = range(rank(), len(items), world())
    parts = together(lambda: {i: function(items[i]) for i in mine})
    found = {i: result for part in parts for i, result in part.items()}
    return [found[i] for i in range(len(items))]


def least(items: Sequence[S], loss: Callable[[S], float]) -> S:
    """The first item with the smallest loss; the losses are shared out."""
    losses = spread(loss, items)
    return items[min(range(len(items)), key=losses.__getitem__)]


def from_first(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank."""
    return spread(lambda _: work(), [None])[0]


def _unpacked(data: bytes) -> Any:
    """What another of our own processes sent, on this one's device."""

    def here(storage: Any, location: str) -> Any:
        return storage.cuda() if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(data), map_location=here, weights_only=False)
