"""A study between four hospitals, end to end: fedscan against a peer's own way to the same work, in one run.

    python benchmarks/hospitals.py --engine nvflare --peer-python PATH     against NVFlare's FedAvg recipe
    python benchmarks/hospitals.py --engine flower --peer-python PATH      against a ServerApp of Flower

ours   `fedscan join` at four hospitals and `fedscan serve`, over the engine, with mutual TLS, signatures, the journal
       on disk, and the report at the end
peer   NVFlare: FedAvgRecipe in a PocEnv (mutual TLS; ``peer-sim``: in its simulator, without); Flower: FedAvg in a
       ServerApp, a SuperLink and four SuperNodes (TLS; the nodes are not authenticated)

Both train the same network from the same weights on the same batches of the same data, one thread a process. Turns
alternate in order. ``--peer-python`` is a Python with the engine, torch and MONAI. Each run is in a network of its own
(loopback only, where the system lets us), and a line of the file ``--results``: killed, the benchmark goes on.

Seconds of a run: ``found``, until the first process that takes part is started (fedscan: keys, certificates, scans
registered, every hospital's yes; NVFlare: its provisioning; Flower: nothing, its certificates are made before);
``start``, from then until the first hospital trains; ``round``, from one round's first training to the next one's,
median; from the start of the processes, ``trained`` until the last hospital has trained for the last time, ``whole``
until the last model lies at who asked for it, ``ended`` until the command comes back; ``all``: ``found`` and ``whole``.
``cpu``: processor seconds of all processes, that of ``found`` not among ours.
"""

import argparse
import ctypes
import itertools
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import hospitals_work
import workload

HERE = Path(__file__).parent
FIGURES = ("found", "start", "round", "trained", "whole", "ended", "all", "cpu")
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: who loses its parent becomes a child of this process, and is counted and ended


def one(asked: argparse.Namespace, folder: Path) -> None:
    """Carries out one run in this process, and prints its figures. Nothing that it has started outlives it."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    os.environ |= {hospitals_work.NOTES: str(folder / "notes"), "OMP_NUM_THREADS": "1"}
    try:
        if asked.one == "ours":
            import hospitals_ours

            hospitals_ours.run(folder / "ours", asked.engine, asked.case, asked.rounds, 8102)
        elif asked.engine == "flower":
            import hospitals_flower

            hospitals_flower.run(folder / "peer", asked.peer_python.parent, asked.case, asked.rounds, 8102)
        else:
            nvflare(asked, folder)
    finally:
        end_children()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({**figures(hospitals_work.notes(folder / "notes")), "cpu": used.ru_utime + used.ru_stime}))


def nvflare(asked: argparse.Namespace, folder: Path) -> None:
    """NVFlare's recipe, in a home of its own."""
    (folder / "home").mkdir()
    env = {
        **os.environ, "HOME": str(folder / "home"), "NVFLARE_POC_WORKSPACE": str(folder / "poc"),
        "PYTHONPATH": str(HERE), "PATH": f"{asked.peer_python.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    told = ["sim" if asked.one == "peer-sim" else "poc", asked.case, str(asked.rounds), str(folder)]
    script = HERE / "hospitals_nvflare.py"
    subprocess.run([str(asked.peer_python), str(script), *told], env=env, cwd=folder, stdout=sys.stderr, check=True)


def end_children() -> None:
    """Ends and counts every process that comes from this one."""
    until = time.monotonic() + 30
    while children := [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]:
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if time.monotonic() > until - 25 else signal.SIGTERM)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > until:
            raise RuntimeError(f"processes {children} do not end")
        time.sleep(0.05)


