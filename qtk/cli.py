"""The command line: each command calls one function of qtk and prints what it returns."""

import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import qtk
from qtk.commands import make, measure, trust
from qtk.commands.shown import errors
from qtk.errors import QtkError

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": make.quantize, "eval": measure.evaluate, "info": measure.info,
    "search": measure.search, "bench-ops": measure.bench_ops, "sweep": measure.sweep,
    "export": make.export, "robust": trust.robust, "audit": trust.audit, "fair": trust.fair,
    "steal": trust.steal, "xray": trust.xray, "tune": make.tune, "demo": make.demo,
}  # fmt: skip


class Commands(TyperGroup):
    """Prints errors that a user can act on as one line; --debug may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, sorted(args, key=lambda arg: arg != "--debug"))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (QtkError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            errors.print(f"error: {' '.join(str(error).split())}", style="bold red", soft_wrap=True,
                         markup=False, highlight=False)  # fmt: skip
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Low-bit integer BERT, OPT and ViT.",
)  # fmt: skip


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        typer.echo(qtk.__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit
    _quiet_transformers()


def _quiet_transformers() -> None:
    """Leaves stderr to our own progress and warnings."""
    from rich.logging import RichHandler
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    if not logging.getLogger("qtk").handlers:
        handler = RichHandler(console=errors, show_time=False, show_path=False)
        logging.getLogger("qtk").addHandler(handler)


for name, command in COMMANDS.items():
    app.command(name)(command)
