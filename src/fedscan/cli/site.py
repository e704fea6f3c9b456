"""Commands of a member's own folder: its key and request, the kit that comes back."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedscan.cli import common

FOLDER = Annotated[Path, typer.Option(metavar="DIR", help="The member's folder.")]

app = typer.Typer(help="A hospital's own folder: who it is, and what it agrees to.", no_args_is_help=True,
                  rich_markup_mode=None)  # fmt: skip


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member's name: small letters, digits, hyphens.")],
    folder: FOLDER,
    role: Annotated[Literal["site", "coordinator", "reader"], typer.Option(help="What it is to be.")] = "site",
) -> None:
    """Make a member's private key, which stays here, and the request to be admitted."""
    from fedscan.consortium import keys, member

    home = member.begin(name, role, folder)
    common.where(key=folder / member.KEY, request=folder / member.REQUEST)
    print(f"\nSend {member.REQUEST} to the coordinator, and tell them the key's fingerprint by telephone:")
    print(f"  {keys.spoken(keys.fingerprint(home.key.public_key()))}")
    print(f"{member.KEY} stays where it is: nobody needs it, and nobody should ask for it.")


@app.command("import")
def import_(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="The folder that the coordinator sent, or a roster.json.")],
    folder: FOLDER,
    root: Annotated[
        str | None,
        typer.Option(metavar="FINGERPRINT", help="The fingerprint of the consortium's root, as you were told it."),
    ] = None,
) -> None:
    """Take over what the coordinator sent, if every byte of it is signed and nothing is older than what is here."""
    from fedscan.consortium import identity, keys, member

    home = member.read(folder)
    roster = member.take_kit(home, kit, root) if kit.is_dir() else member.take_roster(home, kit, root)
    print(f"{home.name} is a {home.role} of {roster.consortium}; version {roster.version} of the roster")
    if root is None and kit.is_dir():
        mark = keys.fingerprint(identity.read_root(roster.root).public_key())
        print(f"\nThe root's fingerprint is\n  {keys.spoken(mark)}")
        print("Compare it with the coordinator by telephone before you answer any study.")
