"""What happens to a block around its quantizing: brought, taken up again, kept, let go."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from qtk.assembly import rebuild
from qtk.models import Block
from qtk.observe import Call
from qtk.pipeline.learning import Learning
from qtk.pipeline.state import Finished, State
from qtk.record import Layer
from qtk.scheme import AttentionScheme


class Store(Protocol):
    """Where the weights of blocks are that memory does not hold (qtk/integrations/offload.py)."""

    def bring(self, model: nn.Module, block: Block) -> None: ...
    def release(self, model: nn.Module, block: Block) -> None: ...


@dataclass
class Keeper:
    """Goes along with the walk, and gathers how the layers were made.

    Attributes:
        state: where finished blocks are kept, or None.
        store: where blocks come from, one at a time; None when memory holds all.
        made: of the blocks so far, by full name.
    """

    model: nn.Module
    learning: Learning
    attention: AttentionScheme | None
    backend: str
    state: State | None = None
    store: Store | None = None
    made: dict[str, Layer] = field(default_factory=dict)

    def bring(self, block: Block) -> None:
        """The block's float weights come into memory."""
        if self.store is not None:
            self.store.bring(self.model, block)

    def restored(self, index: int, block: Block) -> bool:
        """Whether the block was finished before; it is then put in place."""
        found = None if self.state is None else self.state.block(index)
        if found is None:
            return False
        rebuild(self.model, block, found.layers, self.attention, self.backend, found.tensors)
        self.made |= found.layers
        self.learning.results += [found.learned] if found.learned is not None else []
        return True

    def done(self, index: int, block: Block, calls: Sequence[Call]) -> None:
        """The block's linears are all quantized: it learns, and is kept."""
        module = self.model.get_submodule(block.name)
        learned = self.learning.after_block(module, calls)
        if self.state is not None:
            layers = {name: self.made[name] for name in block.linears if name in self.made}
            self.state.keep(index, Finished(module.state_dict(), layers, learned))

    def release(self, block: Block) -> None:
        """Nothing looks at the block again."""
        if self.store is not None:
            self.store.release(self.model, block)
