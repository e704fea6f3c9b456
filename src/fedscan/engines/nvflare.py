"""The NVFlare engine: NVFlare's server and clients carry sealed bytes between `serve` and the `join` of each site.

Each member makes NVFlare's start-up folder for itself, from the identity that the consortium gave it: the same P-256
key and certificate speak mutual TLS and answer NVFlare's own challenge. So no kit is sent and no key leaves its owner.
A site opens one connection, outwards. No jobs run: the couriers (``nvflare_courier``) are components of NVFlare's
server and clients, so a process that was killed carries again as soon as it is back, and nothing has to be submitted.

This module needs the standard library only. NVFlare may be installed in an environment of its own; it wants neither
torch nor fedscan's other requirements.
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
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

from fedscan import __version__
from fedscan.engines.doors import MOST_BODY, Lost, Relayed

MEMBER, LOCK, OWNER, HEARD, SAID = "member.json", "lock", "owner", "heard", "said.txt"
COURIER = "fedscan.engines.nvflare_courier"
INSTALL = "python -m venv .venv-nvflare && .venv-nvflare/bin/pip install 'nvflare>=2.9,<2.10' && \
.venv-nvflare/bin/pip install --no-deps fedscan"
KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")  # of the environment; anything else is no business of it

LINE = {
    "allow_adhoc_conns": False,  # one connection for each site, to the coordinator
    "backbone_conn_gen": 2,
    # A door on loopback that NVFlare opens for jobs, of which there are none: to be opened with a certificate only.
    "internal": {"scheme": "tcp", "resources": {"host": "localhost", "connection_security": "mtls"}},
    "streaming_max_blob_size": MOST_BODY,
    "heartbeat_interval": 15,
    "sfm_close_stalled_connection": True,
    "streaming_retry_wait": 60,  # seconds; on a slow line NVFlare would send again what is still on its way
    "streaming_retry_timeout": 120,
}
ONLY_COURIERS = {"format_version": 2, "class_list_enforcement_mode": "enforce", "class_allow_list": [COURIER]}
RIGHTS = {  # of NVFlare's own roles of people: none commands a member's process from afar
    "format_version": "1.0",
    "permissions": dict.fromkeys(("project_admin", "org_admin", "lead", "member"), "none"),
}
LOG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {
        "file": {
            "class": "logging.handlers.RotatingFileHandler",
            "formatter": "line",
            "filename": "log.txt",
            "maxBytes": 4 << 20,
            "backupCount": 2,
        }
    },
    "loggers": {"root": {"level": "INFO", "handlers": ["file"]}},
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
    def consortium(self) -> str: ...
    def identity(self) -> object:
        """Who this is. Raises ValueError where certificate, root and roster do not agree."""
        ...


def coordinator(home: Home, folder: Path, port: int, host: str = "0.0.0.0") -> "Engine":
    """Makes the start-up folder of NVFlare's server, from the identity in the coordinator's member's folder.

    Sites reach it on ``port``; a ``host`` of this machine only ("localhost") lets in nobody from elsewhere. While it
    runs, ``doors.Relayed(folder)`` carries. Raises ValueError for an identity that cannot serve.
    """
    if home.role != "coordinator":
        raise ValueError(f"{home.folder} is the folder of a {home.role}: only a coordinator can serve")
    server = {
        "name": home.consortium,
        # atcp, not tcp: NVFlare's tcp listener waits for one silent caller's handshake, and lets in nobody meanwhile.
        "service": {"target": f"{host}:{port}", "scheme": "atcp"},
        "max_num_clients": 1000,
        "admin_storage": "transfer",
        **credentials(home),
    }
    resources = {"servers": [{"admin_storage": "transfer"}], "components": [component("AtCoordinator", folder)]}
    startup = {"format_version": 2, "servers": [server]}
    return written(home, folder, port, {"startup/fed_server.json": startup, "local/resources.json": resources})


def site(home: Home, folder: Path, server: str, identity: str, door: Path) -> "Engine":
    """Makes the start-up folder of NVFlare's client, from the identity in a site's member's folder.

    ``server`` is where the coordinator listens ("fl.hospital.org:8002"), ``identity`` the coordinator's name in the
    consortium, ``door`` the folder in which the site's ``join`` keeps its door. Raises ValueError.
    """
    if home.name == "server":
        raise ValueError("a site of the name 'server' cannot use NVFlare, which calls its own server so")
    if not server.rpartition(":")[0] or not server.rpartition(":")[2].isdecimal():
        raise ValueError(f"{server!r} is not an address and a port, as in 'fl.hospital.org:8002'")
    service = {"target": server, "scheme": "tcp"}
    startup = {
        "format_version": 2,
        "servers": [{"name": home.consortium, "service": service, "identity": identity}],
        "client": {"fqsn": home.name, "is_leaf": True, **credentials(home)},
    }
    resources = {"client": {"retry_timeout": 30}, "components": [component("AtSite", door)]}
    return written(home, folder, 0, {"startup/fed_client.json": startup, "local/resources.json": resources})


def credentials(home: Home) -> dict[str, str]:
    """The files of a member's identity, where they lie: nothing is copied. Raises ValueError where one is missing."""
    home.identity()
    names = {"ssl_private_key": "key.pem", "ssl_cert": "certificate.pem", "ssl_root_cert": "root.pem"}
    files = {key: str((home.folder / name).resolve()) for key, name in names.items()}
    return {**files, "connection_security": "mtls"}


