"""Over what a study's requests go from the coordinator to the hospitals: the engines, each started and ended here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fedscan.consortium.member import Home
from fedscan.engines.doors import Carrier, Doors, Relayed
from fedscan.run import Problem

EngineName = Literal["loopback", "nvflare", "flower"]
PORT = 8002


@contextmanager
def to_sites(engine: EngineName, home: Home, folder: Path, sites: Path | None, listen: str) -> Iterator[Carrier]:
    """The coordinator's end of an engine, which works in ``folder``; hospitals reach it at ``listen``, "HOST:PORT".

    With "loopback" there is none: the hospitals' folders lie in ``sites``, all on this machine.
    """
    if engine == "loopback":
        if sites is None:
            raise Problem("--engine loopback reaches hospitals on this machine only: say by --sites where they lie.")
        yield Doors({name: sites / name for name in site_names(home)})
        return
    host, port = address(listen)
    if engine == "nvflare":
        from fedscan.engines import nvflare

        with nvflare.coordinator(home, folder, port, host):
            yield Relayed(folder)
        return
    from fedscan.engines import flower

    certificates = {m.certificate: m.name for m in home.roster.lines if m.role == "site" and m.revoked is None}
    link = flower.Engine(home.folder, folder, folder, (host, port), home.name, certificates)
    link.start()
    try:
        yield Relayed(folder)
    finally:
        link.stop()


@contextmanager
def to_coordinator(engine: EngineName, home: Home, coordinator: str, server: str) -> Iterator[None]:
    """A hospital's end of an engine: it reaches the coordinator at ``server``, "HOST:PORT", and knocks at its door."""
    if engine == "loopback":
        yield
        return
    host, port = address(server)
    folder = home.folder / engine
    if engine == "nvflare":
        from fedscan.engines import nvflare

        with nvflare.site(home, folder, f"{host}:{port}", coordinator, home.folder):
            yield
        return
    from fedscan.engines import flower

    node = flower.Engine(home.folder, folder, home.folder, (host, port), coordinator)
    node.start()
    try:
        yield
    finally:
        node.stop()


def site_names(home: Home) -> list[str]:
    """The hospitals on the roster."""
    return [m.name for m in home.roster.lines if m.role == "site" and m.revoked is None]


def address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT". Raises Problem for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Problem(f"{text!r} is no address: HOST:PORT was meant, such as fl.hospital.org:{PORT}.")
    return host, int(port)
