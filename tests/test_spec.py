"""What does not fit is refused by a sentence, before a method sees it."""

import math
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan import wire
from fedscan.averaging import averaging
from fedscan.memory import Base
from fedscan.method import Absent, Method, Sites, State
from fedscan.recorded import Answer, Letter
from fedscan.run import run
from fedscan.schema import Kind, Leaf, Schema, Weights
from fedscan.spec import Array, Blob, Group, Leaves, Maybe, Number, Refused, Spec, Table, Text, brief, finite
from fedscan.study import Study
from toy import same
from toy import study as toy_study

torch.set_num_threads(1)
NAN, INF = math.nan, math.inf
SCHEMA: Schema = {
    "w": Leaf((2, 3), torch.float32, Kind.PARAMETER),
    "var": Leaf((3,), torch.bfloat16, Kind.STATISTIC),
    "n": Leaf((), torch.int64, Kind.COUNTER),
}


def fitting() -> Weights:
    return Weights(
        {"w": torch.ones(2, 3), "var": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)},
        {"var": Kind.STATISTIC},
    )


def without(name: str) -> Weights:
    return fitting().only(fitting().keys() - {name})


def put(name: str, leaf: torch.Tensor, kind: Kind | None = None) -> Weights:
    w = fitting()
    return Weights({**w, name: leaf}, {**w.kinds, name: kind or w.kinds.get(name, Kind.PARAMETER)})


