"""A site's disk: what it keeps, what it writes, what it drops, and what it says when a file is damaged."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from fedscan import wire
from fedscan.averaging import averaging
from fedscan.memory import Damaged, Receipt, SiteDisk
from fedscan.respond import respond
from fedscan.schema import Kind, Weights
from fedscan.site import seed_of
from fedscan.study import Turn
from toy import same

torch.set_num_threads(1)
RECEIPT = Receipt("asked", "answered", 10, 0.5, True)


def weights(value: float) -> Weights:
    return Weights({"w": torch.full((3,), value), "v": torch.ones(2)}, {"v": Kind.STATISTIC})


def memory(value: float = 1.0) -> dict[str, Any]:
    return {
        "own": weights(value),
        "rest": torch.arange(4).bfloat16(),
        "nested": {"teacher": weights(9.0), "step": 3},
        "times": 2,
        "note": "é",
        "list": [1, None, "x"],
        "nothing": None,
    }


def files(folder: Path) -> set[str]:
    """The names of all files, with the time at which each was written."""
    return {f"{p.relative_to(folder)} {p.stat().st_ino}" for p in folder.rglob("*") if p.is_file()}


def entries(disk: SiteDisk) -> set[str]:
    return {p.name for p in (disk.folder / "entries").iterdir()}


def test_what_was_committed_is_recalled(tmp_path: Path) -> None:
    answer = wire.pack({"update": weights(5.0)})
    SiteDisk(tmp_path).commit((1, 0), memory(), RECEIPT, answer)
    disk = SiteDisk(tmp_path)  # a new process has only the folder
    found = disk.recall((1, 0))
    assert same(found, memory())
    assert found["own"].kinds == memory()["own"].kinds
    assert found["rest"].dtype == torch.bfloat16
    assert disk.receipt((1, 0)) == RECEIPT
    assert wire.read_file(disk.answer((1, 0)))["update"].kinds["v"] is Kind.STATISTIC


def test_before_the_first_turn_there_is_nothing(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path / "new")
    assert disk.recall(None) == {}
    assert disk.receipt((1, 0)) is None
    disk.settle([None, (1, 0)])
    assert not (tmp_path / "new").exists()


def test_memory_starts_from_the_turn_that_is_asked_for(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path)
    for call, value in enumerate((1.0, 2.0, 3.0)):
        disk.commit((1, call), {"own": weights(value)}, RECEIPT, None)
    assert [float(disk.recall((1, call))["own"]["w"][0]) for call in (1, 0, 2)] == [2.0, 1.0, 3.0]


def test_a_turn_may_be_computed_again(tmp_path: Path) -> None:
    """A turn that the server did not accept is replaced, whole."""
    disk = SiteDisk(tmp_path)
    disk.commit((1, 0), memory(1.0), RECEIPT, wire.pack({"n": 1}))
    disk.commit((1, 0), {"own": weights(2.0)}, RECEIPT, None)
    assert same(disk.recall((1, 0)), {"own": weights(2.0)})
    assert disk.receipt((1, 0)) is None


def test_without_an_answer_there_is_no_receipt_to_answer_from(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path)
    disk.commit((2, 1), memory(), RECEIPT, None)
    assert disk.receipt((2, 1)) is None
    assert same(disk.recall((2, 1)), memory())


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path)
    disk.commit((1, 0), memory(1.0), RECEIPT, None)
    before, first = files(tmp_path / "entries"), entries(disk)
    assert len(first) == 3  # own, rest and nested; what is plain stands in the listing
    written: list[str] = []
    disk.event = written.append
    disk.commit((2, 0), memory(2.0), RECEIPT, None)
    assert written.count("site memory written (2, 0)") == 1
    assert len(entries(disk) - first) == 1
    assert before < files(tmp_path / "entries")  # the others are the same files, not written again


def test_equal_entries_are_one_file(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path)
    disk.commit((1, 0), {"a": weights(1.0), "b": weights(1.0)}, RECEIPT, None)
    disk.commit((1, 1), {"c": weights(1.0)}, RECEIPT, None)
    assert len(entries(disk)) == 1
    assert same(disk.recall((1, 0))["b"], disk.recall((1, 1))["c"])


def test_settling_drops_what_no_turn_to_keep_holds(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path)
    disk.commit((1, 0), {"own": weights(1.0), "same": weights(7.0)}, RECEIPT, wire.pack({"n": 1}))
    disk.commit((2, 0), {"own": weights(2.0), "same": weights(7.0)}, RECEIPT, None)
    disk.commit((3, 0), {"own": weights(3.0)}, RECEIPT, None)
    assert len(entries(disk)) == 4
    disk.settle([(2, 0), None, (9, 9)])
    assert [p.name for p in (tmp_path / "turns").iterdir()] == ["2.0"]
    assert len(entries(disk)) == 2
    assert same(disk.recall((2, 0)), {"own": weights(2.0), "same": weights(7.0)})


def one_turn(disk: SiteDisk) -> None:
    disk.commit((2, 0), memory(2.0), RECEIPT, wire.pack({"n": 1}))
    disk.settle([(2, 0)])


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_turn(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def killing(at: int) -> Any:
        seen = 0

        def event(_: str) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise Killed

        return event

    SiteDisk(tmp_path / "start").commit((1, 0), memory(1.0), RECEIPT, None)
    outcomes = set()
    for at in range(1, 5):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "start", folder)
        with pytest.raises(Killed):
            one_turn(SiteDisk(folder, event=killing(at)))
        disk = SiteDisk(folder)
        new = disk.receipt((2, 0)) is not None
        outcomes.add(new)
        assert same(disk.recall((2, 0) if new else (1, 0)), memory(2.0 if new else 1.0))
        disk.commit((2, 0), memory(2.0), RECEIPT, None)  # and it goes on from there
        disk.settle([(2, 0)])
        assert same(disk.recall((2, 0)), memory(2.0))
        assert len(entries(disk)) == 3
        assert not [p for p in (folder / "turns").iterdir() if p.name.startswith(".")]
    assert outcomes == {True, False}


def test_recalled_memory_may_be_changed_without_changing_the_disk(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path)
    disk.commit((1, 0), memory(1.0), RECEIPT, None)
    disk.recall((1, 0))["own"]["w"].mul_(5)
    assert same(disk.recall((1, 0)), memory(1.0))


# -- the secret --------------------------------------------------------------------------------------------------------


def test_the_key_is_private_and_stays(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        key = SiteDisk(tmp_path / "a").key
    finally:
        os.umask(umask)
    path = tmp_path / "a" / "key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) == 32
    assert SiteDisk(tmp_path / "a").key == key
    assert SiteDisk(tmp_path / "b").key != key


def test_the_key_is_never_seen_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is private before it has its name, and before the secret is in it: a kill in between leaves nothing open."""
    modes = []

    def seen(self: Path, target: Path) -> None:
        modes.append((self.stat().st_size, stat.S_IMODE(self.stat().st_mode)))
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", seen)
    _ = SiteDisk(tmp_path).key
    assert modes == [(32, 0o600)]


