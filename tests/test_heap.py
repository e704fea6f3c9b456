"""Memory goes back to the system: pages of mapped files, and nothing that somebody has written."""

import os
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import echo
from between import Between
from fedscan import heap, trees, wire
from fedscan.engines import incoming
from fedscan.schema import Weights
from hostile import SITE, letter_of

ENTRIES = 1 << 20  # of a leaf, 4 MiB
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives mapped pages back and tells of them")


def in_memory(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    lines, size = iter(Path("/proc/self/smaps").read_text().splitlines()), 0
    for line in lines:
        if line.endswith(str(path)):
            size += 1024 * int(next(found for found in lines if found.startswith("Rss:")).split()[1])
    return size


def written(path: Path, leaves: int = 4) -> Weights:
    """Weights of which every leaf holds its own number, in a file."""
    weights = Weights({f"{i}": torch.full((ENTRIES,), float(i + 1)) for i in range(leaves)})
    wire.write_file(path, wire.pack({"weights": weights}), durable=True)
    return weights


@linux
def test_a_fold_holds_a_leaf_of_a_file_at_a_time_and_leaves_it_readable(tmp_path: Path) -> None:
    path = tmp_path / "answer.safetensors"
    expected = written(path)
    most = 0
    fold = trees.Fold(expected.schema)
    for _ in range(2):  # the first tree begins the mean, the second is folded into it
        found = wire.read_file(path)["weights"]

        def leaf_by_leaf(found: Weights = found) -> object:
            nonlocal most
            for name, leaf in found.items():
                yield name, leaf
                most = max(most, in_memory(path))

        fold.add(leaf_by_leaf(), 1.0)
        assert all(torch.equal(found[name], leaf) for name, leaf in expected.items())
    assert most < 4 * ENTRIES
    assert all(torch.equal(leaf, expected[name]) for name, leaf in fold.result().items())


@linux
def test_what_was_written_into_a_mapped_leaf_is_kept_when_its_pages_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    written(path)
    found = wire.read_file(path)["weights"]
    assert float(sum(leaf.sum() for leaf in found.values())) == 10.0 * ENTRIES
    found["0"][:8192] = 7.0
    found["1"].numpy()[0] = 9.0
    before = in_memory(path)
    heap.give_back(found.values())
    assert in_memory(path) < before / 2
    assert found["0"].tolist() == [7.0] * 8192 + [1.0] * (ENTRIES - 8192)
    assert found["1"].tolist() == [9.0] + [2.0] * (ENTRIES - 1)
    assert torch.equal(wire.read_file(path)["weights"]["0"], torch.ones(ENTRIES))  # the file is as it was


def test_leaves_that_lie_in_no_file_are_left_alone() -> None:
    leaf = torch.arange(float(ENTRIES))
    heap.give_back([leaf, leaf[::2], torch.empty(0), torch.ones(3)])
    assert torch.equal(leaf, torch.arange(float(ENTRIES)))


def test_a_part_of_a_message_that_lies_in_another_place_is_given_back_too(tmp_path: Path) -> None:
    path = tmp_path / "message.safetensors"
    written(path)
    data = path.read_bytes()
    half = len(data) // 2 // 8 * 8
    (tmp_path / "half").write_bytes(data[half:])
    mapped = np.memmap(tmp_path / "half", np.uint8, mode="c")
    found = wire.unpack(wire.Pieces([np.frombuffer(bytearray(data[:half]), np.uint8), mapped]))["weights"]
    heap.give_back(found.values())
    assert [float(leaf[-1]) for leaf in found.values()] == [1.0, 2.0, 3.0, 4.0]


def test_what_brings_messages_to_a_site_holds_none_while_it_waits(tmp_path: Path) -> None:
    """Else a model lies in memory for nothing, and is freed by a daemon at the end of the process, which aborts it."""
    study = echo.study((SITE,))
    engine = Between(study, tmp_path).engine()(study, tmp_path / "run")
    letter = letter_of(study)
    held = weakref.ref(letter)
    engine.send([letter])
    assert engine.receive(started=False).file
    del letter
    until = time.monotonic() + 10
    while held() is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert held() is None
    engine.close()


@linux
def test_a_site_gives_back_the_messages_before_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "LARGE", ENTRIES)
    messages, found, files = incoming.Incoming(tmp_path, 1 << 30), [], []
    for number in (1.0, 2.0):
        parcel = wire.pack({"weights": Weights({"a": torch.full((ENTRIES,), number)})})
        header = {"asked": parcel.digest, "nbytes": parcel.nbytes, "payload": parcel.digest, "travels": parcel.nbytes}
        messages.put(parcel.digest, 0, parcel.nbytes, memoryview(bytes(parcel)))
        os.sync()  # pages that are not on the disk yet stay
        files.append(tmp_path / parcel.digest)
        found.append(messages.message({**header, "recipe": []}, memoryview(b"")))
        assert found[-1]["weights"]["a"].sum() == number * ENTRIES
        assert in_memory(files[-1]) >= 4 * ENTRIES
    assert in_memory(Path(f"{files[0]} (deleted)")) < ENTRIES
    assert [float(message["weights"]["a"][-1]) for message in found] == [1.0, 2.0]
