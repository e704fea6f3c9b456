"""Commands of a consortium's coordinator: make it, admit members, revoke them, list them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedscan.cli import common

FOLDER = Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's folder.")]
EITHER = Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's folder, or a member's.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(help="Who belongs to a consortium (the coordinator's side).", no_args_is_help=True,
                  rich_markup_mode=None)  # fmt: skip


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The consortium's name: small letters, digits, hyphens.")],
    folder: FOLDER,
) -> None:
    """Make a consortium: the key that admits members, and an empty roster."""
    from fedscan.consortium import coordinator, keys

    root = coordinator.found(name, folder)
    print(f"the consortium {name} is made\n")
    common.where(key=folder / coordinator.KEY, root=folder / coordinator.ROOT, roster=folder / coordinator.ROSTER)
    print(f"\nThe root's fingerprint is\n  {keys.spoken(root_mark(root))}")
    print("Members compare it with you by telephone. The key stays in this folder: who has it admits whom they like.")


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where it lies (default: runs/consortium).")
    ] = None,
    sites: Annotated[int, typer.Option(min=2, max=5, help="How many hospitals.")] = 4,
    engine: Annotated[
        Literal["nvflare", "flower", "loopback"], typer.Option(help="What carries the messages.")
    ] = "loopback",
    seed: Annotated[int, typer.Option(min=0, help="Other patients, another order.")] = 0,
) -> None:
    """Play a whole consortium on this machine: real processes, real keys, simulated scans; nothing is downloaded."""
    from fedscan.cli.running import ended
    from fedscan.consortium.demo import demo as play

    folder = out or Path("runs/consortium")
    try:
        page = play(folder, sites, engine, seed)
    except KeyboardInterrupt:
        raise typer.Exit(common.interrupted()) from None
    ended(folder / "run", page, json=False)


@app.command()
def admit(
    request: Annotated[Path, typer.Argument(metavar="REQUEST.csr", help="The request that the member sent.")],
    folder: FOLDER,
    role: Annotated[Literal["site", "coordinator", "reader"], typer.Option(help="What it is admitted as.")] = "site",
    days: Annotated[int, typer.Option(min=1, help="How long its certificate lasts.")] = 730,
    name: Annotated[str | None, typer.Option(help="The name that it should ask for.")] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="FINGERPRINT", help="Its key, as you were told by telephone.")
    ] = None,
) -> None:
    """Admit a member: sign its certificate, put it on the roster, write its kit."""
    from fedscan.consortium import coordinator, keys
    from fedscan.consortium.identity import day

    done = coordinator.admit(folder, request, role, days, name, key)
    member = done.member
    if done.again:
        print(f"{member.name} is a member since {day(member.admitted)}; its kit was written again\n")
    else:
        print(f"{member.name} is admitted as {member.role} until {day(member.until)}\n")
    common.where(kit=done.kit)
    if key is None:
        print(f"\nIts key has the fingerprint\n  {keys.spoken(member.key)}")
        print(f"Before you send the kit, compare it with {member.name} by telephone; if it differs, revoke at once.")
    else:
        print(f"\nSend the kit to {member.name}; it holds no secret.")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member.")],
    why: Annotated[str, typer.Option(metavar="REASON", help="The reason, which every member will read.")],
    folder: FOLDER,
) -> None:
    """Revoke a member; it stays on the roster, with the day and the reason."""
    from fedscan.consortium import coordinator

    roster = coordinator.revoke(folder, name, why)
    print(f"{name} is revoked; this is version {roster.version} of the roster\n")
    common.where(roster=folder / coordinator.ROSTER)
    print("\nSend the roster to every member: one that has not imported it still believes in the old one.")


@app.command()
def members(folder: EITHER, json: JSON = False) -> None:
    """List the members, and those that were revoked."""
    from fedscan.consortium import coordinator, identity, keys
    from fedscan.consortium.roster import entries

    roster, now = coordinator.read(folder), identity.now_or(None)
    mark = root_mark(roster.root)
    states = ["revoked" if m.revoked else "member" if m.until > now else "ended" for m in roster.lines]
    if json:
        rows = [{**entry, "state": state} for entry, state in zip(entries(roster), states, strict=True)]
        head = {"consortium": roster.consortium, "root": mark, "version": roster.version}
        common.print_json({**head, "written": roster.written.isoformat(), "members": rows})
        return
    print(f"{roster.consortium}: version {roster.version} of the roster, of {identity.day(roster.written)}")
    print(f"root     {keys.spoken(mark)}\n")
    if not roster.lines:
        print("nobody is admitted yet")
        return
    shown = [
        (m.name, m.role, state, identity.day(m.admitted), identity.day(m.until), m.key[:16])
        for m, state in zip(roster.lines, states, strict=True)
    ]
    common.print_table(("name", "role", "state", "admitted", "until", "key"), shown)
    for member in roster.lines:
        if member.revoked:
            print(f"revoked: {member.name} on {identity.day(member.revoked)}: {member.why}")


def root_mark(root: str) -> str:
    """The fingerprint of a root's key."""
    from fedscan.consortium import identity, keys

    return keys.fingerprint(identity.read_root(root).public_key())
