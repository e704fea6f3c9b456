"""What one party may do to another, and is not let: sites, methods and files that are not as they should be."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import toy
from fedscan.averaging import averaging, plain_train
from fedscan.data import cache as store
from fedscan.launch import How, describe
from fedscan.method import Message, Method, Tree, answer, receive
from fedscan.run import Problem, run
from fedscan.secret import BLOCK, Secret
from fedscan.site import Site, seed_of
from fedscan.studyfile import build, load, read_cases
from tinystudy import write_study

torch.set_num_threads(1)


# -- test cases --------------------------------------------------------------------------------------------------------

PEEKS: tuple[Callable[[Site], Any], ...] = (
    lambda site: site.splits.test.case(0),
    lambda site: len(site.splits.test),
    lambda site: list(site.splits.test.names),
    lambda site: site.splits.test.subjects,
    lambda site: next(site.splits.test.batches(4, site.order, site.augmentation)),
)


@pytest.mark.parametrize("peek", PEEKS)
def test_a_method_that_trains_on_test_cases_is_stopped(peek: Callable[[Site], Any], tmp_path: Path) -> None:
    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        peek(site)
        return plain_train(site, model, message)

    with pytest.raises(RuntimeError, match="asked a site for its test cases"):
        run(toy.study(averaging(train)), tmp_path / "run")


def test_a_method_that_adapts_to_test_cases_when_they_are_scored_is_stopped(tmp_path: Path) -> None:
    def use(site: Site, message: Message) -> nn.Module:
        site.splits.test.case(0)
        return receive(site, message)

    with pytest.raises(RuntimeError, match="asked a site for its test cases"):
        run(toy.study(averaging(use=use)), tmp_path / "run")


# -- questions ---------------------------------------------------------------------------------------------------------


def asking(*names: str) -> Method:
    """A method with questions of these names."""

    def question(name: str) -> Any:
        def reply(site: Site, message: Message) -> Tree:
            return {}

        reply.__name__ = name
        return answer("nothing")(reply)

    return replace(averaging(), answers=tuple(map(question, names)))


@pytest.mark.parametrize(
    ("names", "said"), [(("evaluate",), "named 'evaluate', as that of the study"), (("a", "b", "a"), "named 'a'")]
)
def test_two_questions_of_one_name_are_refused(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        toy.study(asking(*names))


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_two_keys_that_one_seed_of_32_bits_stands_for_give_other_numbers() -> None:
    """A search for two keys whose seeds are alike in their low 32 bits takes seconds; so would one for a site's key."""
    seeds: dict[int, bytes] = {}
    for i in itertools.count():
        key = i.to_bytes(32, "little")
        low = seed_of(f"{key.hex()}/1/0/noise") & 0xFFFFFFFF
        if low in seeds:
            break
        seeds[low] = key
    one, two = (seed_of(f"{k.hex()}/1/0/noise") for k in (key, seeds[low]))
    assert one != two
    assert torch.equal(*(torch.rand(9, generator=torch.Generator().manual_seed(seed)) for seed in (one, two)))
    for draw in (Secret.uniform, Secret.normal, Secret.bits):
        assert not torch.equal(draw(Secret(key, 1, 0, "noise"), 9), draw(Secret(seeds[low], 1, 0, "noise"), 9))


def test_secret_numbers_are_shake_256_of_key_label_call_and_block() -> None:
    text = (32).to_bytes(8, "little") + b"k" * 32 + b'["cairo", 1, 0, "noise", %d, %d]'
    s = Secret(b"k" * 32, "cairo", 1, 0, "noise")
    assert bytes(s.bits(5).numpy()) == hashlib.shake_256(text % (0, 0)).digest(5)
    whole = hashlib.shake_256(text % (1, 0)).digest(BLOCK) + hashlib.shake_256(text % (1, 1)).digest(8)
    assert bytes(s.bits(BLOCK // 4 + 2, dtype=torch.int32).numpy()) == whole


def test_secret_numbers_are_spread_as_they_should_be() -> None:
    s = Secret(b"k" * 32, "spread")
    n, u, bits = s.normal(99_999).double(), s.uniform(100_000), s.bits(100_000, dtype=torch.int8).double()
    assert [n.mean(), n.var(), (n**3).mean(), (n**4).mean()] == pytest.approx([0, 1, 0, 3], abs=0.05)
    assert [u.mean(), u.var() * 12, bits.mean() / 256] == pytest.approx([0.5, 1, -0.5 / 256], abs=0.01)
    assert (u.min() >= 0, u.max() < 1, bits.min(), bits.max()) == (True, True, -128, 127)
    assert s.normal(3, 0, 2).shape == s.bits(3, 0, 2).shape == (3, 0, 2)
    with pytest.raises(ValueError, match="whole numbers"):
        s.bits(3, dtype=torch.float32)


# -- cases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["t1", "label"])
def test_a_run_is_not_gone_on_with_once_a_voxel_has_changed(what: str, tmp_path: Path) -> None:
    file = load(write_study(tmp_path))
    how = How(cache=tmp_path / "cache", resume=True, report=False)
    cases = read_cases(file, how.cache)
    describe(file, cases, build(file, cases), tmp_path / "run", how)
    describe(file, read_cases(file, how.cache), build(file, cases), tmp_path / "run", how)
    path = tmp_path / "scans" / f"east0_{what}.nii"
    image: Any = nibabel.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] += 1
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)
    with pytest.raises(Problem, match="the cases have changed since the run in"):
        describe(file, read_cases(file, how.cache), build(file, cases), tmp_path / "run", how)


def test_no_scan_is_hashed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    digest = store._digest
    monkeypatch.setattr(store, "_digest", lambda path: hashed.append(path) or digest(path))
    file = load(write_study(tmp_path))
    for _ in range(2):
        cases = read_cases(file, tmp_path / "cache")
        scans = [path for path in hashed if path.suffix == ".nii"]
        assert len(scans) == len(set(scans)) == 20
    assert (
        cases.facts()["files"]["west3"][1]
        == hashlib.sha256((tmp_path / "scans" / "west3_label.nii").read_bytes()).hexdigest()
    )
