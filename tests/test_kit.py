"""What a new member is sent: every byte of it is the root's, and its keys serve in TLS."""

import contextlib
import random
import shutil
import ssl
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fedscan.consortium import coordinator, identity, keys, kit, member
from fedscan.consortium.member import Home
from fedscan.spec import Refused
from identities import DAY, NOW, Place

FLIPS = 2000


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# -- the kit ---------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_of_a_kit_is_found_and_its_file_named(place: Place, tmp_path: Path) -> None:
    """T2: at 2,000 positions of the five files, one to eight bits flipped."""
    home = place.ask("a")
    place.join("b")
    parcel, r = place.admit(home).kit, random.Random(0)
    whole = {path: path.read_bytes() for path in sorted(parcel.iterdir())}
    assert len(whole) == 5
    places = [(path, at) for path, data in whole.items() for at in range(len(data))]
    seen = set()
    for path, at in r.sample(places, FLIPS):
        flipped = whole[path][at] ^ r.choice((1, 2, 4, 8, 16, 32, 64, 128, r.randrange(1, 256)))
        poke(path, at, flipped)
        with pytest.raises(Refused) as e:
            kit.read(parcel)
        assert path.name in str(e.value), f"byte {at} of {path.name}: {e.value}"
        poke(path, at, whole[path][at])
        seen.add(path.name)
    assert seen == {"README.txt", "certificate.pem", "kit.json", "root.pem", "roster.json"}
    assert not (home.folder / "root.pem").exists()
    assert member.take_kit(home, parcel, now=NOW) == place.roster()


def poke(path: Path, at: int, value: int) -> None:
    """Puts one byte into a file."""
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        file.write(bytes([value]))


@pytest.mark.parametrize("name", ["kit.json", *kit.FILES])
def test_a_kit_is_whole(name: str, place: Place, tmp_path: Path) -> None:
    home = place.ask("a")
    path = place.admit(home).kit / name
    data = path.read_bytes()
    for bad in (b"", data[:-1], data + b"\n", data + data, b"\0" * len(data)):
        path.write_bytes(bad)
        with pytest.raises(Refused, match=name.replace(".", r"\.")):
            member.take_kit(home, path.parent, now=NOW)
    path.unlink()
    for make in (lambda: None, lambda: path.symlink_to(tmp_path / "c" / "root.key"), path.mkdir):
        path.unlink(missing_ok=True)
        make()
        with pytest.raises(Refused, match=rf"{name} is missing from the kit"):
            kit.read(path.parent)
    assert sorted(p.name for p in home.folder.iterdir()) == ["key.pem", "request.csr", "site.toml"]


def test_a_kit_of_two_kits_is_refused(place: Place) -> None:
    """Files that the root signed, each good, but not together."""
    a, b = place.ask("a"), place.ask("b")
    one, two = place.admit(a).kit, place.admit(b).kit
    for name in ("certificate.pem", "roster.json", "README.txt"):
        whole = (one / name).read_bytes()
        shutil.copy(two / name, one / name)
        with pytest.raises(Refused, match=f"{name} is not as the root of the consortium signed it"):
            member.take_kit(a, one, now=NOW)
        (one / name).write_bytes(whole)
    with pytest.raises(Refused, match="'b' was shown where 'a' was expected"):
        member.take_kit(a, two, now=NOW)


def test_a_kit_is_for_one_key_role_and_root(place: Place, tmp_path: Path) -> None:
    a = place.ask("a")
    parcel = place.admit(a).kit
    with pytest.raises(Refused, match=r"certificate\.pem is for another key than"):
        member.take_kit(place.ask("a", at="x"), parcel, now=NOW)
    with pytest.raises(Refused, match="is for the role 'site', and 'reader' is needed"):
        member.take_kit(replace(a, role="reader"), parcel, now=NOW)
    with pytest.raises(Refused, match="check the clock"):
        member.take_kit(a, parcel, now=NOW - DAY)
    with pytest.raises(Refused, match=r"root\.pem has the fingerprint .*, not the one that you were told"):
        member.take_kit(a, parcel, "00" * 32, NOW)
    (tmp_path / "false").mkdir()
    other = Place(tmp_path / "false")  # the same names, another root: a kit that was replaced whole
    false = coordinator.admit(other.folder, a.folder / "request.csr", now=NOW).kit
    with pytest.raises(Refused, match="not the one that you were told"):
        member.take_kit(a, false, keys.fingerprint(identity.read_root(place.roster().root).public_key()), NOW)
    member.take_kit(a, parcel, now=NOW)
    with pytest.raises(Refused, match=r"root\.pem is that of another root than the one that"):
        member.take_kit(member.read(a.folder), false, now=NOW)
    with pytest.raises(Refused, match="is not signed by the root of the consortium"):
        member.take_roster(member.read(a.folder), other.folder / "roster.json", now=NOW)


def test_a_changed_file_at_home_is_found(place: Place) -> None:
    home = place.join("a")
    for name, said in (("certificate.pem", "was changed"), ("root.pem", "root.pem"), ("roster.json", "roster.json")):
        whole = (home.folder / name).read_bytes()
        (home.folder / name).write_bytes(whole.replace(b"A", b"B", 1))
        with pytest.raises(Refused, match=said):
            member.read(home.folder).identity(NOW)
        (home.folder / name).write_bytes(whole)
    assert member.read(home.folder).identity(NOW + timedelta(days=700)).name == "a"


# -- TLS -------------------------------------------------------------------------------------------------------------


def shaken(server: Home, client: Home, called: str) -> None:
    """A handshake of mutual TLS 1.3 in memory, in which both believe in the root. Raises ssl.SSLError."""
    contexts = []
    for home, side in ((server, ssl.PROTOCOL_TLS_SERVER), (client, ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(home.folder / "certificate.pem", home.folder / "key.pem")
        context.load_verify_locations(cadata=home.root)
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [contexts[1].wrap_bio(down, up, server_hostname=called), contexts[0].wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        ends[0].read()  # with TLS 1.3, what the server makes of the client comes after the handshake
    assert [end.version() for end in ends] == ["TLSv1.3"] * 2


def test_the_same_keys_serve_in_tls(tmp_path: Path) -> None:
    """And a site that would pose as the coordinator is refused by TLS itself, as is another consortium's member."""
    homes = {}
    for name, role, world in (("lead", "coordinator", "w"), ("a", "site", "w"), ("b", "site", "v")):
        (tmp_path / world).mkdir(exist_ok=True)
        folder = tmp_path / world / "c"
        if not folder.exists():
            coordinator.found("glioma", folder)
        home = member.begin(name, role, tmp_path / name)
        member.take_kit(home, coordinator.admit(folder, home.folder / "request.csr", role).kit)
        homes[name] = home
    shaken(homes["lead"], homes["a"], "lead")
    for server, client, called, said in (
        ("a", "lead", "a", "(unsuitable|unsupported) certificate purpose"),
        ("lead", "a", "a", "Hostname mismatch"),
        ("lead", "b", "lead", "certificate verify failed|certificate signature failure"),
    ):
        with pytest.raises(ssl.SSLError, match=said):
            shaken(homes[server], homes[client], called)
