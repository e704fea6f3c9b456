"""The process that keeps Flower's others of one member running, in Flower's environment.

At the coordinator: the gate, the SuperLink, and a run of the app that brings requests. At a site: the gate, the
SuperNode, and what starts its app quickly. What dies is started again; all of it ends together.
"""

import ctypes
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedscan.engines.doors import FILE, Door, Lost
from fedscan.engines.flower import DOOR, GATE, KEEPER, MEMBER
from fedscan.engines.flower_gate import Front, Gate, SiteGate, certified, connected, to_coordinator
from fedscan.engines.flower_wire import CHUNK
from fedscan.engines.kept import HEARD, ORPHANED, free_port, lock_for_life, owned, write

MOST_LOG = 4 << 20
PIPE = "FEDSCAN_FLOWER_PIPE"
CHUNKS = {"FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(CHUNK)}
QUICKLY = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}  # at a site, where each message is a task
APP = """[project]
name = "fedscan-relay"
version = "1.0.0"
description = "Brings fedscan's sealed messages; holds no code."
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]

[tool.flwr.app]
publisher = "fedscan"

[tool.flwr.app.components]
serverapp = "fedscan.engines.flower_apps:server"
clientapp = "fedscan.engines.flower_apps:client"
"""
CONNECTION = """[superlink]
default = "gate"

[superlink.gate]
address = "127.0.0.1:{port}"
insecure = true
"""
QUICK = '#!/bin/sh\nIFS=$(printf "\\037")\nprintf "%s\\n" "$*" > "$FEDSCAN_FLOWER_PIPE"\n'


class Kept:
    """A process that is started again when it has died, at once if it had lived for some time."""

    def __init__(self, name: str, command: list[str], folder: Path, env: Mapping[str, str]) -> None:
        self.name, self.folder, self.env = name, folder, env
        self.command = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
        self.process: subprocess.Popen[bytes] | None = None
        self._begun, self._pause = float("-inf"), 0.5

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def died(self) -> bool:
        """Whether it has ended by itself."""
        return self.process is not None and self.process.poll() is not None

    def tend(self) -> bool:
        """Starts it if it does not run; says whether it did so."""
        now = time.monotonic()
        if self.runs or now < self._begun + self._pause:
            return False
        self._pause = min(2 * self._pause, 10.0) if now - self._begun < 20.0 else 0.5
        self._begun = now
        path = self.folder / "log" / f"{self.name}.txt"
        path.parent.mkdir(exist_ok=True)
        if path.exists() and path.stat().st_size > MOST_LOG:
            path.replace(path.with_suffix(".old.txt"))
        with path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, cwd=self.folder,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        return True

    def stop(self, seconds: float = 5.0) -> None:
        """Ends it, and what it started in its group."""
        if self.process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self.process = None


