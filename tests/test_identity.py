"""Nobody is anybody without the root's word: bad identities, clocks, keys that others may read, signed documents."""

import base64
import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan.consortium import identity, keys, signed
from fedscan.consortium.checks import checked
from fedscan.spec import Refused
from identities import DAY, NOW, World, loaded, mangled, private, sha1

MINUTE = timedelta(minutes=1)
WORLD = World()
OTHER = World(name="other")
KEY = private()
TWIN = World()  # another root, under the same name


def impostors() -> dict[str, tuple[Callable[[], str], str]]:
    """Every bad identity of threat T1, and a few more; and what is said of it."""
    w, own = WORLD, private()
    weak = rsa.generate_private_key(65537, 1024)
    return {
        "no certificate": (lambda: "", "no certificate was shown"),
        "self-signed": (
            lambda: w.show(key=own, signer=own, issuer=identity.named(O="glioma", OU="site", CN="a")),
            "'a' is self-signed; the root of the consortium 'glioma'",
        ),
        "expired": (lambda: w.show(end=NOW - 11 * MINUTE), "'a' ended on 2026-03-01 11:49 UTC"),
        "not yet valid": (lambda: w.show(start=NOW + 11 * MINUTE), "'a' begins on 2026-03-01 12:11 UTC"),
        "of another consortium": (lambda: w_other(OTHER), "was signed by 'OU=root,O=other', not by the root of"),
        "of an imitated root": (lambda: w_other(TWIN), "and the signature is not that root's"),
        "revoked": (
            lambda: w.show(revoked=NOW - DAY, why="key lost"),
            "'a' was revoked on 2026-02-28 12:00 UTC: key lost",
        ),
        "for another role": (lambda: w.show(role="reader"), "is for the role 'reader', and 'site' is needed"),
        "not on the roster": (lambda: w.show(listed=False), "'a' is not on the roster"),
        "with another name beside it": (
            lambda: w.show(sans=("b",)),
            "'a' gives other names than this one for TLS: 'b'",
        ),
        "with two names": (lambda: w.show(sans=("a", "b")), "for TLS: 'a', 'b'"),
        "with a name that moves the cursor": (lambda: w.show(sans=("\x1b[2J",)), r"for TLS: '\x1b[2J'"),
        "without its name for TLS": (lambda: w.show(sans=()), "for TLS: none"),
        "RSA-1024": (lambda: w.show(key=weak), "a key of the kind RSA of 1024 bits; only ECDSA over P-256"),
        "Ed25519": (lambda: w.show(key=ed25519.Ed25519PrivateKey.generate()), "a key of the kind Ed25519; only ECDSA"),
        "P-384": (lambda: w.show(key=ec.generate_private_key(ec.SECP384R1())), "a key of the kind EC of 384 bits"),
        "SHA-1": (old_hash, "is signed with SHA1; only SHA-256 is taken"),
        "someone else": (lambda: w.show("b"), "'b' was shown where 'a' was expected"),
        "the root": (lambda: w.root, "the root's own certificate was shown"),
        "with a line that says otherwise": (serial_differs, "and its line on the roster do not agree"),
        "that may admit others": (lambda: w.show(ca=True), "is that of an authority"),
        "two at once": (lambda: w.show() + w.show(), "is not a certificate, or was changed"),
        "with a text before it": (lambda: "x\n" + w.show(), "is not a certificate, or was changed"),
        "rubbish": (lambda: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "is not a certificate"),
        "not even ASCII": (lambda: "ä", "is not a certificate"),
    }


def w_other(world: World) -> str:
    """A certificate from another root, on our roster all the same."""
    made = world.show()
    WORLD.enrol(made)
    return made


def old_hash() -> str:
    made = sha1(WORLD.show(listed=False), WORLD.key)
    WORLD.enrol(made)
    return made


def serial_differs() -> str:
    made = WORLD.show(listed=False)
    WORLD.enrol(made, serial="ff")
    return made


IMPOSTORS = impostors()


def said_of(which: str) -> str:
    """What is said of an impostor who wants to be the site 'a'."""
    with pytest.raises(Refused) as e:
        checked(IMPOSTORS[which][0](), WORLD.root, WORLD.members, "site", "a", NOW)
    return str(e.value)


