"""Commands by which a hospital says what it allows, what it has, and which study it agrees to."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedscan.cli import common
from fedscan.cli.looking import JSON
from fedscan.cli.site import FOLDER, app

__all__ = ["app"]

if TYPE_CHECKING:
    from fedscan.consortium.proposals import Office, Proposal

WHAT = Annotated[str, typer.Argument(metavar="STUDY", help="The study's file, or the hash under which it was shown.")]
WHO = Annotated[str | None, typer.Option(help="Who says so, for the record (default: the hospital).")]


@app.command()
def policy(folder: FOLDER, json: JSON = False) -> None:
    """Write the hospital's policy, to be read and changed; or check and explain the one that is there."""
    from fedscan.consortium.member import put
    from fedscan.consortium.policy import DEFAULT, answers_at, explained, read_policy
    from fedscan.consortium.proposals import POLICY, office

    at, path = office(folder), folder / POLICY
    if new := not path.exists():
        put(path, DEFAULT)
    found = read_policy(path)
    answering = answers_at(found, at.now.astimezone())
    if json:
        common.print_json({**found.model_dump(mode="json"), "hash": found.hash, "answering_now": answering})
        return
    print("\n".join(explained(found)))
    print(f"Now, questions are {'answered' if answering else 'not answered'}.\n")
    common.where(policy=path, hash=found.hash)
    if new:
        print(f"\n{POLICY} is new: read it, and change what your hospital wants otherwise.")


@app.command()
def data(
    scans: Annotated[Path, typer.Argument(metavar="SCANS", help="A folder in a known layout, or a table of cases.")],
    folder: FOLDER,
    json: JSON = False,
) -> None:
    """Open every scan and register what the hospital has; the catalogue stays in its folder."""
    from fedscan.consortium.catalogue import FILE, register, shown
    from fedscan.consortium.policy import Policy
    from fedscan.consortium.proposals import POLICY, office

    at = office(folder)
    smallest = (at.policy if (folder / POLICY).exists() else Policy()).leaves.smallest_group
    found = register(at.home.name, scans, folder, at.now)
    outside = shown(found, smallest)
    if json:
        common.print_json({"catalogue": asdict(found), "shown_outside": outside})
        return
    print(f"{found.layout}: {len(found.items)} cases, {len(found.used)} usable\n")
    names = ", ".join(f"{name} {sum(name in item.sequences for item in found.used)}" for name in found.sequences)
    print(f"sequences: {names}\nmm: {axes(found.spacing)}")
    for name, volume in found.volumes.items():
        print(f"{name}: {'not found' if volume is None else f'{volume:.0f} mm3 (median)'}")
    for item in found.left_out:
        print(f"left out: {item.case}: {item.why}")
    common.print_warnings(found.warnings)
    print(f"\nOutside no more may be shown than this; a dash hides groups of fewer than {smallest} patients:")
    common.print_table(("what", "value"), [(name, dash(value)) for name, value in outside.items()])
    print()
    common.where(kept=folder / FILE)


def axes(spacing: tuple[float | None, ...]) -> str:
    """A spacing by axis: "1 x 1 x 3"."""
    return " x ".join("?" if mm is None else f"{mm:.3g}" for mm in spacing)


def dash(value: Any) -> str:
    """A value that may be shown, or a dash where it is withheld."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {dash(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return " x ".join(dash(one) for one in value)
    return "–" if value is None else str(value)


@app.command()
def study(what: WHAT, folder: FOLDER, json: JSON = False) -> None:
    """Show what a study will ask, what would leave, how that differs from the last yes, and what the policy refuses."""
    from fedscan.consortium.proposals import office

    at = office(folder)
    file = at.study(what)
    found = at.proposal(file)
    mark = at.keep(file)
    if json:
        common.print_json({"asks": found.asks.plain(), **told(found)})
        return
    show(found)
    print()
    common.where(study=mark)


def show(found: "Proposal") -> None:
    """Prints what a study will ask, how that differs from the last yes, what the policy refuses, and how it stands."""
    from fedscan.consortium.words import words

    print(words(found.asks))
    if found.last:
        print(f"Compared with {found.last.asks.study!r}, {found.last.study[:12]}, which was approved last:")
        print("".join(f"- {sentence}\n" for sentence in found.compared) or "- nothing differs\n")
    else:
        print("No other study was approved before, so there is none to compare it with.\n")
    if found.refused:
        print("Your policy refuses:\n" + "".join(f"- {sentence}\n" for sentence in found.refused))
    print(f"It is {found.standing.state}: {found.standing.why}.")


def told(found: "Proposal") -> dict[str, Any]:
    """How a study stands, as plain data."""
    return {
        "compared_with": found.last.study if found.last else None,
        "differs": found.compared,
        "refused": found.refused,
        "state": found.standing.state,
        "why": found.standing.why,
    }


@app.command()
def approve(
    what: WHAT,
    folder: FOLDER,
    until: Annotated[str | None, typer.Option(metavar="DATE", help="The last day, as 2027-03-31 (UTC).")] = None,
    who: WHO = None,
) -> None:
    """Sign a yes to a study as it is, under the policy as it is; refused where the policy refuses anything of it."""
    from fedscan.consortium import approval
    from fedscan.consortium.proposals import office

    at = office(folder)
    end = None if until is None else approval.end_of(until)
    file = at.study(what)
    found = at.proposal(file)
    path = approval.decide(
        at.home, found.asks, at.policy, found.refused, who=who or at.home.name, until=end, now=at.now
    )
    at.keep(file)
    print(
        f"{found.asks.study!r} is approved, as it is and under your policy as it is: a change of either undoes this.\n"
    )
    common.where(study=found.asks.hash, signed=path)


@app.command()
def reject(
    what: WHAT,
    folder: FOLDER,
    why: Annotated[str, typer.Option(metavar="REASON", help="Why, for the record.")],
    who: WHO = None,
) -> None:
    """Sign a no to a study, with its reason; it undoes a yes."""
    from fedscan.consortium import approval
    from fedscan.consortium.proposals import office

    at = office(folder)
    file = at.study(what)
    found = at.proposal(file)
    path = approval.reject(at.home, found.asks, at.policy, why, who=who or at.home.name, now=at.now)
    at.keep(file)
    print(f"{found.asks.study!r} is rejected.\n")
    common.where(study=found.asks.hash, signed=path)


@app.command()
def approvals(folder: FOLDER, json: JSON = False) -> None:
    """List the studies that were shown here, and how each of them stands today."""
    from fedscan.consortium.proposals import office

    at = office(folder)
    at.home.identity(at.now)
    found = [listed(at, path) for path in at.kept()]
    if json:
        common.print_json(found)
        return
    if not found:
        print("No study was shown here yet: `fedscan site study` shows one.")
        return
    rows = [(one["study"], one["hash"][:12], one["method"], one["state"], one["why"]) for one in found]
    common.print_table(("study", "hash", "method", "state", "why"), rows)


def listed(at: "Office", path: Path) -> dict[str, Any]:
    """How a study that is kept stands, as plain data; "unfit" where it cannot be asked here as members are today."""
    from fedscan.consortium.proposals import opened
    from fedscan.run import Problem

    name = method = "–"
    try:
        file = opened(path)
        name, method = file.name, file.method
        return {"study": name, "hash": path.stem, "method": method, **told(at.proposal(file))}
    except (Problem, ValueError) as e:
        unfit: dict[str, Any] = {"compared_with": None, "differs": [], "refused": [], "state": "unfit", "why": str(e)}
        return {"study": name, "hash": path.stem, "method": method, **unfit}
