"""Runs Flower's own way to the same work: a SuperLink and four SuperNodes with TLS on loopback, and an app on them."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from hospitals_work import SITES, note

APP = """[project]
name = "workload"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "hospitals_flower_app:server"
clientapp = "hospitals_flower_app:client"
[tool.flwr.app.config]
rounds = {rounds}
case = "{case}"
folder = "{folder}"
"""
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}  # fmt: skip


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A root, and the SuperLink's certificate and key for localhost."""
    ca, key, cert = folder / "ca.crt", folder / "server.key", folder / "server.crt"
    key_of = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    (folder / "san.cnf").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    commands: list[list[str | Path]] = [
        ["req", "-x509", *key_of, "-subj", "/CN=workload", "-keyout", folder / "ca.key", "-out", ca],
        ["req", *key_of, "-subj", "/CN=localhost", "-keyout", key, "-out", folder / "server.csr"],
        ["x509", "-req", "-in", folder / "server.csr", "-CA", ca, "-CAkey", folder / "ca.key", "-CAcreateserial",
         "-extfile", folder / "san.cnf", "-out", cert],
    ]  # fmt: skip
    for command in commands:
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return ca, cert, key


def run(folder: Path, binaries: Path, case: str, rounds: int, port: int) -> None:
    """The whole of it; what it says is in ``folder``. Certificates are made before the time is taken."""
    app, home = folder / "app", folder / "flwr"
    app.mkdir(parents=True)
    home.mkdir()
    shutil.copy(Path(__file__).with_name("hospitals_flower_app.py"), app)
    (app / "pyproject.toml").write_text(APP.format(case=case, rounds=rounds, folder=folder))
    ca, cert, key = certificates(folder)
    address = f"localhost:{port}"
    at = f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "{address}"\nroot-certificates = "{ca}"\n'
    (home / "config.toml").write_text(at)
    env = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": f"{binaries}:{os.environ['PATH']}"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    link: list[object] = ["flower-superlink", "--ssl-ca-certfile", ca, "--ssl-certfile", cert, "--ssl-keyfile", key,
            "--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]  # fmt: skip
    nodes: list[list[object]] = [
        ["flower-supernode", "--root-certificates", ca, "--superlink", address, "--host", "127.0.0.1", "--port",
         str(port + 1 + site), "--node-config", f"partition-id={site} num-partitions={SITES}"]
        for site in range(SITES)
    ]  # fmt: skip
    with ExitStack() as stack:

        def start(number: int, name: str, *more: object) -> None:
            log = stack.enter_context((folder / f"log-{number}.txt").open("wb"))
            program = [str(binaries / name), *map(str, more)]
            process = subprocess.Popen(program, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)

        note(what="begins")
        note(what="starts")
        for number, (name, *more) in enumerate([link, *nodes]):
            start(number, str(name), *more)
        order = [str(binaries / "flwr"), "run", str(app), "bench", "--stream"]
        until = time.monotonic() + 120
        done = waiting(lambda: subprocess.run(order, env=env, capture_output=True, text=True), until)
        (folder / "log-run.txt").write_text(done.stdout + done.stderr)
        note(what="ends", model=(folder / "model.npz").stat().st_mtime)


def waiting(call: Callable[[], "subprocess.CompletedProcess[str]"], until: float) -> "subprocess.CompletedProcess[str]":
    """Calls until it succeeds: the SuperLink may not be up yet."""
    while (done := call()).returncode and time.monotonic() < until:
        time.sleep(0.2)
    if done.returncode:
        raise RuntimeError(json.dumps({"stdout": done.stdout[-1500:], "stderr": done.stderr[-1500:]}))
    return done
