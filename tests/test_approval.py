"""A hospital's yes: to one study, as it was read, under one policy. Nothing that is changed afterwards is approved."""

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedscan.consortium import approval, signed
from fedscan.consortium.approval import (
    Decision,
    Standing,
    decide,
    decision_in,
    end_of,
    file_of,
    last_approved,
    reject,
    standing,
)  # fmt: skip
from fedscan.consortium.asks import Asks, hash_of, mark
from fedscan.consortium.member import Home
from fedscan.consortium.policy import Policy
from fedscan.run import Problem
from fedscan.spec import Refused
from fedscan.studyfile import load
from fedscan.studyfile.file import again
from hospitals import NOW, consortium
from test_policy import ASKS
from tinystudy import STUDY

DAY, LATER = timedelta(days=1), NOW + timedelta(hours=1)
DEFAULT = Policy()
STRICT = Policy.model_validate({"answers": {"least_cases": 40}})
LOOSE = Policy.model_validate({"answers": {"least_cases": 1}})
TEXT = STUDY.format(method="fedavg", more='momentum = 0.9\n\n[run]\nabsent = "wait"\n').replace("0.01", "1.0")


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Home]:
    return consortium(tmp_path_factory.mktemp("consortium"), "east", "west")


@pytest.fixture
def east(homes: dict[str, Home]) -> Iterator[Home]:
    """The hospital, without any decision."""
    yield homes["east"]
    for path in (homes["east"].folder / "approvals").glob("*"):
        path.unlink()


def state(home: Home, asks: Asks = ASKS, policy: Policy = DEFAULT, now: datetime = LATER, **more: Any) -> str:
    return standing(home, asks, policy, now=now, **more).state


def yes(home: Home, asks: Asks = ASKS, policy: Policy = DEFAULT, **how: Any) -> Path:
    return decide(home, asks, policy, [], who="Dr. B", **{"now": NOW, **how})


def test_it_is_proposed_approved_expired_rejected(east: Home) -> None:
    assert standing(east, ASKS, Policy(), now=NOW).why == "nobody has decided on it"
    path = yes(east, until=NOW + DAY)
    assert path == east.folder / "approvals" / f"{ASKS.hash}.json"
    assert path.parent.stat().st_mode & 0o077 == 0
    found = standing(east, ASKS, Policy(), now=LATER)
    assert found.state == "approved"
    assert found.why == "by Dr. B on 2026-03-02 09:00 UTC until 2026-03-03 09:00 UTC"
    assert state(east, now=NOW + DAY - timedelta(seconds=1)) == "approved"
    assert state(east, now=NOW + DAY) == "expired"
    assert state(east, now=NOW - timedelta(minutes=9)) == "approved"
    assert state(east, now=NOW - timedelta(minutes=11)) == "proposed"
    reject(east, ASKS, Policy(), "the ethics board  said no", who="Dr. B", now=LATER)
    found = standing(east, ASKS, Policy(), now=LATER)
    assert (found.state, found.why) == ("rejected", "the ethics board said no")
    assert state(east, policy=LOOSE) == "rejected"
    yes(east, now=LATER)
    assert state(east) == "approved"


def test_whatever_is_another_brings_it_back_to_proposed(east: Home) -> None:
    yes(east, policy=Policy())
    assert state(east) == "approved"
    assert state(east, policy=STRICT) == "proposed"
    assert state(east, policy=LOOSE) == "proposed"
    assert state(east, refused=["You have too few cases."]) == "proposed"
    for changed in (
        replace(ASKS, hash="b" * 64),
        replace(ASKS, rounds=6),
        replace(ASKS, coordinator="lyon"),
        replace(ASKS, sites=("east", "south", "west")),
        replace(ASKS, version="9"),
        replace(ASKS, questions=ASKS.questions[:1]),
        replace(ASKS, questions=(replace(ASKS.questions[0], up=1), *ASKS.questions[1:])),
        replace(ASKS, questions=(replace(ASKS.questions[0], privacy="images"), *ASKS.questions[1:])),
    ):
        assert state(east, changed) == "proposed", changed


