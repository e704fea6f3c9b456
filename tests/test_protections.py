"""No protection between hospitals is off and nobody notices (T38): there is no switch, in any combination of settings.

Every option, policy key, variable and argument that exists is named here with what it can do. A new one fails these
tests until somebody has said what that is. What has no switch is tried out: by who has no key, no yes, no signature.
"""

import ast
import inspect
import itertools
import re
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from commands import Command
from fedscan import plugins, wire
from fedscan.consortium import approval, coordinator, joining, member, prometheus, proposals, serving
from fedscan.consortium.asks import Asks, asks_of, hash_of
from fedscan.consortium.joining import Guard, Ready
from fedscan.consortium.policy import Answers, Leaves, Policy, refusals
from fedscan.consortium.proposals import office
from fedscan.consortium.sealing import KeySeal
from fedscan.engines import envelope, flower, nvflare
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Door, Doors
from fedscan.engines.envelope import ANSWER, EPOCH, REQUEST, Talk
from fedscan.engines.flower_gate import certified
from fedscan.engines.flower_keeper import AtCoordinator
from fedscan.engines.kept import free_port
from fedscan.engines.remote import Remote
from fedscan.spec import Refused
from fedscan.studyfile.file import digest
from fedscan.studyfile.sections import TABLES, Top
from hospitals import consortium
from joined import SITES, Hospitals
from unsigned import Unsigned

SOURCE = Path(serving.__file__).parents[1]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}

# -- what settings there are, and what each can do -------------------------------------------------------------------