@pytest.mark.parametrize("which", IMPOSTORS)
def test_a_bad_identity_is_refused_in_a_sentence_of_its_own(which: str) -> None:
    said = said_of(which)
    assert IMPOSTORS[which][1] in said
    assert "\n" not in said
    others = [sentence for name, (_, sentence) in IMPOSTORS.items() if name != which]
    assert not [s for s in others if s in said and s not in IMPOSTORS[which][1] and IMPOSTORS[which][1] not in s]


def test_another_certificate_of_a_name_on_the_roster_is_not_the_members() -> None:
    world = World()
    world.show()
    with pytest.raises(Refused, match="not on the roster, which has another one for that name"):
        checked(world.show(listed=False), world.root, world.members, "site", "a", NOW)
    with pytest.raises(Refused, match="'b' is not on the roster: have a newer roster sent, or be admitted"):
        checked(world.show("b", listed=False), world.root, world.members, "site", "b", NOW)


@pytest.mark.parametrize("role", identity.ROLES)
def test_a_member_is_who_it_is(role: identity.Role) -> None:
    shown = WORLD.show("hospital-a", role)
    for wanted, name in ((role, "hospital-a"), (None, None)):
        found = checked(shown, WORLD.root, WORLD.members, wanted, name, NOW)
        assert (found.name, found.role, found.consortium, found.serial) == ("hospital-a", role, "glioma", "4d")
        assert found.until == NOW + DAY


def test_a_clock_may_be_wrong_by_ten_minutes_and_a_worse_one_is_blamed() -> None:
    shown = WORLD.show(start=NOW - DAY, end=NOW + DAY)

    def at(moment: Any) -> identity.Identity:
        return checked(shown, WORLD.root, WORLD.members, now=moment)

    for early_or_late in (NOW - DAY - 10 * MINUTE, NOW + DAY + 10 * MINUTE):
        assert at(early_or_late).name == "a"
        assert at(early_or_late.astimezone(timezone(timedelta(hours=-5)))).name == "a"
    for moment in (NOW - DAY - 10 * MINUTE - MINUTE, NOW + DAY + 11 * MINUTE, NOW - 2 * DAY, NOW + 200 * DAY):
        with pytest.raises(Refused, match=r"this machine's clock says 2026-.* UTC: check the clock"):
            at(moment)


