"""All sites in this process: tensors are handed over without a copy, and networks are built once.

``strict`` sends every message, answer and memory through its bytes; the numbers must be the same.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedscan import wire
from fedscan.memory import Base, Event, Receipt, SiteDisk, nothing
from fedscan.recorded import Answer, Letter
from fedscan.respond import respond, unchanged
from fedscan.schema import Weights
from fedscan.spec import Refused
from fedscan.study import Study, Turn
from fedscan.wire import Parcel

MEMORY_BYTES = 64 << 20  # of site memories held live; beyond it they are read back from disk


class Computed(NamedTuple):
    """What a site made of a letter: its answer ready to travel, its new memory, and the receipt of both."""

    parcel: Parcel
    memory: dict[str, Any]
    receipt: Receipt


def put_down(
    disk: SiteDisk, answer: Answer, parcel: Parcel, memory: dict[str, Any], receipt: Receipt, *, whole: bool
) -> bool:
    """Writes a computed turn to its site's disk; ``whole``, with its answer, which is then read from there.

    Returns whether there was anything to write: a memory that did not change is not.
    """
    if not whole and not receipt.changed:
        return False
    key = (answer.turn.round, answer.turn.call)
    disk.commit(key, memory if receipt.changed else None, receipt, parcel if whole else None)
    if whole:
        answer.file, answer.reply = disk.answer(key), None
    return True


class Local:
    """The engine of simulations. Answers are computed when they are received, one at a time.

    ``names`` are the sites that are here; all of the study's, where nothing is said.
    """

    def __init__(
        self, study: Study, folder: Path, *, names: Sequence[str] = (), strict: bool = False, durable: bool = False,
        event: Event = nothing,
    ) -> None:  # fmt: skip
        torch.set_num_threads(study.threads)
        self.study, self.names, self.strict, self.event = study, tuple(names) or study.names, strict, event
        self.disks = {n: SiteDisk(folder / "sites" / n, durable=durable, event=event) for n in self.names}
        self.slots = study.slots()
        self._waiting: deque[Letter] = deque()
        self._started: list[tuple[float, str, int, Letter]] = []
        self._computed: dict[Turn, Computed] = {}  # and not yet on disk
        self._live: dict[str, tuple[Base, dict[str, Any]]] = {}  # a site's memory, and the turn it is of
        self._written: set[str] = set()  # sites with turns on disk that may be dropped
        self._past = {name for name, disk in self.disks.items() if (disk.folder / "turns").exists()}

    def send(self, letters: Sequence[Letter]) -> None:
        for letter in letters:
            if letter.started:
                heapq.heappush(self._started, (letter.due, letter.turn.site, letter.turn.call, letter))
            else:
                self._waiting.append(letter)

    def receive(self, started: bool) -> Answer:
        return self.answer(heapq.heappop(self._started)[-1] if started else self._waiting.popleft())

    def answer(self, letter: Letter) -> Answer:
        """What the site makes of a letter. A turn that it has answered is answered again from its disk."""
        turn, asked = letter.turn, letter.parcel.digest
        if turn.round in self.study.silent.get(turn.site, ()) and not letter.again:
            return Answer(turn, absent=f"{turn.site} did not answer in round {turn.round} (simulated)")
        disk = self.disks[turn.site]
        known = disk.receipt((turn.round, turn.call)) if turn.site in self._past else None
        if known and disk.sound((turn.round, turn.call), known):  # else it is computed again, to the same bits
            if known.asked != asked:
                return Answer(turn, refused=f"{turn.site} was asked something else under turn {turn}")
            file = disk.answer((turn.round, turn.call))
            return Answer(turn, None, file, "", "", known.answered, known.nbytes, known.seconds, known.changed)
        return self._compute(letter, disk, asked)

    def _compute(self, letter: Letter, disk: SiteDisk, asked: str) -> Answer:
        turn = letter.turn
        message = wire.unpack(bytes(letter.parcel)) if self.strict else letter.message
        before = self._memory(turn.site, letter.base)
        try:
            reply, memory, seconds = respond(
                self.study, self.slots, turn, letter.question, message, before, lambda: disk.key
            )
            parcel = wire.pack(reply)
        except Refused as e:
            return Answer(turn, refused=str(e), changed=False)
        self.event(f"computed {turn}")
        changed = not unchanged(memory, before)
        receipt = Receipt(asked, parcel.digest, parcel.nbytes, seconds, changed, letter.question)
        if self.strict:
            reply = wire.unpack(bytes(parcel))
            memory = wire.unpack(bytes(wire.pack(memory)))
        self._computed[turn] = Computed(parcel, memory, receipt)
        return Answer(turn, reply, None, "", "", parcel.digest, parcel.nbytes, seconds, changed)

    def _memory(self, site: str, base: Base) -> dict[str, Any]:
        for turn, (_, memory, receipt) in self._computed.items():
            if turn.site == site and (turn.round, turn.call) == base and receipt.changed:
                return memory
        if site in self._live and self._live[site][0] == base:
            return self._live[site][1]
        return self.disks[site].recall(base)

    def keep(self, answers: Sequence[Answer], whole: bool) -> None:
        """Writes the turns of these answers to their sites' disks; what else was computed is forgotten."""
        for answer in answers:
            turn = answer.turn
            if answer.file is not None or turn not in self._computed:
                continue
            computed = self._computed[turn]
            if put_down(self.disks[turn.site], answer, *computed, whole=whole):
                self._written.add(turn.site)
                self._hold(turn, computed)
        self._computed.clear()

    def hand_over(self, turn: Turn) -> Computed | None:
        """A turn that is computed and not yet on disk, for another process to keep; None where it is on disk."""
        computed = self._computed.pop(turn, None)
        if computed:
            self._hold(turn, computed)
        return computed

    def _hold(self, turn: Turn, computed: Computed) -> None:
        """Holds a new memory live, as far as there is room."""
        if computed.receipt.changed:
            self._live[turn.site] = ((turn.round, turn.call), computed.memory)
            if sum(nbytes(memory) for _, memory in self._live.values()) > MEMORY_BYTES:
                self._live.clear()

    def settle(self, needed: Callable[[str], Sequence[Base]]) -> None:
        for site in self._written:
            self.disks[site].settle(needed(site))
        self._written.clear()

    def close(self) -> None:
        """Nothing is open."""


class Replay(Local):
    """The engine of simulations, which answers started questions in an ``order`` that another run has recorded."""

    def __init__(self, study: Study, folder: Path, order: Sequence[Turn], **options: Any) -> None:
        super().__init__(study, folder, **options)
        self._order = deque(order)

    def receive(self, started: bool) -> Answer:
        """The answer whose turn it is. Raises ValueError where the method asks for more than was recorded."""
        if not started:
            return super().receive(started)
        if not self._order:
            raise ValueError("the recorded order of arrival ends here: the run that is replayed got no further answer")
        turn = self._order.popleft()
        for entry in self._started:
            if entry[-1].turn == turn:
                self._started.remove(entry)
                heapq.heapify(self._started)
                return self.answer(entry[-1])
        raise ValueError(f"the recorded order has {turn} next, which is not under way: this is another study")


def nbytes(tree: Any) -> int:
    """Bytes of the tensors in a tree."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict | Weights):
        return sum(nbytes(v) for v in tree.values())
    return 0
