"""Commands that carry out a study between hospitals: the coordinator's, and those of a hospital."""

import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedscan.cli import common
from fedscan.cli.running import CACHE, JSON, OUT, RUN, SET, ended, resuming, settings

if TYPE_CHECKING:
    from fedscan.consortium.proposals import Office, Proposal
    from fedscan.studyfile import StudyFile

FOLDER = Annotated[Path, typer.Option(metavar="DIR", help="The member's folder.")]
STUDY = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.")]
ENGINE = Annotated[
    Literal["nvflare", "flower", "loopback"], typer.Option(help="What carries the messages; loopback: one machine.")
]
SITES = Annotated[
    Path | None, typer.Option("--sites", metavar="DIR", help="For loopback: where the hospitals' folders lie.")
]
LISTEN = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where hospitals reach this machine.")]
SERVER = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the coordinator is reached.")]
LEASE = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="How long a hospital without any progress is waited for.")
]
LONGEST = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="How long for one answer at most, whatever the progress.")
]
METRICS = Annotated[
    str | None,
    typer.Option("--metrics", metavar="[HOST:]PORT", help="Show metrics to Prometheus; without HOST, to this machine."),
]
LINGER = 3.0  # seconds for which a hospital stays at the end, so that what it said last is carried


def serve(
    study: STUDY,
    folder: FOLDER,
    engine: ENGINE = "nvflare",
    listen: LISTEN = "0.0.0.0:8002",
    sites: SITES = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that lies in the folder.")] = False,
    lease: LEASE = 600.0,
    longest: LONGEST = 259200.0,
    metrics: METRICS = None,
    set_: SET = None,
    out: OUT = None,
    json: JSON = False,
) -> None:
    """Carry out a study between hospitals, once each of them is there and has agreed to exactly this study."""
    from fedscan.consortium import member, serving
    from fedscan.consortium.carriers import hold_size, to_sites
    from fedscan.consortium.prometheus import Exposed
    from fedscan.launch import How
    from fedscan.live import Show
    from fedscan.studyfile import load

    file, home = load(study, settings(set_, None)), member.read(folder)
    run = out or Path("runs") / file.folder
    if resume and not resuming(run):
        raise ValueError(f"{run} holds no run to go on with: leave out --resume, or name the run's folder by --out")
    try:
        with (
            Exposed(metrics) as exposed,
            to_sites(engine, home, folder / engine, sites, listen) as carrier,
            Show([], file.rounds, title=file.name) as show,
        ):
            how = How(resume, command=common.rerun(), watch=show, tell=common.quiet_while(show))
            hold = partial(hold_size, engine)
            table = serving.Table(home, carrier, lease, longest, how, show.waiting, hold, exposed.run)
            page = serving.serve(file, run, table)
    except KeyboardInterrupt:
        raise typer.Exit(common.interrupted(*resuming(run))) from None
    except Exception as e:
        e.again = resuming(run)  # type: ignore[attr-defined]
        raise
    ended(run, page, json)
    if learned_nothing(run):
        common.complain(
            "warning: no round closed with an answer, so nothing was learned: its report says why; mend that, and "
            "begin a new run, in another --out"
        )
        raise typer.Exit(3)


def learned_nothing(run: Path) -> bool:
    """Whether the rounds of a run have all passed without a usable answer to what its method asks."""
    from fedscan.ledger import read_record
    from fedscan.report.turns import skipped

    record = read_record(run)
    return len(skipped(record)) == record.rounds