def test_what_the_root_gives_is_what_tls_asks_for() -> None:
    """A site can be no server, and no member can sign another's certificate."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID as Use

    for role, uses in (("site", {Use.CLIENT_AUTH}), ("coordinator", {Use.CLIENT_AUTH, Use.SERVER_AUTH})):
        asked = identity.read_request(identity.request("a", identity.in_role(role), private()))
        given = identity.read_certificate(identity.admitted(asked, WORLD.root, WORLD.key, NOW + DAY, NOW))
        assert set(given.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == uses
        assert given.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
        assert given.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
        assert given.not_valid_before_utc == NOW - 10 * MINUTE
    with pytest.raises(ValueError, match="choose fewer --days"):
        identity.admitted(asked, WORLD.root, WORLD.key, NOW + 3650 * DAY, NOW)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_what_is_mangled_is_refused_in_a_sentence_and_nothing_else_happens() -> None:
    good, asked, r = WORLD.show(), identity.request("a", "site", private()), random.Random(0)
    for _ in range(700):
        for check, text in (
            (lambda pem: checked(pem, WORLD.root, WORLD.members, "site", "a", NOW), good),
            (lambda pem: checked(good, pem, WORLD.members, "site", "a", NOW), WORLD.root),
            (identity.read_request, asked),
            (identity.read_root, WORLD.root),
        ):
            if (bad := mangled(text, r)) == text:
                continue
            with pytest.raises(Refused) as e:
                check(bad)
            assert str(e.value).isprintable()


@pytest.mark.parametrize("name", ['x"\nrole = "y', "A", "\x1b[2J", ""])
def test_a_root_is_well_named(name: str) -> None:
    subject = identity.named(O=name or " ", OU="root")
    root = identity.issued(subject, subject, KEY.public_key(), KEY, NOW, NOW + DAY, ())
    with pytest.raises(Refused, match="the root is not the root of a consortium"):
        identity.read_root(root)


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("bare_umask")
def test_a_key_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir(mode=0o755)  # an empty folder that is there may be used, and is closed to others
    keys.make_folder(folder)
    keys.make_folder(tmp_path / "b" / "c")
    assert stat.S_IMODE((tmp_path / "b" / "c").stat().st_mode) == 0o700
    made = keys.make_key(folder / "key.pem")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert [p.name for p in folder.iterdir()] == ["key.pem"]
    assert keys.read_key(folder / "key.pem").private_numbers() == made.private_numbers()


@pytest.mark.parametrize(("what", "mode"), [("key.pem", m) for m in (0o640, 0o604, 0o620, 0o601)]
                         + [(".", m) for m in (0o750, 0o701, 0o755)])  # fmt: skip
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, what: str, mode: int) -> None:
    tmp_path.chmod(0o700)
    keys.make_key(tmp_path / "key.pem")
    (tmp_path / what).chmod(mode)
    with pytest.raises(Refused, match=rf"may be used by others \(mode {mode:o}\)"):
        keys.read_key(tmp_path / "key.pem")


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    keys.make_key(tmp_path / "key.pem")
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(ValueError, match="never written over"):
        keys.make_key(tmp_path / "key.pem")
    with pytest.raises(ValueError, match=r"holds key\.pem already"):
        keys.make_folder(tmp_path)
    assert (tmp_path / "key.pem").read_bytes() == before


def test_what_is_no_key_of_ours_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "key.pem"
    pem = rsa.generate_private_key(65537, 1024).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content, said in ((b"", "is not a private key"), (b"x" * 99, "is not a private key"), (pem, "RSA of 1024")):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(Refused, match=said):
            keys.read_key(path)


def secrets_of(path: Path) -> list[bytes]:
    """A private key as it could turn up somewhere: its number in bytes, hexadecimal, decimal, base64, and its file."""
    number = loaded(path.read_bytes()).private_numbers().private_value
    raw = number.to_bytes(32)
    inside = path.read_bytes().splitlines()[1]
    coded = base64.b64encode(raw)[4:-4]
    return [raw, raw[::-1], raw.hex().encode(), raw.hex().upper().encode(), str(number).encode(), coded, inside]


def test_no_private_key_leaves_its_owner(fedscan: Any, tmp_path: Path) -> None:
    said = [fedscan("consortium", "init", "glioma", "--folder", "c")]
    said += [fedscan("site", "init", "a", "--folder", "s")]
    said += [fedscan("consortium", "admit", "s/request.csr", "--folder", "c")]
    said += [fedscan("site", "import", "c/kits/a", "--folder", "s")]
    said += [fedscan("consortium", "members", "--folder", "c", "--json")]
    said += [fedscan("consortium", "revoke", "a", "--why", "gone", "--folder", "c")]
    assert [s.code for s in said] == [0] * 6
    everything = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for own in (tmp_path / "c" / "root.key", tmp_path / "s" / "key.pem"):
        told = b"".join(d for p, d in everything.items() if p != own) + "".join(s.out + s.err for s in said).encode()
        assert not [secret for secret in secrets_of(own) if secret in told]
        assert secrets_of(own)[-1] in everything[own]
        assert stat.S_IMODE(own.stat().st_mode) == 0o600
        assert stat.S_IMODE(own.parent.stat().st_mode) == 0o700


# -- signed documents ------------------------------------------------------------------------------------------------


CERTIFICATE = WORLD.show("signer", key=KEY)
DOCUMENT = {
    "kind": "yes",
    "study": "ab" * 32,
    "n": 3,
    "rate": 0.5,
    "what": ["masks", None, True],
    "of": {"b": 1, "a": 2},
}


def who(document: Any, kind: str = "yes", **more: Any) -> identity.Identity:
    return signed.verified(document, kind, WORLD.root, WORLD.members, now=NOW, **more)


def test_a_signed_document_is_its_signers() -> None:
    document = signed.sign(DOCUMENT, KEY, CERTIFICATE)
    assert who(document, role="site", name="signer").name == "signer"
    assert who(dict(reversed(document.items()))).name == "signer"
    again = signed.parsed(signed.canonical(document) + b"\n", "x.json")
    assert who(again).name == "signer"


@pytest.mark.parametrize(
    "change",
    [
        {"n": 4}, {"n": 3.0}, {"n": True}, {"rate": 0.5000000000000001}, {"what": ["masks", None, 1]}, {"more": 1},
        {"of": {"b": 1}}, {"study": "аb" + "ab" * 31}, {"study": "ab" * 32 + "\u200b"}, {"what": ["masks", True, None]},
        {"signature": "0" * 128}, {"signature": ""}, {"signature": "x" * 128}, {"signature": None}, {"signer": None},
        {"signature": "F" * 128},
    ],
)  # fmt: skip
def test_a_change_is_seen(change: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"was changed after 'signer' signed it|is not signed"):
        who({**signed.sign(DOCUMENT, KEY, CERTIFICATE), **change})


def test_a_missing_entry_is_seen() -> None:
    document = signed.sign(DOCUMENT, KEY, CERTIFICATE)
    for name in DOCUMENT:
        with pytest.raises(Refused):
            who({k: v for k, v in document.items() if k != name})


def test_a_signature_serves_no_other_purpose() -> None:
    document = signed.sign(DOCUMENT, KEY, CERTIFICATE)
    with pytest.raises(Refused, match="not a signed roster; its kind is 'yes'"):
        who(document, "roster")
    with pytest.raises(Refused, match="was changed"):
        who({**document, "kind": "roster"}, "roster")
    same_key = WORLD.show("b", key=KEY)
    with pytest.raises(Refused, match="was changed"):
        who({**document, "signer": same_key})
    bare = signed.canonical({**DOCUMENT, "signer": CERTIFICATE})
    r, s = ec_numbers(KEY.sign(bare, ec.ECDSA(hashes.SHA256())))
    with pytest.raises(Refused, match="was changed"):  # the same bytes, signed as something else
        who({**DOCUMENT, "signer": CERTIFICATE, "signature": f"{r:064x}{s:064x}"})


def ec_numbers(signature: bytes) -> tuple[int, int]:
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    return decode_dss_signature(signature)


def test_a_document_is_held_to_its_signers_certificate() -> None:
    revoked = WORLD.show("gone", key=KEY, revoked=NOW, why="left")
    with pytest.raises(Refused, match=r"'gone' was revoked .*: left"):
        who(signed.sign(DOCUMENT, KEY, revoked))
    with pytest.raises(Refused, match="for the role 'site', and 'coordinator'"):
        who(signed.sign(DOCUMENT, KEY, CERTIFICATE), role="coordinator")
    with pytest.raises(ValueError, match="not that of the key"):
        signed.sign(DOCUMENT, private(), CERTIFICATE)


@pytest.mark.parametrize(
    "bad",
    [{"x": float("nan")}, {"x": float("inf")}, {"x": 2**64}, {"x": "e\u0301"}, {"e\u0301": 1}, {1: 2}, {"x": b""},
     {"x": "\ud800"}, {"x": {1, 2}}, {"kind": None}, {"signer": "me"}],
    ids=str,
)  # fmt: skip
def test_what_has_no_one_form_cannot_be_signed(bad: dict[Any, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        signed.sign({**DOCUMENT, **bad}, KEY, CERTIFICATE)


def test_a_document_has_one_text() -> None:
    """JSON that means the same but is written otherwise is refused, and so is what JSON does not settle."""
    data = signed.canonical(signed.sign(DOCUMENT, KEY, CERTIFICATE)) + b"\n"
    document = json.loads(data)
    bad = [
        data.rstrip(), b" " + data, data + b"\n", json.dumps(document).encode() + b"\n", b"", b"{}", b"[]\n", b"\xff",
        data.replace(b'"n":3', b'"n":3,"n":3'), data.replace(b"0.5", b"0.50"), data.replace(b"0.5", b"NaN"),
        data.replace(b"masks", b"m\\u0061sks"), b"[" * 100_000,
    ]  # fmt: skip
    assert signed.parsed(data, "x.json") == document
    for other in bad:
        with pytest.raises(Refused, match=r"x\.json is not a signed document"):
            signed.parsed(other, "x.json")


LEAF = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(codec="ascii"), max_size=5)
TREES = st.recursive(
    LEAF | WORDS, lambda t: st.lists(t, max_size=3) | st.dictionaries(WORDS, t, max_size=3), max_leaves=9
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(WORDS, TREES, max_size=4), st.dictionaries(WORDS, TREES, max_size=4))
def test_the_text_of_a_document_tells_it_from_every_other(a: dict[str, Any], b: dict[str, Any]) -> None:
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (signed.canonical(a) == signed.canonical(b)) == same
    assert signed.canonical(signed.parsed(signed.canonical(a) + b"\n", "x")) == signed.canonical(a)
