"""Who is admitted and who is revoked, and that only the root says so: requests, rosters, and their commands."""

import base64
import json
import re
import shlex
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from commands import Command, refused
from fedscan.consortium import coordinator, identity, keys, kit, member, roster, signed
from fedscan.spec import Refused
from identities import DAY, NOW, Place, World, private, text_of


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_member_is_made(place: Place) -> None:
    home = place.join("a")
    who = home.identity(NOW)
    assert (who.name, who.role, who.consortium, who.until) == ("a", "site", "glioma", NOW + 730 * DAY)
    assert who.key == keys.fingerprint(home.key.public_key())
    (line,) = place.roster().lines
    assert (line.name, line.role, line.certificate, line.key) == ("a", "site", who.certificate, who.key)
    assert (line.admitted, line.until, line.revoked) == (NOW, NOW + 730 * DAY, None)
    assert sorted(p.name for p in home.folder.iterdir()) == [
        "certificate.pem", "key.pem", "request.csr", "root.pem", "roster.json", "site.toml"
    ]  # fmt: skip
    assert (home.folder / "site.toml").read_text() == 'name = "a"\nrole = "site"\nconsortium = "glioma"\n'
    with pytest.raises(Refused, match="check the clock"):
        home.identity(NOW + 731 * DAY)


