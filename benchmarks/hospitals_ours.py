"""fedscan between four hospitals on this machine: a consortium is founded, then `join` four times and `serve` run."""

import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import workload
from hospitals_work import SITES, note

NAMES = tuple(f"h{site}" for site in range(SITES))
HERE = Path(__file__).parent
POINTS = """\
[fedscan.models]
workload = hospitals_plugin:network
[fedscan.tasks]
workload = hospitals_plugin:work
[fedscan.methods]
workload = hospitals_plugin:method
"""
STUDY = """\
name = "workload"
[data]
sequences = ["t1"]
{grid}
normalise = "none"
fractions = [1, 0, 0]
augment = false
[task]
kind = "workload"
case = "{case}"
labels = {labels}
[model]
name = "workload"
case = "{case}"
[method]
name = "workload"
[train]
rounds = {rounds}
optimiser = "sgd"
lr = {lr}
batch = {batch}
[run]
every = 0
threads = 1
"""


def write_scans(folder: Path, case: str) -> None:
    """Each hospital's cases of the workload as NIfTI files, with a table of them."""
    import nibabel

    for site, name in enumerate(NAMES):
        own, rows = folder / name, ["case,subject,site,t1,label"]
        own.mkdir(parents=True)
        x, y = (array.numpy() for array in workload.site_data(case, site))
        for i in range(len(x)):
            image = x[i, 0] if case == "unet" else x[i]
            label = y[i, 0] if case == "unet" else np.full(image.shape, y[i] + 1)
            for what, array in (("t1", image), ("label", label.astype(np.uint8))):
                nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), own / f"{i:03}_{what}.nii")
            rows.append(f"{name}-{i:03},{name}-{i:03},{name},{i:03}_t1.nii,{i:03}_label.nii")
        (own / "cases.csv").write_text("\n".join(rows) + "\n")


def plug_in(folder: Path) -> None:
    """Lets this process, and those it starts, find the plug-in as if it were installed."""
    about = folder / "fedscan_workload-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fedscan-workload\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    os.environ["PYTHONPATH"] = f"{folder}:{HERE}"
    sys.path.append(str(folder))


def study(case: str, rounds: int) -> str:
    """The study's file."""
    size = workload.CASES[case]
    labels = ["ball = 1"] if case == "unet" else [f"digit{i} = {i + 1}" for i in range(10)]
    grid = "grid = [32, 32, 32]" if case == "unet" else 'spacing = "native"'
    return STUDY.format(
        case=case, rounds=rounds, lr=size.lr, batch=size.batch, labels=f"{{ {', '.join(labels)} }}", grid=grid
    )


def found(folder: Path, file: Path) -> None:
    """Keys, certificates, registered scans, and each hospital's yes to the study."""
    from fedscan.consortium import catalogue, coordinator, member
    from fedscan.consortium.demo import ALLOWS, admitted, agreed
    from fedscan.consortium.proposals import POLICY
    from fedscan.studyfile import load

    now = datetime.now(UTC)
    coordinator.found("workload", folder / "root", now)
    roles = {**dict.fromkeys(NAMES, "site"), "desk": "coordinator"}
    for home in [admitted(folder, name, role, folder / "root") for name, role in roles.items()]:
        member.take_roster(home, folder / "root" / coordinator.ROSTER)
    for name in NAMES:
        member.put(folder / name / POLICY, ALLOWS)
        catalogue.register(name, folder / "scans" / name, folder / name, now)
        agreed(folder / name, load(file))


def run(folder: Path, engine: str, case: str, rounds: int, port: int) -> None:
    """The whole of it; what it says is in ``folder``."""
    folder.mkdir(parents=True)
    write_scans(folder / "scans", case)
    plug_in(folder / "plug-in")
    (folder / "study.toml").write_text(study(case, rounds))
    note(what="begins")
    found(folder, folder / "study.toml")
    note(what="starts")
    python, at = [sys.executable, "-m", "fedscan"], f"localhost:{port}"
    over = ["--engine", engine]
    words = {
        name: ["join", "--folder", str(folder / name), *over, "--server", at, "--cache", str(folder / name / "cache")]
        for name in NAMES
    }
    words["desk"] = ["serve", str(folder / "study.toml"), "--folder", str(folder / "desk"), *over, "--listen", at,
                     "--out", str(folder / "run")]  # fmt: skip
    running = {}
    for name, command in words.items():
        with (folder / f"{name}.txt").open("w") as said:
            running[name] = subprocess.Popen([*python, *command], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    if running["desk"].wait():
        raise RuntimeError((folder / "desk.txt").read_text()[-2000:])
    note(what="ends", model=(folder / "run" / "model.safetensors").stat().st_mtime)
    for process in running.values():
        process.wait(60)


if __name__ == "__main__":
    begun = time.time()
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), 8002)
    print(f"{time.time() - begun:.1f} s")
