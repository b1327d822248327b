"""What a terminal shows while a model is quantized."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qtk.models import Block
from qtk.observe import Site


class Bar:
    """A bar on the terminal, or nothing."""

    def __init__(self, bar: Any = None) -> None:
        self.bar = bar
        self.text = ""
        self.task = None if bar is None else bar.add_task("quantizing", total=None)

    def over(self, sites: Iterator[Site], blocks: Sequence[Block]) -> Iterator[Site]:
        """The sites of the blocks, shown as they pass."""
        total = sum(len(block.groups) for block in blocks)
        for done, site in enumerate(sites):
            block = site.block.name.split(".")[-1]
            self.show(f"{block}.{site.group.name}", done, total)
            yield site

    def fitting(self, done: int, total: int) -> None:
        """How far the fit of one layer is, behind its name."""
        if self.bar is not None:
            self.bar.update(self.task, description=f"{self.text} {100 * done // total} %")

    def learning(self, done: int, total: int, loss: float) -> None:
        self.show(f"learning, loss {loss:.4g}", done, total)

    def show(self, text: str, done: int, total: int) -> None:
        self.text = text
        if self.bar is not None:
            self.bar.update(self.task, description=text, completed=done, total=total)


@contextmanager
def progress_bar(show: bool) -> Iterator[Bar]:
    if not show:
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        yield Bar(bar)
