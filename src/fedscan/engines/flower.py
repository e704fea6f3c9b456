"""The Flower engine: a SuperLink and SuperNodes carry sealed bytes between `serve` and the `join` of each site.

Flower asks sites for no certificate, sends them code, and takes orders to run any on the port that sites use. So each
member's Flower speaks on loopback only, behind a gate (``flower_gate``): from gate to gate goes TLS 1.3 between the
certificates that the consortium gave, a site is known by its own, and neither orders nor code pass. Every member makes
its start-up folder for itself: no kit is sent and no key leaves its owner. A site opens connections outwards only.

This module needs the standard library only, and so does all of fedscan that runs in Flower's environment.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedscan import __version__
from fedscan.engines.doors import Manner
from fedscan.engines.kept import Home, Kept, interpreter, write

MEMBER = "member.json"
DOOR, GATE = "FEDSCAN_FLOWER_DOOR", "FEDSCAN_FLOWER_GATE"  # folders, handed down from process to process
KEEPER = "fedscan.engines.flower_keeper"
MANNER = Manner(part=64 << 20, flight=2, patience=25.0)  # each message costs Flower some time: few large ones
MOST = 2 << 30  # bytes of one message: at 5 to 10 MB a second, that is some minutes there and as many back
KEPT = ("LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "FLWR_LOG_LEVEL")  # of the environment
QUIET = {  # Flower calls nobody, and installs nothing
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
}
LARGE = {  # each part is copied many times over, and most of that time goes into getting pages and giving them back
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


def coordinator(home: Home, folder: Path, port: int, host: str = "0.0.0.0") -> "Engine":
    """Makes the start-up folder of Flower's SuperLink, from the identity in the coordinator's member's folder.

    Sites reach its gate on ``port``, and are those of the roster that lies in ``home`` now: called again after a newer
    roster came, it changes whom a running engine lets in. A ``host`` of this machine only ("localhost") lets in nobody
    from elsewhere. While it runs, ``doors.Relayed(folder)`` carries. Raises ValueError for an identity that cannot
    serve.
    """
    if home.role != "coordinator":
        raise ValueError(f"{home.folder} is the folder of a {home.role}: only a coordinator can serve")
    lines = (line for line in home.roster.members.values() if line.role == "site" and line.revoked is None)
    sites = {line.certificate: line.name for line in lines}
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


class Engine(Kept):
    """Flower's processes of one member: one keeps the others (``flower_keeper``), which die with it."""

    seconds = 20.0

    def command(self) -> list[str]:
        """What starts it. Raises ValueError where Flower is not installed."""
        return [python(), "-m", KEEPER, str(self.folder.resolve())]

    def environment(self) -> dict[str, str]:
        """Flower calls nobody and installs nothing; it finds its own commands first."""
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        path = f"{Path(python()).parent}:/usr/local/bin:/usr/bin:/bin"
        return {**QUIET, **kept, "PATH": path, "HOME": str(self.folder.resolve()), "OMP_NUM_THREADS": "1", **LARGE}

    def port(self) -> int:
        """The port of the coordinator's gate; a site has none."""
        return int(json.loads((self.folder / MEMBER).read_text()).get("listen", ["", 0])[1])


def python() -> str:
    """The Python that has Flower, see ``kept.interpreter``."""
    return interpreter("Flower", "flwr", "flwr>=1.41,<1.43")


def hold_size(what: str, nbytes: int) -> None:
    """Raises ValueError, in one sentence, for a message that would take Flower too long.

    ``what`` it is ("the model of this study"), and how many bytes it has.
    """
    if nbytes > MOST:
        raise ValueError(
            f"{what} has {nbytes / (1 << 30):.1f} GiB, and the Flower engine carries {MOST >> 30} GiB at most, for it "
            "moves some megabytes in a second: choose a smaller model, or the engine nvflare"
        )