def test_a_folder_says_what_it_lacks(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no certificate\.pem yet: send request\.csr to the coordinator"):
        _ = place.ask("a").certificate
    with pytest.raises(ValueError, match="is not a member's folder: make one"):
        member.read(tmp_path)
    with pytest.raises(ValueError, match=r"holds no root\.pem"):
        coordinator.read(tmp_path)
    (tmp_path / "homes" / "a" / "site.toml").write_text("name = 3")
    with pytest.raises(ValueError, match="does not say who is at home here"):
        member.read(tmp_path / "homes" / "a")


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_request_for_another_name_role_or_key_is_refused(place: Place) -> None:
    home = place.ask("a", "coordinator")
    for more, said in (
        ({"role": "site"}, "asks for the role 'coordinator', and 'site' was to be admitted"),
        ({"name": "b"}, "asks for the name 'a', and 'b' was to be admitted"),
        ({"key": "ab" * 32}, "not the one that you were told: admit nobody with it"),
        ({"key": "abc"}, "'abc' is not a fingerprint"),
        ({"role": "king"}, "there is no role 'king'; roles are site, coordinator, reader"),
        ({"days": 0}, "--days takes 1 to 3650"),
        ({"days": 3650, "now": NOW + DAY}, "the root of the consortium ends on 2036-02-27 12:00 UTC"),
    ):
        with pytest.raises(ValueError, match=said):
            place.admit(home, **more)
    assert place.roster() == roster.first(place.roster().root, NOW)
    assert not (place.folder / "kits").exists()
    told = keys.spoken(keys.fingerprint(home.key.public_key())).upper()
    assert place.admit(home, name="a", key=told).member.role == "coordinator"


ODD = ["", "A", "а", "a b", "../a", "a/b", ".a", "-a", "a-", "a\u200b", "a\n", "ä", "a" * 64, "a.b", "a_b", "con\0"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_name_cannot_be_taken_for_another(name: str, place: Place, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be a member's name: use up to 63 small letters"):
        place.ask(name, at="x")
    assert not (tmp_path / "homes").exists()
    with pytest.raises(ValueError, match="cannot be a consortium's name"):
        coordinator.found(name, tmp_path / "x")
    if name and "\0" not in name:
        attributes = [x509.NameAttribute(x509.NameOID.ORGANIZATIONAL_UNIT_NAME, "site"),
                      x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]  # fmt: skip
        made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
        with pytest.raises(Refused, match="cannot be a name"):
            identity.read_request(text_of(made.sign(private(), hashes.SHA256())))


def test_a_request_is_signed_with_its_own_key() -> None:
    def asked(key: Any, hash_: Any, *names: tuple[x509.ObjectIdentifier, str]) -> str:
        subject = x509.Name([x509.NameAttribute(*pair) for pair in names])
        return text_of(x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hash_))

    unit, common = x509.NameOID.ORGANIZATIONAL_UNIT_NAME, x509.NameOID.COMMON_NAME
    good = asked(private(), hashes.SHA256(), (unit, "site"), (common, "a"))
    assert identity.read_request(good).name == "a"
    other = asked(private(), hashes.SHA256(), (unit, "site"), (common, "b"))
    a, b = (base64.b64decode("".join(t.splitlines()[1:-1])) for t in (good, other))
    inside = x509.load_pem_x509_csr(good.encode()).tbs_certrequest_bytes
    swapped = b.replace(x509.load_pem_x509_csr(other.encode()).tbs_certrequest_bytes, inside)
    assert len(inside) < len(a)
    bad = {
        text_of(x509.load_der_x509_csr(swapped)): "is not signed with the key that it asks",
        asked(private(), hashes.SHA512(), (unit, "site"), (common, "a")): "is not signed with the key that it asks",
        asked(
            rsa.generate_private_key(65537, 1024), hashes.SHA256(), (unit, "site"), (common, "a")
        ): "RSA of 1024 bits",
        asked(private(), hashes.SHA256(), (common, "a")): "is not of the form OU, CN",
        asked(private(), hashes.SHA256(), (unit, "site"), (common, "a"), (common, "b")): "is not of the form",
        asked(private(), hashes.SHA256(), (unit, "root"), (common, "a")): "there is no role 'root'",
        "": "is not a request as `fedscan site init` writes it",
    }
    for text, said in bad.items():
        with pytest.raises(Refused, match=said):
            identity.read_request(text)


# -- the roster ------------------------------------------------------------------------------------------------------


def test_a_name_is_admitted_once(place: Place) -> None:
    a = place.ask("a")
    first = place.admit(a)
    impostor = place.ask("a", at="x")
    with pytest.raises(ValueError, match=r"'a' was admitted on 2026-03-01 12:00 UTC as site with another key"):
        place.admit(impostor)
    assert [line.key for line in place.roster().lines] == [first.member.key]
    again = place.admit(a, now=NOW + DAY)
    assert (again.again, again.member, place.roster().version) == (True, first.member, 2)


def test_a_key_has_one_name(place: Place) -> None:
    a = place.join("a")
    text = identity.request("b", "site", a.key)
    (place.root / "b.csr").write_text(text)
    with pytest.raises(ValueError, match="this key is that of 'a'"):
        coordinator.admit(place.folder, place.root / "b.csr", now=NOW)


def test_who_is_revoked_stays_out_with_its_key(place: Place) -> None:
    a = place.join("a")
    listed = coordinator.revoke(place.folder, "a", "  the key\nwas lost ", NOW + DAY)
    assert (listed.version, listed.lines[0].revoked, listed.lines[0].why) == (3, NOW + DAY, "the key was lost")
    with pytest.raises(ValueError, match=r"this key was revoked on 2026-03-02 12:00 UTC \(the key was lost\)"):
        place.admit(a, now=NOW + 2 * DAY)
    with pytest.raises(ValueError, match="'a' is not a member of 'glioma' that could be revoked; nobody is"):
        coordinator.revoke(place.folder, "a", "again", NOW)
    assert a.identity(NOW).name == "a"  # it has not been told yet
    with pytest.raises(Refused, match="'a' was revoked on 2026-03-02 12:00 UTC: the key was lost"):
        member.take_roster(a, place.folder / "roster.json")
    with pytest.raises(Refused, match="was revoked"):
        member.read(a.folder).identity(NOW)
    new = place.ask("a", at="new")
    assert place.admit(new, now=NOW + 2 * DAY).member.revoked is None
    assert [line.revoked is None for line in place.roster().lines] == [False, True]


@pytest.mark.parametrize("why", ["", " \n", "x" * 201, "a\x1b[2Jb"], ids=ascii)
def test_a_reason_is_one_line(why: str, place: Place) -> None:
    place.join("a")
    with pytest.raises(ValueError, match="--why takes a reason"):
        coordinator.revoke(place.folder, "a", why, NOW)


def test_after_its_time_a_member_is_admitted_anew_with_its_key(place: Place) -> None:
    a = place.join("a")
    later = NOW + 731 * DAY
    done = place.admit(a, now=later)
    assert not done.again
    assert len(place.roster().lines) == 2
    member.take_kit(a, done.kit, now=later)
    assert member.read(a.folder).identity(later).until == later + 730 * DAY


def test_an_older_roster_is_refused(place: Place, tmp_path: Path) -> None:
    a, old = place.join("a"), tmp_path / "old.json"
    place.join("b")
    shutil.copy(place.folder / "roster.json", old)
    coordinator.revoke(place.folder, "b", "left", NOW)
    for _ in range(2):  # the newest may be imported twice
        assert member.take_roster(member.read(a.folder), place.folder / "roster.json", now=NOW).version == 4
    with pytest.raises(Refused, match=r"old\.json is version 3 .*, and version 4 .* is here already"):
        member.take_roster(member.read(a.folder), old, now=NOW)
    with pytest.raises(Refused, match=r"is version 2 .*, and version 4 .* is here already"):
        member.take_kit(member.read(a.folder), place.folder / "kits" / "a", now=NOW)
    assert member.read(a.folder).roster == place.roster()


def test_two_rosters_of_one_version_are_seen(place: Place, tmp_path: Path) -> None:
    a = place.join("a")
    shutil.copytree(place.folder, tmp_path / "copy")
    for folder, name in ((place.folder, "b"), (tmp_path / "copy", "c")):
        home = place.ask(name)
        coordinator.admit(folder, home.folder / "request.csr", now=NOW)
    member.take_roster(a, place.folder / "roster.json", now=NOW)
    with pytest.raises(Refused, match="are both version 3, and differ"):
        member.take_roster(member.read(a.folder), tmp_path / "copy" / "roster.json", now=NOW)


def test_only_the_roots_key_changes_the_roster(place: Place, tmp_path: Path) -> None:
    a = place.join("a")
    coordinator.revoke(place.folder, "a", "left", NOW)
    path, listed = tmp_path / "forged.json", place.roster()
    document = signed.read(place.folder / "roster.json")
    line = {**document["members"][0], "revoked": None, "why": ""}
    unsigned = {k: v for k, v in document.items() if k not in ("signature", "signer")}
    others = World()
    forged = [
        ({**document, "members": [line]}, "was changed after the consortium's root signed it"),
        ({**document, "version": 9}, "was changed after"),
        (signed.sign({**unsigned, "members": [line]}, a.key, a.certificate), "is not signed by the root"),
        (signed.sign({**unsigned, "members": [line]}, others.key, others.root), "is not signed by the root"),
        ({**unsigned, "members": [line]}, "is not signed"),
        (signed.sign({"kind": "kit"}, a.key, a.certificate), "is not a signed roster; its kind is 'kit'"),
    ]
    for made, said in forged:
        signed.write(path, made)
        with pytest.raises(Refused, match=rf"forged\.json: .*{said}"):
            member.take_roster(a, path, now=NOW)
    with pytest.raises(ValueError, match=r"holds no root\.key: only the coordinator's own folder"):
        coordinator.revoke(a.folder, "a", "me", NOW)
    assert listed == place.roster()


@pytest.mark.parametrize(
    "change",
    [{"version": 0}, {"version": 1.0}, {"version": True}, {"members": 3}, {"members": [{}]}, {"written": "2026-03-01"},
     {"consortium": "other"}, {"more": 1}, {"members": "twice"}, {"members": {"why": "without a day"}},
     {"members": {"revoked": NOW.isoformat(), "why": "\x1b[2J"}}, {"members": {"role": "king"}},
     {"members": {"until": "2027-01-01"}}],
    ids=str,
)  # fmt: skip
def test_a_roster_that_the_root_should_not_have_signed_is_refused(change: dict[str, Any], place: Place) -> None:
    place.join("a")
    document = signed.read(place.folder / "roster.json")
    unsigned = {k: v for k, v in document.items() if k not in ("signature", "signer")}
    lines, changed = unsigned["members"], dict(change)
    if changed.get("members") == "twice":
        changed = {"members": lines * 2}
    elif isinstance(changed.get("members"), dict):
        changed = {"members": [{**lines[0], **changed["members"]}]}
    root = place.roster().root
    made = signed.sign({**unsigned, **changed}, keys.read_key(place.folder / "root.key"), root)
    with pytest.raises(Refused, match="not a roster that this version of fedscan can read"):
        roster.opened(made, root)


def test_what_is_cut_off_while_admitting_can_be_done_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the roster is written nothing has happened; after it, the same command finishes."""
    a = place.ask("a")

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(signed, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            place.admit(a)
    assert place.roster().lines == ()
    with monkeypatch.context() as m:
        m.setattr(kit, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            place.admit(a)
    assert (place.roster().version, len(place.roster().lines)) == (2, 1)
    done = place.admit(a)
    assert done.again
    assert member.take_kit(a, done.kit, now=NOW) == place.roster()


def test_two_who_admit_at_once_sign_two_versions(place: Place) -> None:
    homes = [place.ask(name) for name in "abcdef"]
    threads = [threading.Thread(target=place.admit, args=(home,)) for home in homes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.roster().version == 7
    assert sorted(line.name for line in place.roster().lines) == list("abcdef")


# -- commands --------------------------------------------------------------------------------------------------------


def test_the_commands_from_beginning_to_end(fedscan: Command, tmp_path: Path) -> None:
    made = fedscan("consortium", "init", "glioma", "--folder", "c")
    root = identity.read_root((tmp_path / "c" / "root.pem").read_text()).public_key()
    assert keys.spoken(keys.fingerprint(root)) in made.out
    assert fedscan("consortium", "members", "--folder", "c").out.endswith("nobody is admitted yet\n")
    asked = fedscan("site", "init", "a", "--folder", "s")
    mark = keys.spoken(keys.fingerprint(member.read(tmp_path / "s").key.public_key()))
    assert mark in asked.out
    admitted = fedscan("consortium", "admit", "s/request.csr", "--folder", "c")
    assert mark in admitted.out
    assert "a is admitted as site until 20" in admitted.out
    assert "its kit was written again" in fedscan("consortium", "admit", "s/request.csr", "--folder", "c").out
    taken = fedscan("site", "import", "c/kits/a", "--folder", "s", "--root", keys.fingerprint(root))
    assert taken.out == "a is a site of glioma; version 2 of the roster\n"
    for folder in "cs":
        told = json.loads(fedscan("consortium", "members", "--folder", folder, "--json").out)
        assert (told["consortium"], told["version"], told["root"]) == ("glioma", 2, keys.fingerprint(root))
        assert [(m["name"], m["role"], m["state"]) for m in told["members"]] == [("a", "site", "member")]
    assert fedscan("consortium", "revoke", "a", "--why", "left us", "--folder", "c").code == 0
    shown = fedscan("consortium", "members", "--folder", "c").out
    assert "a     site  revoked" in shown
    assert shown.rstrip().endswith(": left us")
    refused(fedscan("site", "import", "c/roster.json", "--folder", "s"), "the certificate of 'a' was revoked")


def test_the_commands_of_the_page_do_what_it_says(fedscan: Command, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "members.md").read_text(encoding="utf-8")
    lines = [x for block in re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M) for x in block.splitlines()][:10]
    assert [x.split()[1:3] for x in lines] == [
        ["consortium", "init"], ["site", "init"], ["consortium", "admit"], ["site", "import"],
        ["site", "init"], ["consortium", "admit"], ["site", "import"], ["site", "import"],
        ["consortium", "revoke"], ["consortium", "members"],
    ]  # fmt: skip
    said = [fedscan(*shlex.split(x)[1:]) for x in lines]
    assert [(s.code, s.err) for s in said] == [(0, "")] * 10
    assert "hospital-a is a site of glioma" in said[3].out
    assert "desk is a coordinator of glioma" in said[6].out
    assert "the machine with the key was replaced" in said[9].out


def test_a_mistake_at_a_command_is_a_sentence(fedscan: Command, tmp_path: Path) -> None:
    fedscan("consortium", "init", "glioma", "--folder", "c")
    fedscan("site", "init", "a", "--folder", "s", "--role", "reader")
    (tmp_path / "wide").mkdir(mode=0o755)
    shutil.copytree(tmp_path / "s", tmp_path / "wide" / "s")
    (tmp_path / "wide" / "s").chmod(0o755)
    for words, said in (
        (("consortium", "init", "glioma", "--folder", "c"), "c holds consortium.toml, root.key, root.pem already"),
        (("site", "init", "a", "--folder", "s"), "s holds key.pem, request.csr, site.toml already"),
        (("site", "init", "Hospital A", "--folder", "x"), "'Hospital A' cannot be a member's name"),
        (("consortium", "admit", "s/request.csr", "--folder", "c"), "asks for the role 'reader', and 'site' was"),
        (("consortium", "admit", "s/key.pem", "--folder", "c"), "s/key.pem is not a request as"),
        (("consortium", "admit", "gone.csr", "--folder", "c"), "gone.csr: no such file"),
        (("consortium", "admit", "s/request.csr", "--folder", "s", "--role", "reader"), "s holds no root.pem"),
        (("consortium", "revoke", "b", "--why", "x", "--folder", "c"), "'b' is not a member of 'glioma'"),
        (("site", "import", "c", "--folder", "s"), "kit.json is missing from the kit in c"),
        (("site", "import", "c/roster.json", "--folder", "s"), "s has no root.pem yet: send request.csr"),
        (("site", "import", "gone", "--folder", "c"), "c is not a member's folder"),
    ):
        refused(fedscan(*words), said)
    fedscan("consortium", "admit", "s/request.csr", "--folder", "c", "--role", "reader")
    refused(fedscan("site", "import", "c/kits/a", "--folder", "wide/s"), "may be used by others (mode 755)")
