"""An engine's process of one member: started, watched, started again where it dies, and ended with its owner.

It is a process of its own, in the engine's own environment, so that ``serve`` or ``join`` can be killed and started
again without it. It holds the lock of its folder as long as it lives, and says in it which process it is. This module
needs the standard library only.
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
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

from fedscan.engines import alone
from fedscan.engines.doors import Lost, Relayed

LOCK, OWNER, HEARD, SAID = "lock", "owner", "heard", "said.txt"
ORPHANED = 600.0  # seconds after which a process that nobody owns ends itself
LAST = 10.0  # seconds after which a process that cannot be ended is left: it ends itself once nobody owns it


class Home(Protocol):
    """A member's folder, as ``consortium.member`` reads it."""

    @property
    def folder(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def consortium(self) -> str: ...
    @property
    def roster(self) -> Any: ...
    def identity(self) -> object:
        """Who this is. Raises ValueError where certificate, root and roster do not agree."""
        ...


class Kept(ABC):
    """A process that is kept while this context lasts.

    One that outlives its owner (who was killed) is taken over by the next; if none comes, it ends itself after ten
    minutes.
    """

    seconds = 5.0  # that it is given to end by itself

    def __init__(self, folder: Path) -> None:
        self.folder, self._left = folder, threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What starts it. Raises ValueError where the engine is not installed."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """All that it is started with."""

    @abstractmethod
    def port(self) -> int:
        """The port that it listens on; 0 for none."""

    def __enter__(self) -> Self:
        """Starts it, or takes it over. Raises ValueError without the engine, or where the port is another's."""
        self.command()
        port = self.port()
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
        return alone.held(self.folder / LOCK)

    def stop(self, seconds: float | None = None) -> None:
        """Ends the process, at once where it does not go within ``seconds``; one that stays all the same is left."""
        self._left.set()
        until = time.monotonic() + (self.seconds if seconds is None else seconds)
        while (running := self.running()) or (self._watcher is not None and self._watcher.is_alive()):
            if time.monotonic() > until + LAST:
                self._say("it could not be ended, and is left to itself")
                return
            with suppress(OSError, ValueError):  # gone meanwhile, or not far enough to have said which it is
                if running:
                    os.kill(self.pid(), signal.SIGTERM if time.monotonic() < until else signal.SIGKILL)
            time.sleep(0.1)

    def pid(self) -> int:
        """The process that holds the lock. Raises ValueError where none does, or none has written it yet."""
        if self._process is not None and self._process.poll() is None:
            return self._process.pid
        return alone.holder(self.folder / LOCK)

    def _watch(self) -> None:
        pause = 0.5
        while not self._left.is_set():
            begun = time.monotonic()
            try:
                if not self.running():
                    self._process = self._started()
                    self._process.wait()
                    pause = 0.5 if time.monotonic() - begun > 20 else min(30.0, 2 * pause)
            except (OSError, ValueError) as e:  # no memory, no files left, the engine being installed anew
                self._say(f"it could not be started: {e}")
                pause = min(30.0, 2 * pause)
            self._left.wait(pause)

    def _started(self) -> "subprocess.Popen[bytes]":
        with suppress(ValueError):  # another one holds it, and what it says is true
            alone.hold(self.folder / LOCK, "", text="").close()  # else who reads it too soon finds one of former times
        with (self.folder / SAID).open("ab") as said:
            return subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=self.environment(),
                cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    def _say(self, sentence: str) -> None:
        with suppress(OSError), (self.folder / SAID).open("a", encoding="utf-8") as said:
            said.write(f"fedscan: {sentence}\n")


def lock_for_life(folder: Path) -> None:
    """Holds the lock of a folder until this process ends, and says in it which one it is.

    For the process that is kept. It ends here where another one holds the lock, and does not just ask who does.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    signal.alarm(5)
    fcntl.flock(handle, fcntl.LOCK_EX)
    signal.alarm(0)
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())


def owned(folder: Path) -> bool:
    """Whether the process (``serve`` or ``join``) that started the one of this folder, or took it over, still runs."""
    with suppress(OSError, ValueError):
        os.kill(int((folder / OWNER).read_text()), 0)
        return True
    return False


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def interpreter(engine: str, package: str, wanted: str) -> str:
    """The Python that has an engine: $FEDSCAN_<ENGINE>_PYTHON, .venv-<engine> beside this environment, or this one.

    Raises ValueError where there is none, with what installs ``wanted``.
    """
    name = engine.lower()
    variable = f"FEDSCAN_{engine.upper()}_PYTHON"
    beside = Path(sys.prefix).parent / f".venv-{name}" / "bin" / "python"
    told = os.environ.get(variable) or (str(beside) if beside.exists() else "")
    if told and not Path(told).exists():
        raise ValueError(f"{variable} names {told}, which does not exist")
    if not told and importlib.util.find_spec(package) is None:
        place = f".venv-{name}"
        raise ValueError(
            f"{engine} is not installed: python -m venv {place} && {place}/bin/pip install '{wanted}' && "
            f"{place}/bin/pip install --no-deps fedscan"
        )
    return told or sys.executable


def sites_connected(folder: Path) -> list[str]:
    """The sites that are connected with the coordinator's engine now; none while it starts."""
    try:
        return list(json.loads(Relayed(folder).call("", b"", 2.0)[:]))
    except Lost:
        return []


def heard(folder: Path) -> float | None:
    """The seconds since the coordinator last answered a site's engine; None where it has not yet."""
    path = folder / HEARD
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else None


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Writes a file whole, for its owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    partial.replace(path)