class Pair:
    """A SuperLink or a SuperNode, and the process that starts its apps; the second is no use without the first."""

    def __init__(self, name: str, command: list[str], port: int, folder: Path, env: Mapping[str, str]) -> None:
        self.first = Kept(name, command, folder, env)
        starter = ["flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
        self.second = Kept(f"{name}-apps", starter, folder, env)

    def tend(self) -> bool:
        """Starts what does not run; says whether the first was started."""
        begun = self.first.tend()
        if begun:
            self.second.stop(1.0)  # it would find the new one much later
        self.second.tend()
        return begun

    def stop(self) -> None:
        """Ends both."""
        self.first.stop()
        self.second.stop()


class AtCoordinator:
    """The coordinator's end: gate, SuperLink, and the run whose app brings requests."""

    def __init__(self, folder: Path, told: Mapping[str, Any]) -> None:
        self.folder, self.port, self.app = folder, free_port(), Path(told["door"]) / FILE
        self.front = Front(told["sites"])
        self.gate = Gate(
            (told["listen"][0], told["listen"][1]), lambda: connected(("127.0.0.1", self.port)),
            context=certified(Path(told["home"]), server=True), who=self.front.who, held=self.front.held,
        )  # fmt: skip
        self.inner = Door(made(folder / "gate"), self._answer)
        write(folder / "flwr" / "config.toml", CONNECTION.format(port=self.port))
        write(folder / "app" / "pyproject.toml", APP)
        env = {
            **os.environ,
            **CHUNKS,
            DOOR: told["door"],
            GATE: str(folder / "gate"),
            "FLWR_HOME": str(folder / "flwr"),
        }
        link = ["flower-superlink", "--disable-runtime-dependency-installation", *inside(self.port)]
        self.link = Pair("superlink", link, self.port, folder, env)
        self.run = Kept("run", ["flwr", "run", str(folder / "app"), "gate"], folder, env)
        self._seen, self._patience = False, 0.0

    def tend(self, told: Mapping[str, Any]) -> None:
        """Starts what does not run; the run is submitted again where nobody is behind its app's door."""
        self.front.members = told["sites"]
        if self.link.tend():
            self._lose_app()
        if opened(self.app):
            self._seen = True
        elif self._seen:
            self._lose_app()
        elif not self.run.runs and time.monotonic() > self._patience and self._healthy() and self.run.tend():
            self._patience = time.monotonic() + 30.0  # in which the app has to open its door

    def _lose_app(self) -> None:
        """The app has died. So must the nodes: half of a message may have reached them, and they wait for the rest."""
        self.front.forget()
        self._end_app()
        self._seen, self._patience = False, 0.0

    def _end_app(self) -> None:
        """Ends an app whose SuperLink has died or is about to: it would try for a minute to tell it that it ends."""
        if opened(self.app):
            with suppress(OSError, ValueError, KeyError):
                os.kill(int(json.loads(self.app.read_text())["pid"]), signal.SIGKILL)
        self.app.unlink(missing_ok=True)

    def _healthy(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2.0) as answer:
            return int(answer.status) == 200
        return False

    def _answer(self, header: dict[str, Any], body: bytes) -> bytes:
        """What the app asks the gate."""
        match header:
            case {"act": "sent", "site": str(site)}:
                self.front.sent(site)
                return b""
            case {"act": "since", "news": int(news), "seconds": float(seconds)}:
                return json.dumps(self.front.since(news, seconds)).encode()
        raise Lost("the gate does not know what is asked")

    def close(self) -> None:
        """Ends all of it."""
        self.gate.close()
        self.run.stop()
        self._end_app()
        self.link.stop()


class AtSite:
    """A site's end: gate, SuperNode, and a process that has Flower's client loaded and forks it for each message."""

    def __init__(self, folder: Path, told: Mapping[str, Any]) -> None:
        dial = to_coordinator((told["dial"][0], told["dial"][1]), told["identity"], certified(Path(told["home"])))
        self.gate = SiteGate(("127.0.0.1", 0), dial, without_code)
        self.heard, self._told = folder / HEARD, 0.0
        pipe = folder / "pipe"
        with suppress(FileExistsError):
            os.mkfifo(pipe, 0o600)
        write(folder / "bin" / "flwr-clientapp", QUICK, 0o700)
        env = {
            **os.environ, **CHUNKS, **QUICKLY, DOOR: told["door"], PIPE: str(pipe), "FLWR_HOME": str(folder / "flwr"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        self.quick = Kept("client", ["python", "-m", KEEPER, "--quick", str(pipe)], folder, env)
        port = free_port()
        node = ["python", "-m", KEEPER, "--node", "--superlink", f"127.0.0.1:{self.gate.port}", *inside(port)]
        self.node = Pair("supernode", node, port, folder, env)

    def tend(self, told: Mapping[str, Any]) -> None:
        """Starts what does not run; notes when the coordinator was last heard."""
        if self.quick.died or self.node.second.died:
            self.node.stop()  # it might wait for ever for what an app that died with them was to say
        self.quick.tend()
        self.node.tend()
        if self.gate.used > self._told:
            self._told = self.gate.used
            self.heard.touch()

    def close(self) -> None:
        """Ends all of it."""
        self.node.stop()
        self.quick.stop()
        self.gate.close()


def without_code(answer: bytes) -> bool:
    """Whether a bundle that Flower brings holds no code, and names fedscan's own app as the one to run."""
    from flwr.proto.fab_pb2 import GetFabResponse  # type: ignore[import-not-found,unused-ignore]

    try:
        with zipfile.ZipFile(io.BytesIO(GetFabResponse.FromString(answer).fab.content)) as bundle:
            app = tomllib.loads(bundle.read("pyproject.toml").decode())
            return sorted(bundle.namelist()) == [".info/CONTENT", "pyproject.toml"] and app == tomllib.loads(APP)
    except Exception:  # parsers of hostile bytes raise many kinds
        return False


def start_quickly(pipe: Path) -> None:
    """Forks Flower's client, loaded once, for each line of arguments that comes through the pipe.

    Flower starts its command ``flwr-clientapp`` for every message, which takes more than a second of computing to load.
    What it finds under that name writes its arguments here instead.
    """
    (command,) = entry_points(group="console_scripts", name="flwr-clientapp")
    client = command.load()
    # The client speaks by httpcore, and would load it anew in each fork.
    import httpcore  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    from flwr.supercore.inflatable import inflatable_utils  # type: ignore[import-not-found,unused-ignore]

    import fedscan.engines.flower_apps  # noqa: F401

    # It is started while its node still fetches the message, and would sleep for seconds before it looks again.
    inflatable_utils.pull_and_inflate_object_from_tree.__kwdefaults__ |= {
        "initial_backoff": 0.05, "backoff_cap": 0.2, "max_tries_per_object": None,
    }  # fmt: skip
    gc.freeze()

    def reap(*_: object) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) not in (signal.SIGINT, signal.SIGTERM):
                    os._exit(1)  # Flower would wait a minute for what was killed: the keeper starts its node anew

    signal.signal(signal.SIGCHLD, reap)
    with os.fdopen(os.open(pipe, os.O_RDWR), "r") as lines:
        for line in lines:
            if os.fork() == 0:
                die_with_parent()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                sys.argv = ["flwr-clientapp", *line.rstrip("\n").split("\037")]
                client()
                sys.exit(0)


def run_node(arguments: list[str]) -> None:
    """Runs Flower's node, which looks for what an app has said twenty times a second, not twice."""
    from flwr.supernode import start_client_internal as node  # type: ignore[import-not-found,unused-ignore]

    (command,) = entry_points(group="console_scripts", name="flower-supernode")
    node.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10))
    sys.argv = ["flower-supernode", *arguments]
    command.load()()


