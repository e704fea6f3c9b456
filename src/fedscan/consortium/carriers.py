"""Over what a study's requests go from the coordinator to the hospitals: the engines, each started and ended here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fedscan.consortium.member import FILE, Home
from fedscan.engines import alone, flower, kept, nvflare
from fedscan.engines.doors import Carrier, Doors, Relayed
from fedscan.run import Problem

EngineName = Literal["loopback", "nvflare", "flower"]
ENGINES = {"nvflare": nvflare, "flower": flower}
PORT, OWNED = 8002, "serve.lock"


@contextmanager
def to_sites(engine: EngineName, home: Home, folder: Path, sites: Path | None, listen: str) -> Iterator[Carrier]:
    """The coordinator's end of an engine, which works in ``folder``; hospitals reach it at ``listen``, "HOST:PORT".

    With "loopback" there is none: the hospitals' folders lie in ``sites``, all on this machine. Raises ValueError where
    another process has the engine's folder.
    """
    if engine == "loopback":
        if sites is None:
            raise Problem("--engine loopback reaches hospitals on this machine only: say by --sites where they lie.")
        folders = {name: sites / name for name in home.roster.names("site")}
        if folders and not any((folder / FILE).exists() for folder in folders.values()):
            raise Problem(f"{sites} holds no folder of {' or '.join(folders)}: say by --sites where they lie.")
        yield Doors(folders)
        return
    host, port = address(listen)
    taken = f"another `fedscan serve` reaches hospitals over {engine} from {home.folder}: one study at a time does so."
    with alone.hold(folder / OWNED, taken), ENGINES[engine].coordinator(home, folder, port, host):
        yield Relayed(folder, ENGINES[engine].MANNER)


def hold_size(engine: EngineName, nbytes: int) -> None:
    """Raises ValueError for a study whose largest message has more bytes than an engine carries in good time."""
    if engine == "flower":
        flower.hold_size("the largest message of this study", nbytes)


@contextmanager
def to_coordinator(engine: EngineName, home: Home, coordinator: str, server: str) -> Iterator[None]:
    """A hospital's end of an engine: it reaches the coordinator at ``server``, "HOST:PORT", and knocks at its door."""
    if engine == "loopback":
        yield
        return
    address(server)
    with ENGINES[engine].site(home, home.folder / engine, server, coordinator, home.folder):
        yield


def heard(engine: EngineName, folder: Path) -> float | None:
    """The seconds since a hospital's engine last heard its other end; None where it has not, or there is none."""
    return None if engine == "loopback" else kept.heard(folder / engine)


def address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT". Raises Problem for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        where = f"{text!r} is no address: HOST:PORT was meant" if text else "say by --server where the coordinator is"
        raise Problem(f"{where}, such as fl.hospital.org:{PORT}.")
    return host, int(port)