def test_what_cannot_be_approved(east: Home, homes: dict[str, Home]) -> None:
    with pytest.raises(Refused, match="the policy refuses this study: You have too few cases"):
        decide(east, ASKS, Policy(), ["You have too few cases."], who="B", now=NOW)
    with pytest.raises(ValueError, match="give a later --until"):
        yes(east, until=NOW)
    with pytest.raises(ValueError, match="--who takes a name"):
        decide(east, ASKS, Policy(), [], who=" ", now=NOW)
    with pytest.raises(ValueError, match="--why takes a reason"):
        reject(east, ASKS, Policy(), "", who="B", now=NOW)
    with pytest.raises(ValueError, match="is not the hash of a study"):
        yes(east, replace(ASKS, hash="../../" + "a" * 58))
    with pytest.raises(Refused, match="charite is a coordinator of the consortium"):
        yes(homes["charite"])
    with pytest.raises(Refused, match="check the clock"):
        yes(east, now=NOW + 3000 * DAY)
    with pytest.raises(ValueError, match="a day was meant, such as 2027-03-31"):
        end_of("31.3.2027")
    assert end_of("2026-03-02") == datetime.fromisoformat("2026-03-03T00:00:00+00:00")
    assert not list((east.folder / "approvals").glob("*.json"))


def test_another_hospitals_yes_is_none(east: Home, homes: dict[str, Home]) -> None:
    path = file_of(east, ASKS.hash)
    yes(east)
    path.write_bytes(yes(homes["west"], replace(ASKS)).read_bytes())
    found = standing(east, ASKS, Policy(), now=LATER)
    assert found.state == "proposed"
    assert "'west'" in found.why
    assert last_approved(east, now=LATER) is None


def test_a_file_that_was_touched_is_no_decision(east: Home) -> None:
    """Every byte, changed, and every end, cut off: 300 of each."""
    path = yes(east)
    data = path.read_bytes()
    step = len(data) // 300
    for at in range(0, len(data), step):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert state(east) == "proposed", at
        path.write_bytes(data[:at])
        assert state(east) == "proposed", at
    path.write_bytes(data)
    assert state(east) == "approved"


def test_a_signed_document_that_does_not_agree_with_itself_is_none(east: Home) -> None:
    """Whoever holds the key could sign anything; what is signed has still to be a decision, and one on its own asks."""
    path = yes(east)
    document = {k: v for k, v in signed.read(path).items() if k not in ("signer", "signature")}
    for change in (
        {"answer": "approve"}, {"study": "b" * 64}, {"mark": "b" * 64}, {"site": "west"}, {"more": 1}, {"asks": {}},
        {"when": "yesterday"}, {"asks": {**document["asks"], "rounds": 9}}, {"kind": "kit"}, {"until": 3},
    ):  # fmt: skip
        signed.write(path, signed.sign({**document, **change}, east.key, east.certificate))
        assert state(east) == "proposed", change
        with pytest.raises(Refused):
            decision_in(path, east, LATER)


def test_the_last_yes_is_what_a_new_study_is_compared_with(east: Home) -> None:
    first, second, third = (replace(ASKS, hash=c * 64, study=c) for c in "abc")
    assert last_approved(east, now=LATER) is None
    yes(east, first, now=NOW)
    yes(east, second, now=NOW + timedelta(minutes=5))
    reject(east, third, Policy(), "no", who="B", now=NOW + timedelta(minutes=9))
    found = last_approved(east, now=LATER)
    assert found is not None
    assert found.asks == replace(second, questions=found.asks.questions)
    assert found.asks.plain() == second.plain()
    assert mark(found.asks) == found.mark
    again_ = last_approved(east, second.hash, LATER)
    assert again_ is not None
    assert again_.study == first.hash


# -- a study that is changed after it was approved (threat T26) ------------------------------------------------------


def written_otherwise(text: str) -> Iterator[str]:
    """The same study, written in other ways."""
    lines = text.splitlines()
    yield "\ufeff" + text
    yield text.replace("\n", "\r\n")
    yield text.replace(" = ", "=")
    yield text.replace('"', "'")
    yield text.replace("lr = 1.0", "lr = 1").replace("0.6", "6e-1")
    yield text.replace("[16, 16, 16]", "[\n  16, # up\n  16,\n  16,\n]")
    yield text + "\n[scores]\n"
    yield text.replace("seed = 1", "seed = 0x1").replace("rounds = 2", "rounds = +2")
    for at in range(0, len(lines), 2):
        yield "\n".join([*lines[:at], "# a comment", "   ", *lines[at:]])
    head, *tables = text.split("\n\n")
    for turn in range(1, len(tables)):
        yield "\n\n".join([head, *tables[turn:], *tables[:turn]])
    for table in tables:
        name, *keys = table.splitlines()
        yield text.replace(table, "\n".join([name, *reversed(keys)]))


