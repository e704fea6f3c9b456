"""All commands, by name."""

from collections.abc import Callable
from typing import Annotated

import typer

from fedscan.cli import agreeing, between, consortium, looking, running

app = typer.Typer(
    name="fedscan",
    help="Hospitals train one model together; their scans stay home.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def version(wanted: bool) -> None:
    """Prints the version and ends."""
    if wanted:
        from fedscan import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Hospitals train one model together; their scans stay home."""


COMMANDS: tuple[Callable[..., None], ...] = (
    running.demo, running.run, running.compare, running.predict, running.report,
    looking.methods, looking.show, looking.models, looking.tasks, looking.ledger,
    between.serve, between.join, between.status, between.stop,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
data = typer.Typer(help="Look at data before a study.", no_args_is_help=True, rich_markup_mode=None)
data.command()(looking.check)
app.add_typer(data, name="data")
app.add_typer(consortium.app, name="consortium")
app.add_typer(agreeing.app, name="site")