COLUMNS: dict[str, Spec] = {"case": Text(), "dice": Number(0, 1, optional=True)}
ACCEPTED: list[tuple[Spec, Any]] = [
    (Number(), 3), (Number(), -0.5), (Number(), 2**64 - 1), (Number(0, 1), 0), (Number(0, 1), 1.0),
    (Number(whole=True), -4), (Number(optional=True), None),
    (Text(), ""), (Text(3), "äöü"), (Text(), "case 12 (left)"),
    (Leaves(SCHEMA), fitting()), (Leaves({}), Weights({})),
    (Blob(4), torch.zeros(4, dtype=torch.uint8)), (Blob(4), torch.zeros(0, dtype=torch.uint8)),
    (Array((2, -1)), torch.ones(2, 7)), (Array((), torch.int64), torch.tensor(3)),
    (Array((-1,), limit=0), torch.ones(0)),
    (Table(COLUMNS), []), (Table(COLUMNS), [["a", 0.5], ["b", None]]),
    (Group({"a": Number(), "b": Maybe(Text())}), {"a": 1}),
    (Group({"a": Number(), "b": Maybe(Text())}), {"a": 1, "b": ""}),
    (Group({}, others=Number()), {f"n{i}": i for i in range(64)}),
    (Group({"g": Group({"x": Number()})}), {"g": {"x": 1}}),
]  # fmt: skip
REFUSED: list[tuple[Spec, Any, str]] = [
    (Number(), None, "X should be a number, not None"),
    (Number(), True, "X should be a number, not True"),
    (Number(), "3", "X should be a number, not '3'"),
    (Number(), [3], "X should be a number, not a list of 1"),
    (Number(), torch.ones(()), "X should be a number, not a torch.float32 tensor"),
    (Number(), NAN, "X is not finite"),
    (Number(), -INF, "X is not finite"),
    (Number(), 10**400, "X is not finite"),
    (Number(optional=True), NAN, "X is not finite"),
    (Number(0, 1), 1.1, "X is 1.1, outside 0 to 1"),
    (Number(low=1, whole=True), 0, "X is 0, outside 1 to inf"),
    (Number(0, 1), 10**300, "X is a very large number, outside"),
    (Number(whole=True), 2.0, "X should be a whole number, not 2.0"),
    (Text(3), "four", "X should be text of at most 3 printable characters, not 'four'"),
    (Text(), 3, "X should be text"),
    (Text(), None, "X should be text"),
    (Text(), "a\x1b[2Jb", "X should be text"),
    (Text(), "a\nb", "X should be text"),
    (Text(), "\ud800", "X should be text"),
    (Leaves(SCHEMA), dict(fitting()), "X should be weights, not a dict of 3"),
    (Leaves(SCHEMA), torch.ones(2), "X should be weights, not a torch.float32 tensor"),
    (Leaves(SCHEMA), without("var"), "X lacks the leaf 'var'"),
    (Leaves(SCHEMA), put("evil", torch.ones(1)), "X holds an unknown leaf 'evil'"),
    (Leaves(SCHEMA), put("w", torch.ones(3, 2)), "leaf 'w' is (3, 2) torch.float32 parameter, and should be (2, 3)"),
    (Leaves(SCHEMA), put("w", torch.ones(2, 3).half()), "leaf 'w' is (2, 3) torch.float16"),
    (Leaves(SCHEMA), put("var", torch.ones(3).bfloat16(), Kind.PARAMETER), "torch.bfloat16 parameter, and should be"),
    (Leaves(SCHEMA), put("n", torch.tensor(3), Kind.STATISTIC), "leaf 'n' is () torch.int64 statistic"),
    (Leaves(SCHEMA), put("w", torch.full((2, 3), NAN)), "X: leaf 'w' is not finite"),
    (Leaves(SCHEMA), put("w", torch.tensor([[1, 2, 3], [INF, -INF, 1.0]])), "X: leaf 'w' is not finite"),
    (Leaves(SCHEMA), put("var", torch.tensor([1, INF, 1]).bfloat16()), "X: leaf 'var' is not finite"),
    (Blob(4), torch.zeros(5, dtype=torch.uint8), "X has 5 bytes; at most 4 were expected"),
    (Blob(4), torch.zeros(2, 2, dtype=torch.uint8), "X should be bytes, not a torch.uint8 tensor of shape (2, 2)"),
    (Blob(4), torch.zeros(4), "X should be bytes, not a torch.float32 tensor"),
    (Blob(4), "abcd", "X should be bytes, not 'abcd'"),
    (Array((2, -1)), torch.ones(3, 7), "X has shape (3, 7), and should have (2, -1)"),
    (Array((2, -1), limit=6), torch.ones(2, 7), "X has shape (2, 7), and should have (2, -1)"),
    (Array((2,)), torch.ones(2, 1), "X should be a torch.float32 tensor of shape (2,), not a torch.float32 tensor"),
    (Array((2,)), torch.ones(2).double(), "not a torch.float64 tensor of shape (2,)"),
    (Array((2,)), torch.tensor([1.0, NAN]), "X is not finite"),
    (Array((2,)), [1.0, 2.0], "not a list of 2"),
    (Table(COLUMNS), {"a": 1}, "X should be a table of at most 1000000 rows, not a dict of 1"),
    (Table(COLUMNS, limit=1), [["a", 1], ["b", 1]], "X should be a table of at most 1 rows, not a list of 2"),
    (Table(COLUMNS), [["a", 1], ["b"]], "X: row 1 should have the entries case, dice"),
    (Table(COLUMNS), ["ab"], "X: row 0 should have the entries case, dice"),
    (Table(COLUMNS), [["a", 1], ["b", NAN]], "X: dice of row 1 is not finite"),
    (Table(COLUMNS), [["a", 1.5]], "X: dice of row 0 is 1.5, outside 0 to 1"),
    (Group({"a": Number()}), {}, "X lacks 'a'"),
    (Group({"a": Number()}), {"a": 1, "b": 2}, "X holds 'b', which was not asked for"),
    (Group({"a": Number()}), [1], "X should have the entries a, not be a list of 1"),
    (Group({"a": Number()}), Weights({}), "X should have the entries a, not be a weights of 0"),
    (Group({"a": Maybe(Number())}), {"a": None}, "X: a should be a number"),
    (Group({"a": Group({"b": Number()})}), {"a": {"b": INF}}, "X: a: b is not finite"),
    (Group({}, others=Number()), {"loss": NAN}, "X: loss is not finite"),
    (Group({}, others=Number()), {"loss": {"deep": 1}}, "X: loss should be a number, not a dict of 1"),
    (Group({}, others=Number()), {f"n{i}": i for i in range(65)}, "X holds 65 further entries; at most 64"),
    (Group({}, others=Number()), {"\ud800": 1}, "X: the name of an entry should be text"),
    (Group({}, others=Number()), {"n" * 10_000: 1}, "X: the name of an entry should be text"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "value"), ACCEPTED)
def test_what_fits_is_accepted(spec: Spec, value: Any) -> None:
    spec.check(value, "X")


