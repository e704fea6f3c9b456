"""The demo: simulated hospitals on real anatomy, the same path as a study on real scans, nothing downloaded."""

import os
from importlib.resources import as_file, files
from pathlib import Path

from fedscan.data.manifest import read_manifest
from fedscan.data.simulate import HONESTY, hospitals, write_hospitals
from fedscan.launch import How, free, launch, prepared, suits, writing
from fedscan.live import Show
from fedscan.run import Problem
from fedscan.studyfile import load


def demo(folder: Path, *, hard_site: bool = False, seed: int = 0) -> Path:
    """Runs the demo in ``folder`` (or goes on with it) and returns the path of its report.

    Five hospitals, or six with ``hard_site``, train by FedSegNet, and each alone for comparison. Raises Problem where
    the folder holds another run.
    """
    free(folder, resume=True)
    data = folder / "hospitals"
    with as_file(files("fedscan.data") / "assets" / "demo.toml") as path:
        file = load(path, [f"seed={seed}"], data)
    suits(file, folder, How())
    print(f"{HONESTY} Nothing is downloaded.", flush=True)
    if not (data / "cases.csv").exists():
        with writing(folder, "--out"):
            write_hospitals(data, seed, hard_site)
    elif set(read_manifest(data).sites) != {hospital.name for hospital in hospitals(hard_site=hard_site)}:
        raise Problem(f"{folder} holds the demo with other hospitals; choose another folder with --out")
    cases = prepared(file, How(cache=folder / "cache"))
    with Show(cases.rows, file.rounds, title=file.name) as show:
        how = How(resume=True, workers=min(2, os.cpu_count() or 1), cache=folder / "cache", watch=show,
                  command=command(hard_site, seed))  # fmt: skip
        return launch(file, folder, how, cases)


def command(hard_site: bool, seed: int) -> str:
    """What makes the same demo again."""
    return "fedscan demo" + " --hard-site" * hard_site + f" --seed {seed}" * bool(seed)