def figures(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and the loss of a run, from its notes."""
    at = {note["what"]: note["at"] for note in told}
    last = max(note["round"] for note in told if note["what"] == "epoch ends")
    begins = [
        min(n["at"] for n in told if n["what"] == "epoch begins" and n["round"] == r) for r in range(last + 1)
    ]  # fmt: skip
    losses = [n["loss"] for n in told if n["what"] == "epoch ends" and n["round"] == last]
    epochs = [n for n in told if n["what"] == "epoch ends"]
    model = next(note["model"] for note in told if note["what"] == "ends")
    trained = max(n["at"] for n in epochs)
    apart = [b - a for a, b in itertools.pairwise(begins)]
    return {
        "found": at["starts"] - at["begins"], "start": begins[0] - at["starts"],
        "round": statistics.median(apart) if apart else trained - begins[0], "whole": model - at["starts"],
        "trained": trained - at["starts"],
        "ended": at["ends"] - at["starts"], "all": model - at["begins"], "loss": statistics.mean(losses),
        "epochs": len(epochs),
    }  # fmt: skip


def tried(asked: argparse.Namespace, way: str) -> dict[str, Any]:
    """One run, tried several times: on a busy machine the engines give up by limits of their own."""
    for attempt in itertools.count(1):
        try:
            return {**measured(asked, way), "attempts": attempt}
        except (RuntimeError, subprocess.TimeoutExpired) as e:
            print(f"{way}, attempt {attempt}: {e}", file=sys.stderr, flush=True)
            if attempt == asked.attempts:
                raise SystemExit(1) from e
    raise AssertionError


def measured(asked: argparse.Namespace, way: str) -> dict[str, Any]:
    """One run in a process and a network of its own. Raises RuntimeError where it fails."""
    folder = Path(tempfile.mkdtemp(prefix="fedscan-hospitals-"))
    own = ["--engine", asked.engine, "--case", asked.case, "--rounds", str(asked.rounds), "--peer-python",
           str(asked.peer_python), "--one", way, "--folder", str(folder)]  # fmt: skip
    command = [sys.executable, __file__, *own]
    if alone := subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0:
        command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', *command]
    begun, load = time.time(), os.getloadavg()[0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=asked.most)
    except BaseException:
        process.terminate()
        process.wait(120)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if process.returncode:
        raise RuntimeError(f"it failed; what it said is in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    told = json.loads(said.splitlines()[-1])
    return {**told, "way": way, "at": begun, "load": [load, os.getloadavg()[0]], "own network": alone}


def spread(values: list[float]) -> list[float]:
    """Least, median and most."""
    return [round(f(values), 3) for f in (min, statistics.median, max)]


def table(rows: list[dict[str, Any]], ways: list[str]) -> dict[str, Any]:
    """Seconds of each way, and the ratio of each of our runs to the peer's of the same turn."""
    found: dict[str, Any] = {}
    for way in ways:
        mine = [row for row in rows if row["way"] == way]
        found[way] = {"runs": len(mine), "losses": sorted({round(row["loss"], 6) for row in mine})}
        found[way] |= {what: spread([row[what] for row in mine]) for what in FIGURES if mine}
    ours = {row["turn"]: row for row in rows if row["way"] == "ours"}
    for way in ways[1:]:
        pairs = [(ours[row["turn"]], row) for row in rows if row["way"] == way and row["turn"] in ours]
        found[f"ours / {way}"] = {
            what: spread([a[what] / b[what] for a, b in pairs]) for what in FIGURES if all(b[what] for _, b in pairs)
        } if pairs else {}  # fmt: skip
    found["load"] = spread([load for row in rows for load in row["load"]])
    return found


def main() -> None:
    """Measures what is lacking in the results, and prints the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["nvflare", "flower"], default="nvflare")
    parser.add_argument("--case", choices=list(workload.CASES), default="unet")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sim", action="store_true", help="NVFlare's simulator too")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable), metavar="PATH")
    parser.add_argument("--results", type=Path, default=Path("hospitals.jsonl"))
    parser.add_argument("--most", type=float, default=600.0, help="seconds that a run may take")
    parser.add_argument("--attempts", type=int, default=3, help="of a run that fails")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if asked.one:
        one(asked, asked.folder)
        return
    ways = ["ours", "peer", *(["peer-sim"] if asked.sim and asked.engine == "nvflare" else [])]
    same = {"engine": asked.engine, "case": asked.case, "rounds": asked.rounds}

    def kept() -> list[dict[str, Any]]:
        lines = asked.results.read_text().splitlines() if asked.results.exists() else []
        return [row for row in map(json.loads, lines) if same.items() <= row.items()]

    for turn in range(asked.turns):
        done = {row["way"] for row in kept() if row["turn"] == turn}
        for way in ways if turn % 2 == 0 else ways[::-1]:
            if way not in done:
                row = {**same, "turn": turn, **tried(asked, way)}
                with asked.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), file=sys.stderr, flush=True)
    for what, found in {**same, **table(kept(), ways)}.items():
        print(f"{what}: {json.dumps(found)}")


if __name__ == "__main__":
    main()
