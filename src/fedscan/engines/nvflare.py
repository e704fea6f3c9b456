"""The NVFlare engine: NVFlare's server and clients carry sealed bytes between `serve` and the `join` of each site.

Each member makes NVFlare's start-up folder for itself, from the identity that the consortium gave it: the same P-256
key and certificate speak mutual TLS and answer NVFlare's own challenge. So no kit is sent and no key leaves its owner.
A site opens one connection, outwards. No jobs run: the couriers (``nvflare_courier``) are components of NVFlare's
server and clients, so a process that was killed carries again as soon as it is back, and nothing has to be submitted.

This module needs the standard library only. NVFlare may be installed in an environment of its own; it wants neither
torch nor fedscan's other requirements.
"""

import json
import os
from pathlib import Path
from typing import Any

from fedscan import __version__
from fedscan.engines.doors import MOST_BODY, Manner
from fedscan.engines.kept import Home, Kept, interpreter

MEMBER = "member.json"
MANNER = Manner(part=16 << 20, flight=2)
LEAN = {  # what glibc keeps of parts that are free again; by itself it would keep more and more
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
COURIER = "fedscan.engines.nvflare_courier"
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


class Engine(Kept):
    """NVFlare's process of one member."""

    def command(self) -> list[str]:
        """What starts it. Raises ValueError where NVFlare is not installed."""
        return [python(), "-m", COURIER, str(self.folder.resolve())]

    def environment(self) -> dict[str, str]:
        """Where NVFlare lets OpenSSL add the authorities that the machine believes in, the consortium's root is all."""
        trust = {"SSL_CERT_FILE": json.loads((self.folder / MEMBER).read_text())["root"],
                 "SSL_CERT_DIR": str(self.folder / "none")}  # fmt: skip
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        return {**kept, **trust, **LEAN, "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}

    def port(self) -> int:
        """The coordinator's port; a site has none."""
        return int(json.loads((self.folder / MEMBER).read_text())["port"])


def python() -> str:
    """The Python that has NVFlare, see ``kept.interpreter``."""
    return interpreter("NVFlare", "nvflare", "nvflare>=2.9,<2.10")
