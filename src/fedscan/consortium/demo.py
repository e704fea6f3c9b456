"""A whole consortium on one machine: real processes, real keys, the simulated hospitals of ``fedscan demo``."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from fedscan.consortium import approval, catalogue, coordinator, member, serving
from fedscan.consortium.carriers import EngineName, to_sites
from fedscan.consortium.member import Home
from fedscan.consortium.proposals import POLICY, office
from fedscan.data.manifest import read_manifest, write_manifest
from fedscan.data.simulate import HONESTY, hospitals, write_hospitals
from fedscan.engines.kept import free_port
from fedscan.launch import How
from fedscan.live import Show
from fedscan.run import Problem
from fedscan.studyfile import StudyFile, load

NAME, DESK = "demo", "desk"
ALLOWS = """\
[answers]
least_cases = 5    # the simulated hospitals have 8 to 12 patients
least_steps = 2
"""


def demo(folder: Path, sites: int = 4, engine: EngineName = "nvflare", seed: int = 0) -> Path:
    """Founds a consortium in ``folder`` and carries out a study in it; returns the path of the report.

    Each hospital is a process of its own, which answers over the engine. Called again, it goes on where it stood.
    Raises Problem where the folder holds another demo.
    """
    print(f"{HONESTY} Nothing is downloaded.", flush=True)
    names = founded(folder, sites, seed)
    file = load(folder / "study.toml")
    for name in names:
        agreed(folder / name, file)
    home, run = member.read(folder / DESK), folder / "run"
    at = f"localhost:{free_port()}"
    with (
        processes(folder, names, engine, at),
        to_sites(engine, home, folder / DESK / engine, folder, at) as carrier,
        Show([], file.rounds, title=file.name) as show,
    ):
        how = How((run / "journal.sqlite").exists(), command=command(sites, engine, seed), watch=show)
        return serving.serve(file, run, serving.Table(home, carrier, how=how, show=show.waiting))


def command(sites: int, engine: EngineName, seed: int) -> str:
    """What makes the same demo again."""
    return f"fedscan consortium demo --sites {sites} --engine {engine}" + f" --seed {seed}" * bool(seed)


def founded(folder: Path, sites: int, seed: int) -> tuple[str, ...]:
    """The hospitals of the consortium in ``folder``, which is made the first time: whole or not at all."""
    chosen = tuple(hospital.name.lower() for hospital in hospitals(sites))
    there = tuple(sorted(path.parent.name for path in folder.glob("*/scans")))
    if (folder / "study.toml").exists() and there:
        if there != tuple(sorted(chosen)):
            raise Problem(f"{folder} holds the demo with other hospitals ({', '.join(there)}); choose another --out.")
        return chosen
    root, now = folder / "root", datetime.now(UTC)
    if folder.exists() and any(folder.iterdir()):
        raise Problem(f"{folder} holds something else, or a demo that was stopped while it began: delete it, or choose "
                      "another --out.")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(chosen)} hospitals found a consortium: each makes its key, and is admitted", flush=True)
    coordinator.found(NAME, root, now)
    homes = [admitted(folder, name, "site", root) for name in chosen] + [admitted(folder, DESK, "coordinator", root)]
    for home in homes:
        member.take_roster(home, root / coordinator.ROSTER)
    scans_of(folder, chosen, seed)
    for name in chosen:
        member.put(folder / name / POLICY, ALLOWS)
        catalogue.register(name, folder / name / "scans", folder / name, now)
    member.put(folder / "study.toml", study(seed))  # last: who finds it, finds all
    return chosen


def study(seed: int) -> str:
    """The study's file."""
    return f"seed = {seed}\n{(files('fedscan.data') / 'assets' / 'consortium.toml').read_text(encoding='utf-8')}"


def admitted(folder: Path, name: str, role: str, root: Path) -> Home:
    """A new member, with its kit imported."""
    home = member.begin(name, role, folder / name)
    kit = coordinator.admit(root, folder / name / member.REQUEST, home.role).kit
    member.take_kit(home, kit)
    return home


def scans_of(folder: Path, names: Sequence[str], seed: int) -> None:
    """The simulated scans of each hospital, in its own folder."""
    print("simulating scans", flush=True)
    whole = read_manifest(write_hospitals(folder / "all", seed))
    for name in names:
        own = folder / name / "scans"
        own.mkdir()
        mine = []
        for case in whole.cases:
            if case.site.lower() == name:
                images = {what: moved(path, own) for what, path in case.images.items() if path}
                mine.append(replace(case, site=name, images=images, label=moved(case.label, own)))
        write_manifest(replace(whole, root=own, cases=tuple(mine)), own / "cases.csv")
    shutil.rmtree(folder / "all")


def moved(path: Path | None, folder: Path) -> Path | None:
    """A file, moved into a folder."""
    return None if path is None else Path(shutil.move(path, folder / path.name))


def agreed(folder: Path, file: StudyFile) -> None:
    """A hospital signs its yes to the study, if it has not yet."""
    at = office(folder)
    found = at.proposal(file)
    at.keep(file)
    if found.standing.state != "approved":
        approval.decide(at.home, found.asks, at.policy, found.refused, who=f"{at.home.name} (demo)")


@contextmanager
def processes(folder: Path, names: Sequence[str], engine: EngineName, server: str) -> Iterator[None]:
    """A process for each hospital, which answers until this ends; what it says is in its folder's join.log."""
    print(f"{len(names)} hospitals join, each a process of its own, over {engine}", flush=True)
    begun = []
    for name in names:
        words = ["join", "--folder", str(folder / name), "--engine", engine, "--server", server, "--cache",
                 str(folder / name / "cache")]  # fmt: skip
        with (folder / name / "said.txt").open("w") as said:
            begun.append(subprocess.Popen([sys.executable, "-m", "fedscan", *words], stdin=subprocess.DEVNULL,
                                          stdout=said, stderr=said, start_new_session=True))  # fmt: skip
    try:
        yield
    finally:
        for process in begun:
            process.terminate()
        for process in begun:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