def inside(port: int) -> list[str]:
    """Where a SuperLink or a SuperNode listens, and that others start its apps."""
    return ["--host", "127.0.0.1", "--port", str(port), "--insecure", "--isolation", "process"]


def made(folder: Path) -> Path:
    """A folder for its owner only."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def opened(path: Path) -> bool:
    """Whether somebody is behind a door: its file stays there for longer. Who is too busy to open is there."""
    try:
        port = int(json.loads(path.read_text())["port"])
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except TimeoutError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return True


def die_with_parent() -> None:
    """Has the kernel end this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def keep(folder: Path) -> None:
    """Keeps a member's processes running until it is told to end, or nobody has owned it for long."""
    lock_for_life(folder)
    ended, seen = threading.Event(), time.monotonic()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: ended.set())
    told = json.loads((folder / MEMBER).read_text())
    end = AtCoordinator(folder, told) if "listen" in told else AtSite(folder, told)
    try:
        while not ended.wait(0.25) and time.monotonic() < seen + ORPHANED:
            end.tend(json.loads((folder / MEMBER).read_text()))
            if owned(folder):
                seen = time.monotonic()
    finally:
        end.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--quick", pipe]:
            start_quickly(Path(pipe))
        case ["--node", *arguments]:
            run_node(arguments)
        case [folder]:
            keep(Path(folder))
