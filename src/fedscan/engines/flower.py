"""The Flower engine: a SuperLink and SuperNodes carry sealed bytes between `serve` and the `join` of each site.

Flower asks sites for no certificate, sends them code, and takes orders to run any on the port that sites use. So each
member's Flower speaks on loopback only, behind a gate (``flower_gate``): from gate to gate goes TLS 1.3 between the
certificates that the consortium gave, a site is known by its own, and neither orders nor code pass. Every member makes
its start-up folder for itself: no kit is sent and no key leaves its owner. A site opens connections outwards only.

This module needs the standard library only, and so does all of fedscan that runs in Flower's environment.
"""

import fcntl
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

from fedscan import __version__
from fedscan.engines.doors import Lost, Relayed

MEMBER, LOCK, OWNER, HEARD, SAID = "member.json", "lock", "owner", "heard", "said.txt"
DOOR, GATE = "FEDSCAN_FLOWER_DOOR", "FEDSCAN_FLOWER_GATE"  # folders, handed down from process to process
KEEPER = "fedscan.engines.flower_keeper"
INSTALL = "python -m venv .venv-flower && .venv-flower/bin/pip install 'flwr>=1.41,<1.43' && \
.venv-flower/bin/pip install --no-deps fedscan"
KEPT = ("LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "FLWR_LOG_LEVEL")  # of the environment
QUIET = {  # Flower calls nobody, and installs nothing
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
}


class Home(Protocol):
    """A member's folder, as ``consortium.member`` reads it."""

    @property
    def folder(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def roster(self) -> Any: ...
    def identity(self) -> object:
        """Who this is. Raises ValueError where certificate, root and roster do not agree."""
        ...


def coordinator(home: Home, folder: Path, port: int, host: str = "0.0.0.0") -> "Engine":
    """Makes the start-up folder of Flower's SuperLink, from the identity in the coordinator's member's folder.

    Sites reach its gate on ``port``, and are those of the roster that lies in ``home`` now: called again after a newer
    roster came, it changes whom a running engine lets in. A ``host`` of this machine only ("localhost") lets in nobody
    from elsewhere. While it runs, ``doors.Relayed(folder)`` carries. Raises ValueError for an identity that cannot
    serve.
    """
    if home.role != "coordinator":
        raise ValueError(f"{home.folder} is the folder of a {home.role}: only a coordinator can serve")
    sites = {found.certificate: found.name for found in home.roster.members.values() if found.role == "site"}
    return written(home, folder, {"listen": [host, port], "door": str(folder.resolve())}, sites)


def site(home: Home, folder: Path, server: str, identity: str, door: Path) -> "Engine":
    """Makes the start-up folder of Flower's SuperNode, from the identity in a site's member's folder.

    ``server`` is where the coordinator's gate listens ("fl.hospital.org:8002"), ``identity`` the coordinator's name in
    the consortium, ``door`` the folder in which the site's ``join`` keeps its door. Raises ValueError.
    """
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{server!r} is not an address and a port, as in 'fl.hospital.org:8002'")
    return written(home, folder, {"dial": [host, int(port)], "identity": identity, "door": str(door.resolve())}, {})


def written(home: Home, folder: Path, told: dict[str, Any], sites: Mapping[str, str]) -> "Engine":
    """Writes the start-up folder; ends a process that still runs with another one."""
    home.identity()
    told |= {"home": str(home.folder.resolve()), "version": __version__}
    path = folder / MEMBER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    if {**before, "sites": {}} != {**told, "sites": {}}:
        Engine(folder).stop()
    write(path, json.dumps({**told, "sites": dict(sites)}, indent=1))
    return Engine(folder)


class Engine:
    """Flower's processes of one member: started, watched while this context lasts, and ended with it.

    One process keeps the others (``flower_keeper``). If it dies they die with it, and all are started again. One that
    outlives its owner (who was killed) is taken over by the next; if none comes, it ends itself after ten minutes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._left = folder, threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Starts it, or takes it over. Raises ValueError without Flower, or where the port is another's."""
        python()
        port = json.loads((self.folder / MEMBER).read_text()).get("listen", ["", 0])[1]
        if port and not self.running():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                raise ValueError(f"port {port} of this machine is in use by another process: choose another port")
        self._left.clear()
        (self.folder / HEARD).unlink(missing_ok=True)
        write(self.folder / OWNER, str(os.getpid()))
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def running(self) -> bool:
        """Whether the process is there: it holds the lock of its folder."""
        if self._process is not None and self._process.poll() is None:
            return True
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(handle)

    def stop(self, seconds: float = 20.0) -> None:
        """Ends all processes, at once where they do not go within ``seconds``."""
        self._left.set()
        until = time.monotonic() + seconds
        while self.running() or (self._watcher is not None and self._watcher.is_alive()):
            with suppress(OSError, ValueError):  # gone meanwhile, or not far enough to have said which it is
                os.kill(self.pid(), signal.SIGTERM if time.monotonic() < until else signal.SIGKILL)
            time.sleep(0.1)

    def pid(self) -> int:
        """The process that holds the lock. Raises ValueError where none has written it yet."""
        if self._process is not None and self._process.poll() is None:
            return self._process.pid
        return int((self.folder / LOCK).read_text())

    def _watch(self) -> None:
        pause = 0.5
        while not self._left.is_set():
            if not self.running():
                begun = time.monotonic()
                self._process = self._started()
                self._process.wait()
                pause = 0.5 if time.monotonic() - begun > 20 else min(30.0, 2 * pause)
            self._left.wait(pause)

    def _started(self) -> "subprocess.Popen[bytes]":
        interpreter = python()
        environment = QUIET | {name: os.environ[name] for name in KEPT if name in os.environ}
        path = f"{Path(interpreter).parent}:/usr/local/bin:/usr/bin:/bin"
        environment |= {"PATH": path, "HOME": str(self.folder.resolve()), "OMP_NUM_THREADS": "1"}
        with (self.folder / SAID).open("ab") as said:
            return subprocess.Popen(
                [interpreter, "-m", KEEPER, str(self.folder.resolve())],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip


def python() -> str:
    """The Python that has Flower: $FEDSCAN_FLOWER_PYTHON, .venv-flower beside this environment, or this one.

    Raises ValueError where there is none.
    """
    beside = Path(sys.prefix).parent / ".venv-flower" / "bin" / "python"
    told = os.environ.get("FEDSCAN_FLOWER_PYTHON") or (str(beside) if beside.exists() else "")
    if told and not Path(told).exists():
        raise ValueError(f"FEDSCAN_FLOWER_PYTHON names {told}, which does not exist")
    if not told and importlib.util.find_spec("flwr") is None:
        raise ValueError(f"Flower is not installed: {INSTALL}")
    return told or sys.executable


def connected(folder: Path) -> list[str]:
    """The sites whose nodes are at the coordinator's gate now; none while it starts."""
    try:
        return list(json.loads(Relayed(folder).call("", b"", 2.0)))
    except Lost:
        return []


def heard(folder: Path) -> float | None:
    """The seconds since the coordinator last answered a site's node, at most 25 s where all is well.

    None where it has not yet.
    """
    path = folder / HEARD
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else None


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Writes a file whole, for its owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    partial.replace(path)