def test_the_secret_stream_is_not_what_the_study_would_give(tmp_path: Path) -> None:
    study = toy.study(averaging(), names=("cairo",))
    disk = SiteDisk(tmp_path)
    s = toy_site(study, lambda: disk.key)
    drawn = s.secret("noise").uniform(4)
    others = [toy_site(study, bytes), toy_site(study, lambda: SiteDisk(tmp_path / "other").key)]
    guesses = [s.secret("masks"), s.secret("noise"), *(other.secret("noise") for other in others)]
    assert not any(torch.equal(drawn, guess.uniform(4)) for guess in guesses)
    for seed in (study.seed, seed_of(study.seed, "cairo", 1, 0, "noise")):
        generator = torch.Generator().manual_seed(seed)
        assert not torch.equal(drawn, torch.rand(4, generator=generator, dtype=torch.float64))
    again = toy_site(study, lambda: SiteDisk(tmp_path).key)
    assert torch.equal(drawn, again.secret("noise").uniform(4))


def toy_site(study: Any, key: Any) -> Any:
    from fedscan.site import Site

    return Site("cairo", study.task, study.splits("cairo"), study.step, study.slots(), {}, study.seed, 1, 2, 0, key)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe\xfd", b'{"plain": 3}', None])
@pytest.mark.parametrize("name", ["memory.json", "receipt.json", "entry"])
def test_damaged_files_give_a_sentence(name: str, damage: bytes | None, tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path / "cairo")
    disk.commit((4, 1), memory(), RECEIPT, wire.pack({"n": 1}))
    path = disk.turn((4, 1)) / name
    if name == "entry":
        path = next(p for p in (disk.folder / "entries").iterdir())
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    with pytest.raises(Damaged) as caught:
        disk.receipt((4, 1)) if name == "receipt.json" else disk.recall((4, 1))
    assert "cairo" in str(caught.value)
    assert "round 4" in str(caught.value)
    assert str(caught.value).isprintable()
    if name == "memory.json":
        with pytest.raises(Damaged):
            disk.settle([(4, 1)])


