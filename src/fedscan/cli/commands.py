"""All commands, by name."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
    looking.methods, looking.show, looking.models, looking.tasks,
    between.serve, between.join, between.status, between.stop,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
data = typer.Typer(help="Look at data before a study.", no_args_is_help=True, rich_markup_mode=None)
data.command()(looking.check)
app.add_typer(data, name="data")


class Record(TyperGroup):
    """The commands on a record; the word that names a run, and no command, asks to show it."""

    meant = "show"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts in the command that is meant."""
        known = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if known else [self.meant, *args])


ledger = typer.Typer(cls=Record, help="Show the record of a run, and check it.", no_args_is_help=True,
                     rich_markup_mode=None)  # fmt: skip
ledger.command(Record.meant)(looking.ledger)
ledger.command()(looking.verify)
app.add_typer(ledger, name="ledger")
app.add_typer(consortium.app, name="consortium")
app.add_typer(agreeing.app, name="site")