LOCAL = {  # commands that carry out nothing between hospitals
    "demo", "run", "compare", "predict", "report", "methods", "show", "models", "tasks", "data check", "ledger show",
    "ledger verify", "status", "stop", "consortium demo",
}  # fmt: skip
TELLS, PLACE, TIME = "only tells", "says where something lies or listens", "says how long"
STUDY, CARRIER, CHECK = "another study, with another hash", "who carries, and is believed in nothing", "one check more"
WHOM = "whom the root signs for, as its certificate and the roster say"
OPTIONS: dict[str, dict[str, str]] = {
    "serve": {
        "study": STUDY, "set_": STUDY, "engine": CARRIER, "folder": PLACE, "listen": PLACE, "sites": PLACE,
        "out": PLACE, "metrics": PLACE, "lease": TIME, "longest": TIME, "resume": TELLS, "json": TELLS,
    },
    "join": {
        "study": STUDY, "engine": CARRIER, "folder": PLACE, "server": PLACE, "cache": PLACE, "metrics": PLACE,
        "json": TELLS,
    },
    "consortium init": {"name": WHOM, "folder": PLACE},
    "consortium admit": {
        "request": WHOM, "role": WHOM, "folder": PLACE, "days": TIME, "name": CHECK, "key": CHECK,
    },
    "consortium revoke": {"name": WHOM, "why": TELLS, "folder": PLACE},
    "consortium members": {"folder": PLACE, "json": TELLS},
    "site init": {"name": WHOM, "role": WHOM, "folder": PLACE},
    "site import": {"kit": PLACE, "folder": PLACE, "root": CHECK},
    "site policy": {"folder": PLACE, "json": TELLS},
    "site data": {"scans": PLACE, "folder": PLACE, "json": TELLS},
    "site study": {"what": STUDY, "folder": PLACE, "json": TELLS},
    "site approve": {"what": STUDY, "folder": PLACE, "until": TIME, "who": TELLS},
    "site reject": {"what": STUDY, "folder": PLACE, "why": TELLS, "who": TELLS},
    "site approvals": {"folder": PLACE, "json": TELLS},
}  # fmt: skip
STRICT: dict[str, Any] = {  # by key of a policy: what forbids the study below
    "answers.questions": ("other:learn",), "answers.coordinators": ("nobody",), "answers.least_cases": 10**6,
    "answers.least_steps": 10**6, "leaves.most_telling": "nothing", "leaves.to_other_hospitals": False,
    "leaves.largest_message_mb": 1e-6,
}  # fmt: skip
LOOSE: dict[str, Any] = {
    "answers.questions": "all", "answers.coordinators": "all", "answers.least_cases": 1, "answers.least_steps": 1,
    "leaves.most_telling": "images", "leaves.to_other_hospitals": True, "leaves.largest_message_mb": 1e9,
}  # fmt: skip
OTHERWISE = {"answers.windows", "leaves.smallest_group"}  # not now, and not shown: these forbid no study
VARIABLES = {
    "FEDSCAN_DEBUG": TELLS, "FEDSCAN_CACHE": PLACE, "XDG_CACHE_HOME": PLACE,
    "CUBLAS_WORKSPACE_CONFIG": "the last bits of numbers", "f'FEDSCAN_{engine.upper()}_PYTHON'": CARRIER,
}  # fmt: skip
WITHIN = {"GATE", "DOOR", "PATH", "name"}  # of an engine's own process, which was given them by us; see ``KEPT``
KEPT = {"PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "FLWR_LOG_LEVEL"}  # what an engine's process may see
DESK = {"about", "facts", "permit", "most", "limits", "runs", "since", "hide", "log", "durable", "event"}
REMOTE = {"most", "lease", "patience", "longest", "durable", "tell", "event", "ledger"}


def commands(of: Any, above: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every command and its options."""
    for command in of.registered_commands:
        name = command.name or command.callback.__name__
        yield above + name, set(inspect.signature(command.callback).parameters)
    for group in of.registered_groups:
        yield from commands(group.typer_instance, f"{above}{group.name} ")


def test_every_option_is_known() -> None:
    from fedscan.cli.commands import app

    found = {name: options for name, options in commands(app) if name not in LOCAL}
    assert found == {name: set(options) for name, options in OPTIONS.items()}


def test_every_key_of_a_policy_is_known() -> None:
    tables = {"answers": Answers, "leaves": Leaves}
    assert set(Policy.model_fields) == set(tables)
    keys = {f"{name}.{key}" for name, table in tables.items() for key in table.model_fields}
    assert keys == set(STRICT) | OTHERWISE
    assert set(LOOSE) == set(STRICT)


def test_every_variable_of_the_environment_is_known() -> None:
    """Whatever stands in brackets or as the first argument behind ``os.environ``, and what options are read from."""
    found = set()
    for tree in TREES.values():
        named = {t.id: ast.unparse(n.value) for n in ast.walk(tree) if isinstance(n, ast.Assign)
                 for t in n.targets if isinstance(t, ast.Name) and isinstance(n.value, ast.JoinedStr)}  # fmt: skip
        for node in ast.walk(tree):
            key: Any = None
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                key = node.slice
            elif isinstance(node, ast.Call) and re.fullmatch(r"os\.(environ\.\w+|getenv)", ast.unparse(node.func)):
                key = node.args[0]
            elif isinstance(node, ast.keyword) and node.arg == "envvar":
                key = node.value
            if key is not None:
                text = ast.literal_eval(key) if isinstance(key, ast.Constant) else ast.unparse(key)
                found.add(named.get(text, text))
    assert found == set(VARIABLES) | WITHIN
    assert {*nvflare.KEPT, *flower.KEPT} == KEPT


def test_every_key_of_a_study_is_in_its_hash(hospitals: Hospitals) -> None:
    """So that one that is given at the coordinator, by ``--set`` too, is a study to which nobody has said yes."""
    tree = hospitals.file.resolved()
    assert set(Top.model_fields) <= set(tree)
    for name, table in TABLES.items():
        at: Any = tree
        for step in name.split("."):
            at = at[step]
        assert set(table.model_fields) <= set(at), name
    assert hash_of(hospitals.file) == digest({"study": tree, "plugins": hospitals.file.plugins()})


def test_what_a_desk_and_a_coordinator_hold_to_is_given_to_them(
    hospitals: Hospitals, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their defaults are for tests: between hospitals each is said, and there is one place that says it."""
    for what, known, where in ((Desk, DESK, "joining.py"), (Remote, REMOTE, "serving.py")):
        made = [(path.name, node) for path, tree in TREES.items() for node in ast.walk(tree)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == what.__name__]  # fmt: skip
        parameters = inspect.signature(what).parameters.values()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == known
        given = {keyword.arg for path, node in made if path == where for keyword in node.keywords}
        assert known - given <= {"patience", "durable", "event"}  # how fast, how safe from a power cut, for tests
        assert {path for path, _ in made} == {where}
    desk = joining.desk(office(hospitals.folder / "east"), ready)
    assert isinstance(desk.permit, Guard)
    assert isinstance(desk.seal, KeySeal)
    assert (desk.seal.theirs, desk.runs, bool(desk.limits)) == ("coordinator", 1, True)
    assert desk.most == 500_000_000
    assert desk.since() > 0


def test_there_is_one_seal_and_it_signs() -> None:
    signers = [
        (path.name, node.name) for path, tree in TREES.items() for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(getattr(f, "name", "") == "signer" for f in node.body)
    ]  # fmt: skip
    assert signers == [("sealing.py", "KeySeal"), ("envelope.py", "Seal")]
    assert getattr(envelope.Seal, "_is_protocol", False)


def test_nothing_is_held_by_an_assert() -> None:
    """``python -O`` leaves them out."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert) and path.parent.name in ("consortium", "engines"):
                assert re.fullmatch(r"\w+ is not None|isinstance\(\w+, \w+\)", ast.unparse(node.test)), path


def test_packages_can_bring_methods_models_and_tasks_and_nothing_else() -> None:
    groups = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("offered", "entry_points"):
                groups.add((path.parent.name, ast.unparse((node.args or [node.keywords[0].value])[0])))
    assert groups == {
        ("methods", "GROUP"), ("models", "GROUP"), ("tasks", "GROUP"),
        ("fedscan", "group"), ("engines", "'console_scripts'"),
    }  # fmt: skip


# -- a consortium ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    made = Hospitals(tmp_path_factory.mktemp("protections"))
    for name in SITES:
        made.approve(name)
        office(made.folder / name).keep(made.file)
    return made


@pytest.fixture(scope="module")
def ready(hospitals: Hospitals) -> Ready:
    """What east has made ready for the study."""
    at = office(hospitals.folder / "east")
    return joining.ready(at, hospitals.file, at.proposal(hospitals.file).asks, hospitals.folder / "cache")


def policy_of(values: Mapping[str, Any]) -> Policy:
    tables: dict[str, dict[str, Any]] = {"answers": {}, "leaves": {}}
    for key, value in values.items():
        table, name = key.split(".")
        tables[table][name] = value
    return Policy(answers=Answers(**tables["answers"]), leaves=Leaves(**tables["leaves"]))


# -- policies --------------------------------------------------------------------------------------------------------


def test_one_strict_key_of_a_policy_is_enough_whatever_the_others_are(hospitals: Hospitals, ready: Ready) -> None:
    """All 128 policies: a study is refused by each strict key, by no other, and cannot be approved then."""
    asks = replace(ready.asks, questions=tuple(replace(q, passed=True) for q in ready.asks.questions))
    home = member.read(hospitals.folder / "east")
    alone = {key: refusals(policy_of({**LOOSE, key: STRICT[key]}), asks, asks.cases) for key in STRICT}
    assert all(alone.values())
    for chosen in itertools.product(*([(key, True), (key, False)] for key in STRICT)):
        strict = [key for key, is_strict in chosen if is_strict]
        policy = policy_of({**LOOSE, **{key: STRICT[key] for key in strict}})
        said = refusals(policy, asks, asks.cases)
        assert set(said) >= {sentence for key in strict if key != "answers.questions" for sentence in alone[key]}
        assert bool(said) == bool(strict)
        if strict:
            with pytest.raises(Refused, match="the policy refuses this study"):
                approval.decide(home, asks, policy, said, who="east")
        # and a yes that was given under any other policy does not hold under this one
        assert approval.standing(home, ready.asks, policy, said).state == "proposed"


def test_outside_its_hours_nothing_is_answered_whatever_else_the_policy_says(
    hospitals: Hospitals, ready: Ready, tmp_path: Path
) -> None:
    folder = copied(hospitals, tmp_path / "east")
    lines = [f"{key.split('.')[1]} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for key, v in LOOSE.items()]
    (folder / "policy.toml").write_text(
        "\n".join(["[answers]", 'windows = ["Mon 00:00-00:01"]', *lines[:4], "[leaves]", *lines[4:]])
    )
    at = office(folder)
    assert policy_of({**LOOSE, "answers.windows": ("Mon 00:00-00:01",)}) == at.policy
    approval.decide(at.home, ready.asks, at.policy, [], who="east")
    now = datetime.now(UTC).astimezone().replace(hour=12)
    tuesday = now + timedelta(days=(1 - now.weekday()) % 7 or 7)
    guard = Guard(at, ready.asks, ready.held, lambda: tuesday)
    assert "east answers Mon 00:00-00:01" in guard("learn", 0)


# -- at a hospital: who may not take part does not -------------------------------------------------------------------


def copied(hospitals: Hospitals, folder: Path) -> Path:
    """A copy of east's folder, without what it kept of runs."""
    shutil.copytree(hospitals.folder / "east", folder, ignore=shutil.ignore_patterns("runs", "join.*", "door.json"))
    return folder


def undone(folder: Path, hospitals: Hospitals) -> None:
    at = office(folder)
    approval.reject(at.home, at.proposal(hospitals.file).asks, at.policy, "second thoughts", who="east")


def revoked(folder: Path, hospitals: Hospitals) -> None:
    root = folder.with_name("root")
    if not root.exists():
        shutil.copytree(hospitals.folder / "root", root)
        coordinator.revoke(root, "east", "it left")
    with suppress(Refused):
        member.take_roster(member.read(folder), root / "roster.json")


def flipped(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def another(folder: Path) -> None:
    """East of a consortium of the same name, with another root."""
    made = consortium(folder.with_name("another"), *SITES, now=datetime.now(UTC))["east"]
    for name in ("certificate.pem", "key.pem"):
        shutil.copy(made.folder / name, folder / name)


SPOILT: dict[str, Callable[[Path, Hospitals], object]] = {
    "nobody has said yes": lambda folder, _: shutil.rmtree(folder / "approvals"),
    "the yes is undone": undone,
    "the yes was changed": lambda folder, all_: flipped(folder, f"approvals/{hash_of(all_.file)}.json"),
    "the policy is another": lambda folder, _: (folder / "policy.toml").write_text("[answers]\nleast_cases = 6\n"),
    "there is no policy": lambda folder, _: (folder / "policy.toml").unlink(),
    "it is revoked": revoked,
    "it has no key": lambda folder, _: (folder / "key.pem").unlink(),
    "its key is another's": lambda folder, all_: shutil.copy(all_.folder / "west/key.pem", folder),
    "its key is open to others": lambda folder, _: (folder / "key.pem").chmod(0o644),
    "it has no certificate": lambda folder, _: (folder / "certificate.pem").unlink(),
    "its certificate is of another root": lambda folder, _: another(folder),
    "its roster was changed": lambda folder, _: flipped(folder, "roster.json"),
    "it knows no root": lambda folder, _: (folder / "root.pem").unlink(),
}
JOIN = {  # by option: what it may be given as, beside left out
    "study": [(), ("study.toml",), ("HASH",)], "engine": [("--engine", "loopback"), (), ("--engine", "flower")],
    "server": [("--server", "localhost:1")], "cache": [(), ("--cache", "elsewhere")],
    "metrics": [(), ("--metrics", "PORT")], "json": [(), ("--json",)], "folder": [("--folder", "FOLDER")],
}  # fmt: skip


@pytest.fixture
def begun(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was opened: a door to the desk, or a line to the coordinator, at which the command then ends."""
    found: list[str] = []

    @contextmanager
    def line(*given: Any) -> Iterator[None]:
        found.append("line")
        raise KeyboardInterrupt
        yield

    class Noted(Door):
        def __init__(self, *given: Any) -> None:
            found.append("door")
            super().__init__(*given)

    known: dict[tuple[Any, ...], Asks] = {}

    def played(file: Any, *given: Any) -> Asks:
        key = (hash_of(file), *given)
        known[key] = known[key] if key in known else asks_of(file, *given)
        return known[key]

    monkeypatch.setattr(proposals, "asks_of", played)
    monkeypatch.setattr(plugins, "entry_points", cache(plugins.entry_points))
    monkeypatch.setattr(joining, "ready", lambda *given: ready)
    monkeypatch.setattr("fedscan.consortium.carriers.to_coordinator", line)
    monkeypatch.setattr("fedscan.engines.doors.Door", Noted)
    return found


@pytest.mark.parametrize("states", [1, pytest.param(len(SPOILT), marks=pytest.mark.slow)])
def test_a_hospital_that_may_not_take_part_does_not_with_any_options(
    hospitals: Hospitals, fedscan: Command, tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch,
    states: int,
) -> None:  # fmt: skip
    """All 144 combinations, each with so many of the reasons why it may not; some also without any: it may, then."""
    assert set(JOIN) == set(OPTIONS["join"])
    shutil.copy(hospitals.folder / "study.toml", tmp_path)
    told = {"HASH": hash_of(hospitals.file)[:12], "PORT": str(free_port())}
    folders = {"": copied(hospitals, tmp_path / "sound" / "east")}
    for what, spoil in SPOILT.items():
        folders[what] = copied(hospitals, tmp_path / what.replace(" ", "-") / "east")
        spoil(folders[what], hospitals)
    reasons = itertools.cycle(SPOILT)
    combinations = list(itertools.product(["", "1"], *JOIN.values()))
    assert len(combinations) >= 2**6
    for number, (debug, *chosen) in enumerate(combinations):
        monkeypatch.setenv("FEDSCAN_DEBUG", debug)
        for what in [*itertools.islice(reasons, states), *([""] if number % 12 == 0 else [])]:
            words = [{**told, "FOLDER": str(folders[what])}.get(word, word) for option in chosen for word in option]
            begun.clear()
            try:
                code = fedscan("join", *words).code
            except Exception:
                assert debug
                code = 2
            assert (code, begun) == ((2, []) if what else (130, ["door", "line"])), (what, words)
    assert not list(tmp_path.glob("*/east/nvflare")) + list(tmp_path.glob("*/east/flower"))


# -- at a hospital: what nobody may ask is not done ------------------------------------------------------------------


@dataclass
class Asker:
    """Who would ask a desk something, with a seal and by what he likes."""

    desk: Desk
    seal: Any
    talk: Talk
    number: int = EPOCH

    def says(self, to: str = "east", **header: Any) -> dict[str, Any]:
        """The header of what the desk says."""
        self.number += 1
        whole = {"number": self.number, "act": "hello", **header}
        said = self.desk.handle(envelope.sealed(REQUEST, whole, b"", self.talk, to, self.seal))
        found: dict[str, Any] = wire.loads(envelope.signed_part(said))
        return found


def test_what_is_not_the_coordinators_question_of_the_agreed_study_is_not_heard(
    hospitals: Hospitals, ready: Ready, tmp_path: Path
) -> None:
    folder = copied(hospitals, tmp_path / "east")
    desk = joining.desk(office(folder), ready)
    charite = member.read(hospitals.folder / "charite")
    stranger = consortium(tmp_path / "other", *SITES, now=datetime.now(UTC))["charite"]
    talk = Talk(ready.asks.hash, "0" * 32, "charite")
    own = KeySeal(charite, "site")
    unheard = {
        "unsigned": Asker(desk, Unsigned("charite"), talk),
        "by another root's coordinator": Asker(desk, KeySeal(stranger, "site"), talk),
        "by another hospital": Asker(desk, KeySeal(member.read(hospitals.folder / "west"), "coordinator"), talk),
        "by the hospital itself": Asker(desk, KeySeal(member.read(folder), "coordinator"), talk),
        "of another study": Asker(desk, own, replace(talk, study="0" * 64)),
        "of no run": Asker(desk, own, replace(talk, run="")),
        "of old": Asker(desk, own, talk, -EPOCH),
    }
    for act in ("hello", "ask", "part", "fetch", "end"):
        for what, asker in unheard.items():
            assert asker.says(act=act)["status"] == "unheard", (act, what)
        assert Asker(desk, own, talk).says(to="west", act=act)["status"] == "unheard", act
    assert not list(folder.glob("runs/*/begun"))
    right = Asker(desk, own, talk)
    assert right.says()["status"] == "ready"
    question = {"act": "ask", "turn": [1, 0], "asked": "0" * 64, "base": None, "wait": 0.0, "payload": "0" * 64}
    question |= {"travels": 10, "recipe": [], "nbytes": 10}
    for refused in (
        {"question": "learn", "nbytes": 1 << 40},
        {"question": "all"},
        {"question": "learn", "turn": [9, 0]},
    ):
        assert right.says(**{**question, **refused})["status"] == "refused", refused
    undone(folder, hospitals)
    assert right.says()["status"] == "unheard"
    assert right.says(**question, question="learn")["status"] == "refused"
    assert not list(folder.glob("runs/*/turns/*"))


# -- at the coordinator: nothing is asked before everybody has agreed ------------------------------------------------

SERVE = {
    "study": [("study.toml",)], "folder": [("--folder", "charite")], "engine": [("--engine", "loopback")],
    "listen": [("--listen", "0.0.0.0:1")], "sites": [("--sites", ".")], "lease": [(), ("--lease", "1")],
    "longest": [(), ("--longest", "1")], "metrics": [(), ("--metrics", "PORT")], "json": [(), ("--json",)],
    "set_": [(), ("--set", "train.rounds=3")], "out": [()], "resume": [(), ("--resume",)],
}  # fmt: skip


def test_nobody_is_asked_before_all_have_agreed_with_any_options(
    hospitals: Hospitals, ready: Ready, fedscan: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 64 combinations: east agrees to the study as it is; as west speaks who has not agreed, or is not west."""
    assert set(SERVE) == set(OPTIONS["serve"])
    for name in ("charite", "study.toml"):
        copy = shutil.copytree if (hospitals.folder / name).is_dir() else shutil.copy
        copy(hospitals.folder / name, tmp_path / name)
    at = office(copied(hospitals, tmp_path / "east"))
    desk = joining.desk(at, ready)
    stranger = consortium(tmp_path / "other", *SITES, now=datetime.now(UTC))["west"]
    west = KeySeal(member.read(hospitals.folder / "west"), "coordinator")
    agrees = {"status": "ready", **joining.told(ready)}
    says = [
        (Unsigned("west"), agrees), (KeySeal(stranger, "coordinator"), agrees), (desk.seal, agrees),
        (west, {"status": "unheard", "why": "west does not agree to this study"}),
    ]  # fmt: skip
    acts: list[str] = []
    turns = itertools.count()

    class Carrier:
        manner = Doors({}).manner

        def __init__(self, folders: Mapping[str, Path]) -> None: ...

        def call(self, site: str, request: bytes, seconds: float) -> bytes:
            header = wire.loads(envelope.signed_part(request))
            acts.append(header["act"])
            if site == "east":
                return desk.handle(request)
            if (turn := next(turns) % 5) == 4 and header["act"] == "hello":
                raise KeyboardInterrupt
            seal, said = says[turn % 4]
            talk = Talk(header["study"], header["run"], "charite")
            return envelope.sealed(ANSWER, {**said, "of": envelope.mark(request)}, b"", talk, "charite", seal)

    monkeypatch.setattr("fedscan.consortium.carriers.Doors", Carrier)
    monkeypatch.setattr(serving, "GREETING", 0.0)
    monkeypatch.setattr(prometheus, "LAST", 0.0)
    monkeypatch.setattr(plugins, "entry_points", cache(plugins.entry_points))
    told = {"PORT": str(free_port())}
    combinations = list(itertools.product(*SERVE.values()))
    assert len(combinations) >= 2**6
    for number, chosen in enumerate(combinations):
        words = [told.get(word, word) for option in chosen for word in option]
        run = tmp_path / f"run{number // 2}"  # --resume is the last: it goes on with the one before
        acts.clear()
        said = fedscan("serve", *words, "--out", run)
        assert said.code == 130, (words, said)
        assert set(acts) == {"hello"}, words
        assert len(acts) >= 4
        assert not (run / "study.json").exists()
        assert '"stopped"' in (run / "status.json").read_text()


# -- engines: TLS between certificates of the consortium, with any arguments -----------------------------------------


def test_nvflare_is_made_ready_with_certificates_both_ways_for_any_arguments(
    hospitals: Hospitals, tmp_path: Path
) -> None:
    assert set(inspect.signature(nvflare.coordinator).parameters) == {"home", "folder", "port", "host"}
    assert set(inspect.signature(nvflare.site).parameters) == {"home", "folder", "server", "identity", "door"}
    charite, east = (member.read(hospitals.folder / name) for name in ("charite", "east"))
    for number, (port, host) in enumerate(itertools.product((1, 8002), ("0.0.0.0", "localhost", "fl.hospital.org"))):
        folders = tmp_path / f"c{number}", tmp_path / f"s{number}"
        nvflare.coordinator(charite, folders[0], port, host)
        nvflare.site(east, folders[1], f"{host}:{port}", "charite", tmp_path)
        for folder, home in zip(folders, (charite, east), strict=True):
            files = {path.name: wire.loads(path.read_bytes()) for path in folder.rglob("*.json")}
            (told,) = (files[name] for name in ("fed_server.json", "fed_client.json") if name in files)
            told = told.get("client") or told["servers"][0]
            assert told["connection_security"] == "mtls"
            for key, name in (("ssl_cert", "certificate"), ("ssl_private_key", "key"), ("ssl_root_cert", "root")):
                assert Path(told[key]) == (home.folder / f"{name}.pem").resolve()
            line, resources = files["comm_config.json"], files["resources.json"]
            assert (line["allow_adhoc_conns"], line["internal"]["resources"]["connection_security"]) == (False, "mtls")
            assert resources["class_list_enforcement_mode"] == "enforce"
            assert resources["class_allow_list"] == [nvflare.COURIER]
            rights = files["authorization.json"]["permissions"]
            assert set(rights.values()) == {"none"}
            assert set(rights) == {"project_admin", "org_admin", "lead", "member"}


def test_what_an_engine_inherits_of_the_environment_is_little(
    hospitals: Hospitals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all variables that could be set, by name those of Flower, NVFlare, gRPC, OpenSSL and Python too."""
    monkeypatch.setenv("FEDSCAN_NVFLARE_PYTHON", "/bin/sh")
    monkeypatch.setenv("FEDSCAN_FLOWER_PYTHON", "/bin/sh")
    charite = member.read(hospitals.folder / "charite")
    engines = [of.coordinator(charite, tmp_path / of.__name__, 8002) for of in (nvflare, flower)]
    before = [engine.environment() for engine in engines]
    hostile = "FLWR_TELEMETRY_ENABLED FLWR_INSECURE NVFLARE_SECURE_MODE SSLKEYLOGFILE SSL_CERT_FILE PYTHONPATH HOME"
    for name in [*hostile.split(), "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "PYTHONINSPECT", "PYTHONOPTIMIZE"]:
        monkeypatch.setenv(name, "1")
    for engine, known in zip(engines, before, strict=True):
        assert engine.environment() == known
        ours = {"HOME", "OMP_NUM_THREADS", "SSL_CERT_FILE", "SSL_CERT_DIR", *flower.QUIET, *flower.LARGE, *nvflare.LEAN}
        assert set(known) <= KEPT | ours
    assert before[1]["FLWR_TELEMETRY_ENABLED"] == "0"


@pytest.fixture
def gate(hospitals: Hospitals, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Where Flower's coordinator lets others in, as its keeper opens it."""
    assert set(inspect.signature(flower.coordinator).parameters) == {"home", "folder", "port", "host"}
    port = free_port()
    flower.coordinator(member.read(hospitals.folder / "charite"), tmp_path / "flower", port, "localhost")
    end = AtCoordinator(tmp_path / "flower", wire.loads((tmp_path / "flower" / flower.MEMBER).read_bytes()))
    yield "localhost", port
    end.close()


def test_flowers_gate_speaks_tls_with_members_and_with_nobody_else(
    hospitals: Hospitals, tmp_path: Path, gate: tuple[str, int]
) -> None:
    def said(context: ssl.SSLContext | None) -> bytes:
        with socket.create_connection(gate, timeout=10) as plain, suppress(ssl.SSLError, ConnectionError):
            sock = context.wrap_socket(plain, server_hostname="charite") if context else plain
            sock.sendall(b"GET /v1/orders HTTP/1.1\r\n\r\n")
            return sock.recv(100)
        return b""

    without = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    without.load_verify_locations(hospitals.folder / "east/root.pem")
    old = certified(hospitals.folder / "east")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    stranger = certified(consortium(tmp_path / "other", *SITES, now=datetime.now(UTC))["east"].folder)
    stranger.load_verify_locations(hospitals.folder / "east/root.pem")
    for context in (None, without, old, stranger):
        assert b"403" not in said(context)
    assert said(certified(hospitals.folder / "east")).startswith(b"HTTP/1.1 403")  # a member, whose order is refused
