"""How often a site answers: a yes to a study is one to its rounds, to one test and to so many answers of one run."""

from collections.abc import Mapping
from pathlib import Path

from fedscan import wire
from fedscan.memory import Damaged
from fedscan.method import Message
from fedscan.spec import Refused
from fedscan.study import Study

Key = tuple[int, int]  # round and call


def hold_round(study: Study, name: str, round: int, question: str) -> None:
    """Raises Refused for a round that the study has not; the one after the last is for the test, and what closes."""
    last = study.rounds + (question == study.evaluate.name or study.method.closing is not None)
    if not 1 <= round <= last:
        raise Refused(f"{name} was asked in round {round}, and {question} is asked in rounds 1 to {last} of this study")


def hold_test(study: Study, name: str, round: int, question: str, message: Message) -> None:
    """Raises Refused where the test cases are to be scored before the last round is over."""
    if question == study.evaluate.name and message.get("split") == "test" and round <= study.rounds:
        raise Refused(f"{name} was asked to score its test cases in round {round}: that is done once, after the last")


class Limits:
    """The turns of one run that were answered, by question, on the disk. ``most``: of each; None for any number.

    A turn that is asked again, for its answer was lost or not accepted, counts once.
    """

    def __init__(self, path: Path, most: Mapping[str, int] | None, durable: bool) -> None:
        self.path, self.most, self.durable = path, most, durable
        self._turns: dict[str, set[Key]] = {}
        if path.exists():
            try:
                told = wire.loads(path.read_bytes())
                self._turns = {str(question): {(int(r), int(c)) for r, c in turns} for question, turns in told.items()}
            except (ValueError, TypeError, AttributeError) as e:
                raise Damaged(f"{path} is damaged: restore it from a copy, or have a new run begun") from e

    def hold(self, name: str, question: str, turn: Key) -> None:
        """Raises Refused where this turn would be one more than was agreed to."""
        known, most = self._turns.get(question, set()), (self.most or {}).get(question, 0)
        if self.most is not None and turn not in known and len(known) >= most:
            raise Refused(f"{name} has answered {question} as often as it agreed to, {most} times in one run")

    def count(self, question: str, turn: Key) -> None:
        """Keeps that a turn is answered, before anybody can be told of it."""
        known = self._turns.setdefault(question, set())
        if self.most is None or turn in known:
            return
        turns = {**self._turns, question: known | {turn}}
        text = wire.dumps({question: sorted(turns[question]) for question in sorted(turns)}).encode()
        wire.replace_file(self.path, lambda file: file.write(text), durable=self.durable)
        self._turns = turns