def test_an_entry_cut_short_gives_a_sentence(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path / "cairo")
    disk.commit((4, 1), {"own": weights(1.0)}, RECEIPT, None)
    path = next((disk.folder / "entries").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"cairo.*round 4.*should take bytes"):
        disk.recall((4, 1))


def flip(path: Path) -> None:
    """Turns over the lowest bit of the last byte, which is a value of a tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", range(3))
def test_a_bit_that_flipped_in_what_is_remembered_is_refused(at: int, tmp_path: Path) -> None:
    """Each entry in turn; its size and its header are as they were, so that nothing but the hash can tell."""
    SiteDisk(tmp_path / "cairo").commit((4, 1), memory(), RECEIPT, None)
    path = sorted((tmp_path / "cairo" / "entries").iterdir())[at]
    flip(path)
    assert wire.read_file(path)
    with pytest.raises(Damaged, match=r"memory of cairo after round 4 .*has changed since it was written.*from a copy"):
        SiteDisk(tmp_path / "cairo").recall((4, 1))
    flip(path)
    assert same(SiteDisk(tmp_path / "cairo").recall((4, 1)), memory())


def test_what_this_process_wrote_or_checked_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path, digest: str) -> Any:
        hashed.append(digest)
        return wire.read_file(path)

    monkeypatch.setattr("fedscan.memory.read_sound", counted)
    disk = SiteDisk(tmp_path)
    disk.commit((1, 0), {"own": weights(1.0)}, RECEIPT, None)
    disk.recall((1, 0))
    assert not hashed
    again = SiteDisk(tmp_path)
    again.recall((1, 0))
    again.recall((1, 0))
    assert len(hashed) == 1
    disk.commit((2, 0), {"own": weights(2.0)}, RECEIPT, None)
    disk.settle([(2, 0)])  # and what was dropped is no longer known
    SiteDisk(tmp_path).commit((3, 0), {"own": weights(1.0)}, RECEIPT, None)
    disk.recall((3, 0))
    assert len(hashed) == 2


def test_a_turn_that_is_not_there_gives_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"cairo.*round 7"):
        SiteDisk(tmp_path / "cairo").recall((7, 0))


@pytest.mark.parametrize("damage", [b"", b"short"])
def test_a_damaged_key_is_not_replaced_silently(damage: bytes, tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path / "cairo")
    _ = disk.key
    (tmp_path / "cairo" / "key").write_bytes(damage)
    with pytest.raises(Damaged, match=r"key of cairo"):
        _ = disk.key


# -- through an answer -------------------------------------------------------------------------------------------------


def test_an_answer_leaves_the_memory_it_was_given_as_it_was() -> None:
    study = toy.study(averaging(share=lambda model: frozenset({"head.weight", "head.bias"})))
    message = {"weights": study.start()["weights"]}
    slots = study.slots()
    _, first, _ = respond(study, slots, Turn(1, 0, "bergen"), "learn", message, {}, bytes)
    kept = {k: v.clone() for k, v in first["own"].items()}
    _, second, _ = respond(study, slots, Turn(2, 0, "bergen"), "learn", message, first, bytes)
    assert same(dict(first["own"]), kept)
    assert not same(dict(second["own"]), kept)


def test_the_listing_is_plain_json(tmp_path: Path) -> None:
    disk = SiteDisk(tmp_path)
    disk.commit((1, 0), memory(), RECEIPT, None)
    listing = json.loads((disk.turn((1, 0)) / "memory.json").read_text())
    assert listing["plain"] == {"times": 2, "note": "é", "list": [1, None, "x"], "nothing": None}
    assert sorted(listing["entries"]) == ["nested", "own", "rest"]