def join(
    folder: FOLDER,
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help="The study's file or hash (default: the one approved last).")
    ] = None,
    engine: ENGINE = "nvflare",
    server: SERVER = "",
    cache: CACHE = None,
    metrics: METRICS = None,
    json: Annotated[bool, typer.Option("--json", help="Write the log as JSON, a line for each event.")] = False,
) -> None:
    """Answer for a hospital in a study that it has agreed to, until the study is over or Ctrl-C."""
    from fedscan.consortium import joining
    from fedscan.consortium.carriers import address, heard, to_coordinator
    from fedscan.consortium.prometheus import Exposed
    from fedscan.consortium.proposals import office
    from fedscan.consortium.status import Log, Reached, Tally
    from fedscan.engines.doors import Door

    at = office(folder)
    if engine != "loopback":
        address(server)
    file = at.study(study) if study else joining.last_agreed(at)
    found = agreed(at, file, ask=not json)
    with joining.hold_alone(folder), Exposed(metrics) as exposed:
        log = Log(folder / "join.log", json)
        desk = joining.desk(at, joining.ready(at, file, found.asks, cache, common.progress), log)
        tally = Tally(desk)
        silence = partial(heard, engine, folder)
        exposed.hospital(tally, silence)
        door = Door(folder, lambda header, body: tally.handle(body))
        try:
            with to_coordinator(engine, at.home, found.asks.coordinator, server):
                log(f"{at.home.name} is ready for {found.asks.study!r}, asked by {found.asks.coordinator}")
                reached = Reached(f"{found.asks.coordinator} at {server}", log, silence)
                while not desk.ended.wait(1.0):
                    if engine != "loopback":
                        reached.look()
                time.sleep(LINGER)
        except KeyboardInterrupt:
            log("left: what was answered is kept, and joining again goes on with it")
            raise typer.Exit(common.INTERRUPTED) from None
        finally:
            door.close()


def agreed(at: "Office", file: "StudyFile", ask: bool) -> "Proposal":
    """Shows what a study will ask, and returns it where the hospital agrees: by a signed yes, or one given here.

    Whoever sits at a terminal can give it. Raises ValueError where there is none. ``ask`` False: nothing is printed.
    """
    from fedscan.cli.agreeing import show
    from fedscan.consortium import approval

    found, name = at.proposal(file), at.home.name
    if ask:
        show(found)
    if found.standing.state == "approved":
        return found
    mark = at.keep(file)
    if ask and not found.refused and at_terminal() and consent(f"\nDoes {name} agree to exactly this?"):
        approval.decide(at.home, found.asks, at.policy, found.refused, who=name)
        return at.proposal(file)
    folder = shlex.quote(str(at.home.folder))
    what = (
        f"your policy refuses it: {found.refused[0]}"
        if found.refused
        else f"read what is asked, and agree with `fedscan site approve {mark[:12]} --folder {folder}`"
    )
    raise ValueError(f"{found.asks.study!r} is {found.standing.state} here ({found.standing.why}): {what}")


def at_terminal() -> bool:
    """Whether somebody sits there who reads and answers."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def consent(question: str) -> bool:
    """Whether the user says yes; Ctrl-C ends the command."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        raise typer.Exit(common.INTERRUPTED) from None


def status(run: RUN, json: JSON = False) -> None:
    """Show how a run between hospitals stands: its round, and for each hospital what is waited for and until when."""
    from fedscan.consortium.status import standing

    told = standing(run)
    if json:
        common.print_json(told)
        return
    idle = "" if told["alive"] or told["state"] == "ended" else " (nobody is at work on it)"
    print(f"{told['state']}, round {told['round']}{idle}\n")
    now = time.time()
    rows = [(name, site["state"], f"{now - site['since']:.0f} s") for name, site in told["sites"].items()]
    common.print_table(("hospital", "state", "for"), rows)


def stop(run: RUN) -> None:
    """Stop the coordinator of a run, politely: nothing is lost, and it goes on with --resume."""
    from fedscan.consortium.status import LOCK, standing
    from fedscan.engines import alone

    told = standing(run)
    if not told["alive"]:
        raise ValueError(
            f"nobody is at work on {run}: it {'has ended' if told['state'] == 'ended' else 'stands still'}"
        )
    os.kill(alone.holder(run / LOCK), signal.SIGTERM)
    print("it is told to stop; go on later with `fedscan serve ... --resume`")