def trees(tree: Any) -> Iterator[Any]:
    """The resolved study with one value changed, in every place: see ``others``."""
    if isinstance(tree, Mapping):
        for key in tree:
            for changed in trees(tree[key]):
                yield {**tree, key: changed}
            if "a" in key:  # a Cyrillic letter in a name
                yield {(k.replace("a", "\u0430") if k == key else k): v for k, v in tree.items()}
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            for changed in trees(value):
                yield [*tree[:i], changed, *tree[i + 1 :]]
        yield [*tree, *tree[-1:]] if tree else ["x"]
        yield tree[:-1] if tree else [1]
    else:
        yield from others(tree)


def others(value: Any) -> Iterator[Any]:
    """Values that are not this one: next to it, of another type, or alike to the eye."""
    if isinstance(value, bool):
        yield from (not value, int(value), str(value).lower())
    elif isinstance(value, int | float):
        yield from (value + 1, value + 1e-9, -value - 1, bool(value), str(value), value * (1 + 2**-52) + 5e-324)
    elif isinstance(value, str):
        yield from (value + "\u200b", value + " ", value.upper() + "\u0301", value + "\r\n", value[:-1])
        for latin, other in (("a", "\u0430"), ("e", "\u0435"), ("o", "\u043e"), ("c", "\u0441")):
            if latin in value:
                yield value.replace(latin, other, 1)
        yield unicodedata.normalize("NFD", value + "\u00e9")
        yield unicodedata.normalize("NFC", value + "\u00e9")
    else:
        yield from (0, "", False)


