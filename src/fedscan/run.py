"""The loop. It is the same for every method and every engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedscan.engines.local import Local
from fedscan.journal import Journal, Row
from fedscan.ledger import ScoreRow
from fedscan.memory import Event, nothing
from fedscan.method import Absent, State, Tree, messages, published
from fedscan.recorded import COMMIT_SECONDS, Engine, Recorded
from fedscan.study import Study
from fedscan.trust import Held, unsound

Watch = Callable[[str, Any], None]  # ("round", number), ("turn", Row), ("scores", rows), ("skipped", sentence)
EngineMaker = Callable[[Study, Path], Engine]


class Problem(Exception):
    """Something the user can mend. The text is one sentence: what was wrong, where, what to do."""


def run(
    study: Study,
    folder: Path,
    *,
    resume: bool = False,
    engine: EngineMaker = Local,
    durable: bool = False,
    commit_seconds: float = COMMIT_SECONDS,
    event: Event = nothing,
    watch: Watch = lambda what, value: None,
) -> State:
    """Runs the study in ``folder`` to its end, from the start or, with ``resume``, from where it stood.

    Returns the last state. Raises Problem where the folder holds another run, and Absent where the study says that
    the run stops when a site is missing; it can then be resumed.
    """
    journal_file = folder / "journal.sqlite"
    if journal_file.exists() and not resume:
        raise Problem(f"{folder} already holds a run; add --resume to go on with it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    carrier = engine(study, folder)
    journal = Journal(folder, durable=durable, event=event)
    try:
        check_same(study, journal, folder)
        held = Held(study, carrier, journal)
        sites = Recorded(study, held, journal, commit_seconds=commit_seconds)

        def notice(row: Row) -> None:
            held.remember(row)
            watch("turn", row)

        sites.notice = notice
        return rounds(study, sites, journal, watch)
    finally:
        journal.close()
        carrier.close()


def check_same(study: Study, journal: Journal, folder: Path) -> None:
    """Refuses to go on with a run that another study began."""
    known = journal.meta().get("study_hash")
    if known is not None and known != study.identity:
        raise Problem(
            f"the run in {folder} is of study {known[:12]}, and this is study {study.identity[:12]}: "
            "give the unchanged study, or choose another folder"
        )
    journal.set_meta(study_hash=study.identity)


def rounds(study: Study, sites: Recorded, journal: Journal, watch: Watch) -> State:
    """From HEAD to the end: rounds, validation where it is due, and the test, once."""
    if journal.head is None:
        journal.end_round(0, study.start())
    state = journal.state()
    assert journal.head is not None
    for number in range(journal.head + 1, study.rounds + 1):
        sites.begin(number)
        watch("round", number)
        state = one_round(study, sites, state, watch)
        due = study.every and (number % study.every == 0 or number == study.rounds)
        scores = evaluate(study, sites, state, "validation") if due else []
        sites.end(state, scores)
        watch("scores", scores)
    if not journal.finished:
        sites.begin(study.rounds + 1)
        scores = evaluate(study, sites, state, "test")
        state = study.method.closing(sites, state) if study.method.closing else state
        scores += cross(study, sites, state)
        sites.end(state, scores, finished=True)
        watch("scores", scores)
    return state


def one_round(study: Study, sites: Recorded, state: State, watch: Watch) -> State:
    """The state after one round of the method; the same state where too few sites answered and the study skips.

    Raises Problem where the new state holds what no model can be made of; HEAD then stays where it is.
    """
    try:
        after = study.method.round(sites, state)
    except Absent as e:
        if study.absent != "skip":
            raise
        sites.skip()
        watch("skipped", f"round {sites.round} was skipped: {e}")
        return state
    if wrong := unsound(after, study.terms.model):
        raise Problem(
            f"after round {sites.round}, {wrong}, so this round is not kept: lower the learning rates, of the server "
            "too, or leave out the site whose numbers stand out in the report, and begin again in another folder"
        )
    return after


def evaluate(study: Study, sites: Recorded, state: State, split: str) -> list[ScoreRow]:
    """Scores of what is published, on every site's validation or test cases."""
    replies = sites.ask_each(study.evaluate, messages(state, study.names, split=split), need=0)
    return [
        row
        for name in replies
        for row in score_rows(study, sites.round, split, name if "for" in state else "federation", name, replies[name])
    ]


def cross(study: Study, sites: Recorded, state: State) -> list[ScoreRow]:
    """Where each site has a model of its own: every model scored on every other site's test cases."""
    rows: list[ScoreRow] = []
    for origin in (name for name in study.names if name in state.get("for", ())):
        others = [name for name in study.names if name != origin]
        replies = sites.ask(study.evaluate, {**published(state, origin), "split": "test"}, to=others, need=0)
        for name in replies:
            rows += score_rows(study, sites.round, "test", origin, name, replies[name])
    return rows


def score_rows(study: Study, round: int, split: str, trained_at: str, site: str, answer: Tree) -> list[ScoreRow]:
    """Rows of an ``evaluate`` answer (case, subject, origin, label, metric, value) as rows of the record.

    A case was tested at the site that answered, whatever it says; only one that pools others' cases may name those.
    """
    pools = site in study.origins
    return [
        ScoreRow(round, split, trained_at, origin if pools else site, case, subject, label, metric, value)
        for case, subject, origin, label, metric, value in answer["rows"]
    ]