@pytest.mark.parametrize(("spec", "value", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused_by_a_sentence(spec: Spec, value: Any, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        spec.check(value, "X")
    assert sentence in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(torch.ones(2)) | st.just(fitting()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(anything)
def test_no_value_brings_a_check_down(value: Any) -> None:
    for spec in [s for s, _ in ACCEPTED]:
        said = sentence_of(spec, value)
        assert said.startswith("X") or not said
        assert said.isprintable()


def sentence_of(spec: Spec, value: Any) -> str:
    """Why a value is refused; nothing where it is accepted."""
    try:
        spec.check(value, "X")
    except Refused as e:
        return str(e)
    return ""


@settings(max_examples=100, deadline=None)
@given(st.integers() | st.floats(), st.floats(-10, 0), st.floats(0, 10))
def test_a_number_is_accepted_within_its_bounds_only(value: float, low: float, high: float) -> None:
    assert bool(sentence_of(Number(low, high), value)) != (low <= value <= high)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["w", "var"]), st.integers(0, 5), st.sampled_from([NAN, INF, -INF]))
def test_one_entry_that_is_not_finite_is_found_anywhere(name: str, at: int, bad: float) -> None:
    w = fitting()
    flat = w[name].view(-1)
    flat[at % flat.numel()] = bad
    with pytest.raises(Refused, match=f"X: leaf '{name}' is not finite"):
        Leaves(SCHEMA).check(w, "X")


def test_large_finite_leaves_whose_sum_overflows_are_finite() -> None:
    assert finite(torch.full((1000,), 3e38))
    assert finite(torch.full((1000,), 6e4).half())
    assert not finite(torch.cat([torch.full((1000,), 3e38), torch.tensor([NAN])]))
    assert not finite(torch.tensor([3e38, 3e38, -INF]))


def test_brief_is_brief() -> None:
    for value in ("x" * 10**6, 10**5000, -(10**5000), [1] * 10**5, {"a": fitting()}, torch.ones(3, 3), object()):
        assert len(brief(value)) < 80


# -- through the journal ---------------------------------------------------------------------------------------------

NAMES = ("amsterdam", "bergen", "cairo")
Site = Callable[[Letter], Any]  # gives a reply, or an Answer


def honest(letter: Letter, by: float = 1.0) -> dict[str, Any]:
    x = letter.message["weights"]
    change = Weights({k: torch.full_like(v, by) for k, v in x.items()}, x.kinds)
    return {"update": change, "cases": 2, "loss": 0.5}


class Fake:
    """An engine whose sites say what a test tells them to."""

    def __init__(self, study: Study, folder: Path, sites: dict[str, Site]) -> None:
        self.study, self.folder, self.names, self.sites = study, folder, study.names, sites
        self.letters: list[Letter] = []
        self.waiting: list[Letter] = []

    def send(self, letters: Sequence[Letter]) -> None:
        self.letters += letters
        self.waiting += letters

    def receive(self, started: bool) -> Answer:
        letter = self.waiting.pop(0)
        if letter.question == "evaluate":
            return Answer(letter.turn, {"rows": []})
        say: Site = self.sites.get(letter.turn.site, honest)
        given = say(letter)
        if isinstance(given, Answer):
            return given
        with suppress(TypeError, ValueError):  # what cannot even travel is for Recorded to refuse
            return Answer(letter.turn, given, digest=wire.pack(given).digest, seconds=1.0)
        return Answer(letter.turn, given, seconds=1.0)

    def keep(self, answers: Sequence[Answer], whole: bool) -> None:
        for answer in answers if whole else ():
            if answer.file is None:
                answer.file = self.folder / f"{answer.turn}.safetensors"
                wire.write_file(answer.file, wire.pack(answer.read()))
                answer.reply = None

    def settle(self, needed: Callable[[str], Sequence[Base]]) -> None: ...

    def close(self) -> None: ...


class Seen:
    """FedAvg that notes whose replies its rounds saw."""

    def __init__(self) -> None:
        self.names: list[tuple[str, ...]] = []
        self.missing: list[tuple[str, ...]] = []

    def method(self) -> Method:
        base = averaging()

        def round(sites: Sites, state: State) -> State:
            class Spy:
                def __getattr__(self, name: str) -> Any:
                    return getattr(sites, name)

                def ask_each(_, question: Any, messages: Any, **how: Any) -> Any:
                    replies = sites.ask_each(question, messages, **how)
                    self.names.append(tuple(replies))
                    self.missing.append(replies.missing)
                    return replies

            return base.round(Spy(), state)

        return Method(base.init, round, base.answers, base.use)


def carried_out(
    folder: Path, sites: dict[str, Site], seen: Seen | None = None, resume: bool = False, **changes: Any
) -> tuple[State, Fake]:
    made: list[Fake] = []

    def engine(study: Study, folder: Path) -> Fake:
        made.append(Fake(study, folder, sites))
        return made[0]

    how = {k: changes.pop(k) for k in ("commit_seconds", "event") if k in changes}
    plan = toy_study((seen or Seen()).method(), **{"rounds": 1, **changes})
    return run(plan, folder, engine=engine, resume=resume, **how), made[0]


def ledger(folder: Path) -> dict[str, tuple[str, str]]:
    """Status and why of every site's turn of round 1."""
    db = sqlite3.connect(folder / "journal.sqlite")
    found = db.execute("SELECT site, status, why FROM turns WHERE round = 1").fetchall()
    db.close()
    return {site: (status, why) for site, status, why in found}


def lie(letter: Letter, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    reply = honest(letter)
    change(reply)
    return reply


def put_leaf(reply: dict[str, Any], name: str, leaf: torch.Tensor | None, kind: Kind = Kind.PARAMETER) -> None:
    w: Weights = reply["update"]
    leaves = {k: v for k, v in {**w, name: leaf}.items() if v is not None}
    reply["update"] = Weights(leaves, {**w.kinds, name: kind})


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no update": (lambda r: r.pop("update"), "lacks 'update'"),
    "no cases": (lambda r: r.pop("cases"), "lacks 'cases'"),
    "zero cases": (lambda r: r.update(cases=0), "cases is 0, outside 1 to 1000000"),
    "half a case": (lambda r: r.update(cases=1.5), "cases should be a whole number"),
    "true cases": (lambda r: r.update(cases=True), "cases should be a whole number"),
    "endless cases": (lambda r: r.update(cases=10**400), "cases is not finite"),
    "NaN loss": (lambda r: r.update(loss=NAN), "loss is not finite"),
    "text": (lambda r: r.update(note="name of a patient"), "note should be a number"),
    "more leaves": (lambda r: put_leaf(r, "image", torch.ones(9)), "holds an unknown leaf 'image'"),
    "a leaf less": (lambda r: put_leaf(r, "head.bias", None), "lacks the leaf 'head.bias'"),
    "other shape": (lambda r: put_leaf(r, "head.bias", torch.ones(3)), "leaf 'head.bias' is (3,)"),
    "other dtype": (lambda r: put_leaf(r, "head.bias", torch.ones(2).double()), "torch.float64"),
    "other kind": (lambda r: put_leaf(r, "head.bias", torch.ones(2), Kind.STATISTIC), "statistic, and should be"),
    "NaN": (lambda r: put_leaf(r, "head.bias", torch.tensor([0, NAN])), "leaf 'head.bias' is not finite"),
    "infinite": (lambda r: put_leaf(r, "head.bias", torch.tensor([INF, 0])), "leaf 'head.bias' is not finite"),
    "a tensor": (lambda r: r.update(update=torch.ones(3)), "update should be weights"),
    "hidden images": (lambda r: r.update(scan=torch.ones(4, 4)), "scan should be a number"),
    "odd name": (lambda r: r.update({"\ud800": 1.0}), "the name of an entry should be text"),
}


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_does_not_fit_is_refused_before_the_method_sees_it(name: str, tmp_path: Path) -> None:
    change, sentence = LIES[name]
    seen = Seen()
    sites: dict[str, Site] = {
        "amsterdam": partial(honest, by=1.0),
        "bergen": partial(honest, by=3.0),
        "cairo": lambda letter: lie(letter, change),
    }
    state, engine = carried_out(tmp_path / "run", sites, seen)
    assert seen.names == [("amsterdam", "bergen")]
    assert seen.missing == [("cairo",)]
    rows = ledger(tmp_path / "run")
    status, why = rows["cairo"]
    assert status == "refused"
    assert why.startswith("the answer of cairo to learn")
    assert sentence in why
    assert rows["amsterdam"] == rows["bergen"] == ("answered", "")
    start = engine.study.start()["weights"]
    for leaf in ("head.weight", "first.running_mean"):  # the mean of +1 and +3, two cases each
        assert torch.equal(state["weights"][leaf], start[leaf] + 2)


@pytest.mark.parametrize("data", [b"", b"half", b"\x08" + bytes(15), b"cut"])
def test_a_file_that_is_no_message_is_refused(data: bytes, tmp_path: Path) -> None:
    def broken(letter: Letter) -> Answer:
        path = tmp_path / "answer.safetensors"
        path.write_bytes(bytes(wire.pack(honest(letter)))[:-3] if data == b"cut" else data)
        return Answer(letter.turn, file=path)

    seen = Seen()
    carried_out(tmp_path / "run", {"cairo": broken}, seen)
    assert seen.names == [("amsterdam", "bergen")]
    status, why = ledger(tmp_path / "run")["cairo"]
    assert status == "refused"
    assert len(why) > 15


def test_all_refused_and_the_round_is_skipped(tmp_path: Path) -> None:
    sites: dict[str, Site] = {name: lambda letter: {} for name in NAMES}
    state, engine = carried_out(tmp_path / "run", sites, rounds=2)
    assert same(state, engine.study.start())
    assert {status for status, _ in ledger(tmp_path / "run").values()} == {"refused"}


@pytest.mark.parametrize("commit_seconds", [0.0, 1e9])
@pytest.mark.parametrize("fault", ["refused", "absent"])
def test_stop_stops_and_goes_on_when_resumed(fault: str, commit_seconds: float, tmp_path: Path) -> None:
    """A site that lied or was silent is asked again when the run is resumed, the others are not."""

    def faulty(letter: Letter) -> Any:
        return {} if fault == "refused" else Answer(letter.turn, absent="cairo is silent", changed=False)

    how: dict[str, Any] = {"absent": "stop", "commit_seconds": commit_seconds}
    with pytest.raises(Absent, match="no answer to 'learn' from cairo"):
        carried_out(tmp_path / "run", {"cairo": faulty}, **how)
    assert ledger(tmp_path / "run")["cairo"][0] == fault
    assert ledger(tmp_path / "run")["bergen"][0] == "answered"
    with pytest.raises(Absent, match="no answer to 'learn' from cairo"):
        carried_out(tmp_path / "run", {"cairo": faulty}, resume=True, **how)
    state, engine = carried_out(tmp_path / "run", {}, resume=True, **how)
    assert [x.turn.site for x in engine.letters if x.question == "learn"] == ["cairo"]
    assert engine.letters[0].again
    expected, _ = carried_out(tmp_path / "whole", {}, **how)
    assert same(state, expected)
    assert ledger(tmp_path / "run") == dict.fromkeys(NAMES, ("answered", ""))


def test_wait_asks_again_until_there_is_an_answer(tmp_path: Path) -> None:
    silences = 2

    def slow(letter: Letter) -> Any:
        nonlocal silences
        silences -= 1
        return Answer(letter.turn, absent="not yet") if silences >= 0 else honest(letter)

    seen = Seen()
    state, engine = carried_out(tmp_path / "run", {"bergen": slow}, seen, absent="wait")
    assert [x.again for x in engine.letters if x.turn == (1, 0, "bergen")] == [False, True, True]
    assert seen.names == [NAMES]
    assert same(state, carried_out(tmp_path / "whole", {})[0])


def test_wait_does_not_wait_for_one_that_is_refused(tmp_path: Path) -> None:
    """The same question would have the same answer for ever."""
    seen = Seen()
    carried_out(tmp_path / "run", {"bergen": lambda letter: {}}, seen, absent="wait")
    assert seen.missing == [("bergen",)]


def test_a_refused_answer_stays_refused_when_resumed(tmp_path: Path) -> None:
    """What is in the journal decides, even if the site would now say something better."""
    seen = Seen()

    def dies(event: str) -> None:
        if event == "closed 1.0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carried_out(tmp_path / "run", {"cairo": lambda letter: {}}, commit_seconds=0.0, event=dies)
    _, engine = carried_out(tmp_path / "run", {}, seen, resume=True, commit_seconds=0.0)
    assert seen.names == [("amsterdam", "bergen")]
    assert [x for x in engine.letters if x.question == "learn"] == []