def test_a_changed_study_is_not_approved_and_a_rewritten_one_is(east: Home, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(TEXT)
    file = load(path)
    base = replace(ASKS, hash=hash_of(file))
    decision = yes(east, base).read_bytes()
    same = 0
    for text in written_otherwise(TEXT):
        path.write_text(text, newline="")
        assert state(east, replace(ASKS, hash=hash_of(load(path)))) == "approved", text
        same += 1
    refused, seen = 0, {base.hash: json.dumps(file.resolved())}
    for tree in trees(file.resolved()):
        try:
            changed = again(tree, path)
        except Problem:
            refused += 1
            continue
        found, meant = hash_of(changed), json.dumps(changed.resolved())
        assert (found == base.hash) is (meant == seen[base.hash]), tree  # so where 1 stands and 1.0 is meant
        assert seen.setdefault(found, meant) == meant, tree
        if found == base.hash:
            continue
        other = replace(base, hash=found)
        assert state(east, other) == "proposed"
        file_of(east, found).write_bytes(decision)  # the yes to the first one, under the name of the other
        assert state(east, other) == "proposed"
        file_of(east, found).unlink()
    assert same >= 20
    assert len(seen) > 100
    assert same + refused + len(seen) >= 300, (same, refused, len(seen))


def test_one_and_one_point_nought_differ_only_where_they_mean_different_things(tmp_path: Path) -> None:
    def of(more: str) -> str:
        (tmp_path / "study.toml").write_text(TEXT.replace("augment = false", f"augment = false\n{more}"))
        return hash_of(load(tmp_path / "study.toml"))

    assert of("left_out_limit = 1") != of("left_out_limit = 1.0")  # one case, or all of them
    assert of("foreground = 1") == of("foreground = 1.0")
    with pytest.raises(Problem, match="left_out_limit"):
        of("left_out_limit = true")
    with pytest.raises(Problem):
        of("foreground = true")


# -- no path leads to "approved" for what was not signed -------------------------------------------------------------


@dataclass(frozen=True)
class Yes:
    """What was really signed."""

    study: str
    mark: str
    policy: str
    until: datetime | None


POLICIES = (Policy(), STRICT, LOOSE)
STUDIES = tuple(replace(ASKS, hash=c * 64, rounds=n, questions=()) for c, n in (("a", 5), ("a", 6), ("b", 5)))
some_study, some_policy = st.sampled_from(STUDIES), st.sampled_from(POLICIES)


class Hospital(RuleBasedStateMachine):
    """A hospital decides, its policy changes, time goes by, and somebody moves its files about and edits them."""

    home: Home  # made once, below
    touched: frozenset[str] = frozenset()  # the studies that the last step may have to do with
    every = frozenset(asks.hash for asks in STUDIES)

    @initialize()
    def begin(self) -> None:
        folder = self.home.folder / "approvals"
        for path in folder.glob("*"):
            path.unlink()
        self.now, self.policy = NOW, POLICIES[0]
        self.signed: list[Yes] = []
        self.seen: list[bytes] = []

    @rule(asks=some_study, days=st.sampled_from([1, 3, None]))
    def approve(self, asks: Asks, days: int | None) -> None:
        until = None if days is None else self.now + days * DAY
        path = decide(self.home, asks, self.policy, [], who="B", until=until, now=self.now)
        self.signed.append(Yes(asks.hash, mark(asks), self.policy.hash, until))
        self.seen.append(path.read_bytes())
        self.touched = frozenset([asks.hash])
        assert standing(self.home, asks, self.policy, now=self.now).state == "approved"

    @rule(asks=some_study)
    def refuse(self, asks: Asks) -> None:
        path = reject(self.home, asks, self.policy, "no", who="B", now=self.now)
        self.seen.append(path.read_bytes())
        self.touched = frozenset([asks.hash])
        assert standing(self.home, asks, self.policy, now=self.now).state == "rejected"

    @rule(policy=some_policy)
    def change_policy(self, policy: Policy) -> None:
        self.policy, self.touched = policy, self.every

    @rule(hours=st.sampled_from([25, 1, 80]))
    def wait(self, hours: int) -> None:
        self.now, self.touched = self.now + timedelta(hours=hours), self.every

    @rule(pick=st.integers(0, 100), asks=some_study)
    def put_back(self, pick: int, asks: Asks) -> None:
        """Somebody puts an old file, or that of another study, where this study's decision lies."""
        self.touched = frozenset([asks.hash])
        if self.seen:
            file_of(self.home, asks.hash).write_bytes(self.seen[pick % len(self.seen)])

    @rule(
        pick=st.integers(0, 100),
        asks=some_study,
        key=st.sampled_from(["study", "policy", "mark", "answer", "until", "when", "asks", "site"]),
        other=some_study,
        policy=some_policy,
    )
    def forge(self, pick: int, asks: Asks, key: str, other: Asks, policy: Policy) -> None:
        """Somebody edits a decision so that it would be a yes to this study under that policy."""
        self.touched = frozenset([asks.hash])
        if not self.seen:
            return
        document = json.loads(self.seen[pick % len(self.seen)])
        wanted = {"study": other.hash, "policy": policy.hash, "mark": mark(other), "answer": "approved", "until": None,
                  "when": NOW.isoformat(), "asks": other.plain(), "site": "east"}  # fmt: skip
        document[key] = wanted[key]
        signed.write(file_of(self.home, asks.hash), document)

    @rule(asks=some_study)
    def lose(self, asks: Asks) -> None:
        self.touched = frozenset([asks.hash])
        file_of(self.home, asks.hash).unlink(missing_ok=True)

    @invariant()
    def only_what_was_signed_is_approved(self) -> None:
        for asks in (asks for asks in STUDIES if asks.hash in self.touched):
            if standing(self.home, asks, self.policy, now=self.now).state == "approved":
                mine = [
                    y for y in self.signed if (y.study, y.mark, y.policy) == (asks.hash, mark(asks), self.policy.hash)
                ]
                assert any(y.until is None or self.now < y.until for y in mine), asks


def played(home: Home, steps: int, **how: Any) -> None:
    """So many steps of the hospital, 50 at a time."""
    machine = type("At", (Hospital,), {"home": home}).TestCase
    machine.settings = settings(max_examples=steps // 50, stateful_step_count=50, deadline=None, database=None, **how)
    machine("runTest").runTest()


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of steps would wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("steps", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_path_leads_to_approved_but_the_one_that_was_signed(east: Home, steps: int) -> None:
    played(east, steps)


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("forgotten", ["policy", "mark", "until"])
def test_a_check_that_is_forgotten_is_found(forgotten: str, east: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A positive control: without one of its checks, a path to "approved" is found."""

    def careless(found: Decision, asks: Asks, policy: Policy, refused: Any, at: datetime) -> Standing:
        right = {"policy": policy.hash, "mark": mark(asks), "until": None}[forgotten]
        return approved(replace(found, **{forgotten: right}), asks, policy, refused, at)

    approved = approval.approved
    monkeypatch.setattr(approval, "approved", careless)
    with pytest.raises(AssertionError):
        played(east, 3000, phases=(Phase.generate,), print_blob=False, derandomize=True)