def component(courier: str, door: Path) -> dict[str, Any]:
    """The line by which NVFlare makes a courier one of its own components."""
    return {"id": "courier", "path": f"{COURIER}.{courier}", "args": {"folder": str(door.resolve())}}


def written(home: Home, folder: Path, port: int, files: dict[str, dict[str, Any]]) -> "Engine":
    """Writes the start-up folder; ends a process that still runs with another one."""
    files["local/resources.json"] |= ONLY_COURIERS
    files |= {"local/comm_config.json": LINE, "local/authorization.json": RIGHTS, "local/log_config.json": LOG}
    root = str((home.folder / "root.pem").resolve())
    member = {"name": home.name, "role": "server" if port else "client", "consortium": home.consortium, "root": root}
    text = json.dumps({**member, "port": port, "version": __version__, "files": files}, indent=1)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / MEMBER).exists() or (folder / MEMBER).read_text() != text:
        Engine(folder).stop()
    for name, content in files.items():
        (folder / name).parent.mkdir(mode=0o700, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1))
    (folder / MEMBER).write_text(text)
    return Engine(folder)


class Engine:
    """NVFlare's process of one member: started, watched while this context lasts, and ended with it.

    A process that dies is started again. One that outlives its owner (who was killed) is taken over by the next; if
    none comes, it ends itself after ten minutes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._left = folder, threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Starts it, or takes it over. Raises ValueError without NVFlare, or where the port is another's."""
        python()
        port = json.loads((self.folder / MEMBER).read_text())["port"]
        if port and not self.running():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                raise ValueError(f"port {port} of this machine is in use by another process: choose another port")
        self._left.clear()
        (self.folder / HEARD).unlink(missing_ok=True)
        (self.folder / OWNER).write_text(str(os.getpid()))
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
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # so that two who ask are not in each other's way
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(handle)

    def stop(self, seconds: float = 5.0) -> None:
        """Ends the process, at once where it does not go within ``seconds``."""
        self._left.set()
        until = time.monotonic() + seconds
        while (running := self.running()) or (self._watcher is not None and self._watcher.is_alive()):
            with suppress(OSError, ValueError):  # gone meanwhile, or not far enough to have said which it is
                if running:
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
        root = json.loads((self.folder / MEMBER).read_text())["root"]
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        # Where NVFlare lets OpenSSL add the authorities that the machine believes in, the consortium's root is all.
        environment |= {"SSL_CERT_FILE": root, "SSL_CERT_DIR": str(self.folder / "none")}
        environment |= {"HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        (self.folder / LOCK).write_text("")  # else whoever reads it too soon finds a process of former times
        with (self.folder / SAID).open("ab") as said:
            return subprocess.Popen(
                [python(), "-m", COURIER, str(self.folder.resolve())],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip


def python() -> str:
    """The Python that has NVFlare: $FEDSCAN_NVFLARE_PYTHON, .venv-nvflare beside this environment, or this one.

    Raises ValueError where there is none.
    """
    beside = Path(sys.prefix).parent / ".venv-nvflare" / "bin" / "python"
    told = os.environ.get("FEDSCAN_NVFLARE_PYTHON") or (str(beside) if beside.exists() else "")
    if told and not Path(told).exists():
        raise ValueError(f"FEDSCAN_NVFLARE_PYTHON names {told}, which does not exist")
    if not told and importlib.util.find_spec("nvflare") is None:
        raise ValueError(f"NVFlare is not installed: {INSTALL}")
    return told or sys.executable


def connected(folder: Path) -> list[str]:
    """The sites that are connected with the coordinator's NVFlare server now; none while it starts."""
    try:
        return list(json.loads(Relayed(folder).call("", b"", 2.0)))
    except Lost:
        return []


def heard(folder: Path) -> float | None:
    """The seconds since the coordinator last answered a site's NVFlare client, at most 5 s where all is well.

    None where it has not yet.
    """
    path = folder / HEARD
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else None
