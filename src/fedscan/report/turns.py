"""Turn rows to what the page says: what left each hospital, and who took part in each round."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedscan.ledger import Record, TurnRow, classes
from fedscan.report.tables import OWN
from fedscan.report.words import listed, plural, size

CLASSES = {
    "weights": "model weights",
    "statistics": "scores and summary numbers",
    "prototypes": "averages of inner features",
    "features": "inner features of scans",
    "predictions": "predictions for cases",
    "images": "images",
}
HARMLESS = {"weights", "statistics"}  # neither a scan nor a label, nor anything computed per scan
UNSENT = (
    "Bytes of local-only and of centralised are given as “–”: hospitals that train alone send nothing, and pooled "
    "scans lie in one place, moved there once; what the simulation carried to train and score these is not traffic."
)
SHOWN = 60  # rows of missed turns on the page
FEW = 12  # hospitals whose messages stand on the page unfolded


@dataclass(frozen=True)
class Privacy:
    """What left, in sentences; ``calm`` where nothing of a single scan did."""

    calm: bool
    lines: Sequence[str]


@dataclass(frozen=True)
class Question:
    """One kind of message: how often, how large, and the class of what it carries."""

    name: str
    privacy: str
    asked: int
    answered: int
    down: str
    up: str
    each: str


@dataclass(frozen=True)
class Kind:
    """One kind of message at one hospital: what became of each question, what left, and what its yes says of it."""

    name: str
    privacy: str
    asked: int
    answered: int
    refused: int
    absent: int
    up: str
    largest: str
    most: str = ""  # bytes and answers at most, by the hospital's yes
    over: bool = False  # whether more left


@dataclass(frozen=True)
class Sent:
    """What one hospital sent, by kind of message and in all, and why some questions have no answer."""

    name: str
    kinds: Sequence[Kind]
    missed: Sequence[str]
    up: str
    down: str
    most: str = ""


@dataclass(frozen=True)
class Traffic:
    """Bytes by message and by hospital."""

    questions: Sequence[Question]
    total: Sequence[str]
    sites: Sequence[Sent]
    agreed: str = ""  # whether more left than the hospitals' approvals say, in a sentence; empty in a simulation
    over: bool = False

    @property
    def few(self) -> bool:
        """Whether every hospital's messages are shown unfolded."""
        return len(self.sites) <= FEW


@dataclass(frozen=True)
class Square:
    """One hospital in one round."""

    status: str  # answered, absent, refused or none
    about: str  # what happened; empty where it answered or was not asked


@dataclass(frozen=True)
class Presence:
    """One hospital in all rounds."""

    name: str
    cells: Sequence[Square]
    total: str


@dataclass(frozen=True)
class Taking:
    """Who took part: hospitals by rounds, and every missed turn."""

    rounds: Sequence[str]
    rows: Sequence[Presence]
    missed: Sequence[TurnRow]
    caption: str


def privacy(record: Record) -> Privacy:
    """Says what left the hospitals, by the privacy class of every row that carried bytes, and no more than that."""
    left = [t for t in record.turns if t.bytes_up > 0]
    shown = ["This page itself shows slices of scans (section 4): share it accordingly."] * bool(record.overlays)
    if not left:
        return Privacy(True, ("Nothing left any hospital.", *shown))
    counts, held = Counter(t.privacy for t in left), Counter(classes(t, record.weighty) for t in left)
    found = "; ".join(f"{named(c)} ({plural(n, 'message')})" for c, n in held.items())
    lines = [
        *shown,
        f"What left: {found}; as declared by the privacy class of each message in the record of this run.",
    ]
    learned = any("weights" in c for c in held)
    unknown = sorted(counts.keys() - CLASSES.keys())
    delicate = [CLASSES[c] for c in CLASSES if c in counts and c not in HARMLESS]
    if "images" in counts:
        lines.insert(0, f"Images left hospitals, in {plural(counts['images'], 'message')}.")
    elif unknown:
        lines.insert(0, f"Something this page cannot judge left the hospitals: {listed(unknown)}.")
    elif delicate:
        lines.insert(0, f"No image left a hospital, but {listed(delicate)} did, and these are made from scans.")
    else:
        lines.insert(0, "No message from a hospital held images or labels.")
    if learned:
        lines.append("Weights are learned from scans and are not anonymous by themselves: share them as agreed only.")
    if any(t.question == "evaluate" for t in left):
        named_by = (
            "under codes, which only the hospital itself can trace back to case and patient"
            if record.between
            else "with the names of case and patient, as the table of cases has them"
        )
        lines.append(f"Scores of single cases left {named_by}.")
    if "centralised" in record.comparisons:
        lines.append(
            "The comparison with pooled data puts all cases in one place; it is no part of this federation, and its "
            "data is not counted here."
        )
    return Privacy(set(counts) <= HARMLESS, lines)


def named(found: Sequence[str]) -> str:
    """Classes of data in words: "weights, and scores and summary numbers"."""
    return ", and ".join(CLASSES.get(c, f"“{c}”") for c in found)


def traffic(record: Record) -> Traffic:
    """Bytes of every kind of message, in all and by hospital, both ways."""
    kinds = list(dict.fromkeys(t.question for t in record.turns))
    questions = []
    for kind in kinds:
        turns = [t for t in record.turns if t.question == kind]
        held = "; ".join(dict.fromkeys(named(classes(t, record.weighty)) for t in turns))
        questions.append(Question(kind, held, *_bytes(turns)))
    sites = [_sent(record, site.name, kinds) for site in record.sites]
    return Traffic(questions, [str(cell) for cell in _bytes(record.turns)], sites, *_held(record, sites))


def _sent(record: Record, site: str, kinds: Sequence[str]) -> Sent:
    """What one hospital sent."""
    mine, agreed = [t for t in record.turns if t.site == site], record.agreed.get(site, {})
    found = [_kind(record, kind, [t for t in mine if t.question == kind], agreed.get(kind)) for kind in kinds]
    most = size(sum(nbytes * times for nbytes, times in agreed.values())) if agreed else ""
    up, down = (size(sum(getattr(t, way) for t in mine)) for way in ("bytes_up", "bytes_down"))
    return Sent(site, [kind for kind in found if kind.asked], _missed(mine), up, down, most)


def _kind(record: Record, name: str, turns: Sequence[TurnRow], agreed: tuple[int, int] | None) -> Kind:
    """One kind of message at one hospital, held against what its yes says of it."""
    held = "; ".join(dict.fromkeys(named(classes(t, record.weighty)) for t in turns))
    statuses, sent = Counter(t.status for t in turns), [t.bytes_up for t in turns if t.bytes_up]
    most, over = "", False
    if agreed:
        nbytes, times = agreed
        most, over = f"{times} × {size(nbytes)}", len(sent) > times or max(sent, default=0) > nbytes
    counts = (len(turns), statuses["answered"], statuses["refused"], statuses["absent"])
    return Kind(name, held, *counts, size(sum(sent)), size(max(sent)) if sent else "–", most, over)


def _missed(turns: Sequence[TurnRow]) -> list[str]:
    """Why questions have no usable answer: a sentence for each reason, with the rounds in which it held."""
    rounds: dict[tuple[str, str, str], list[int]] = {}
    for t in turns:
        if t.status != "answered":
            rounds.setdefault((t.status, t.question, t.why), []).append(t.round)
    return [
        f"{status.capitalize()} at {question} in round{'s' * (len(set(at)) > 1)} {_some(sorted(set(at)))}: {why}"
        for (status, question, why), at in rounds.items()
    ]


def _some(rounds: Sequence[int]) -> str:
    """The first few of some rounds."""
    more = f" and {len(rounds) - 10} more" if len(rounds) > 10 else ""
    return (", ".join(map(str, rounds[:10])) + more) if more else listed([str(r) for r in rounds])


def _held(record: Record, sites: Sequence[Sent]) -> tuple[str, bool]:
    """Whether what left is within what the hospitals have signed, in a sentence; and whether it is not."""
    if not record.agreed:
        return "", False
    over = [f"{site.name} ({listed([k.name for k in site.kinds if k.over])})" for site in sites
            if any(kind.over for kind in site.kinds)]  # fmt: skip
    if over:
        return f"More left than the approval says, at {listed(over)}: ask the coordinator why.", True
    lacking = [site.name for site in sites if not site.most]
    but = f" Of {listed(lacking)} no approval is in this record." if lacking else ""
    return f"No hospital sent more, or more often, than its signed approval says.{but}", False


def _bytes(turns: Sequence[TurnRow]) -> tuple[int, int, str, str, str]:
    """Asked, answered, bytes to and from hospitals, and bytes per message that carried any."""
    sent = [t.bytes_up for t in turns if t.bytes_up]
    each = size(sum(sent) / len(sent)) if sent else "–"
    answered = sum(t.status == "answered" for t in turns)
    return len(turns), answered, size(sum(t.bytes_down for t in turns)), size(sum(sent)), each


def per_round(record: Record) -> float | None:
    """Mean bytes that a hospital sent in a round in which it was asked; the test after the last round is none.

    None for what is no federation: outside a simulation no message would be sent.
    """
    if record.method in OWN:
        return None
    turns = [t for t in record.turns if t.round <= record.rounds]
    return sum(t.bytes_up for t in turns) / max(len({(t.round, t.site) for t in turns}), 1)


def skipped(record: Record) -> list[int]:
    """The rounds in which no hospital gave a usable answer to anything but ``evaluate``: nothing was learned."""
    learning = [t for t in record.turns if t.round <= record.rounds and t.question != "evaluate"]
    useful = {t.round for t in learning if t.status == "answered"}
    return sorted({t.round for t in learning} - useful)


def taking(record: Record) -> Taking:
    """Who answered, was absent or was refused, hospital by round."""
    rounds = sorted({t.round for t in record.turns})
    by_place: dict[tuple[str, int], list[TurnRow]] = {}
    for turn in record.turns:
        by_place.setdefault((turn.site, turn.round), []).append(turn)
    rows = []
    for site in record.sites:
        cells = [_square(site.name, r, by_place.get((site.name, r), [])) for r in rounds]
        asked = sum(cell.status != "none" for cell in cells)
        full = sum(cell.status == "answered" for cell in cells)
        rows.append(Presence(site.name, cells, f"{full} of {asked}"))
    missed = [t for t in record.turns if t.status != "answered"]
    more = f"; the first {SHOWN} of {len(missed)}" if len(missed) > SHOWN else ""
    step = max(1, -(-len(rounds) // 20))
    ticks = ["test" if r > record.rounds else str(r) if i % step == 0 else "" for i, r in enumerate(rounds)]
    return Taking(ticks, rows if rounds else [], missed[:SHOWN], f"Every question without a usable answer{more}.")


def _square(site: str, r: int, turns: Sequence[TurnRow]) -> Square:
    """The worst of what happened between one hospital and the server in one round."""
    for status in ("refused", "absent"):
        for turn in turns:
            if turn.status == status:
                return Square(status, f"Round {r}, {site}: {status} at {turn.question}: {turn.why}")
    return Square("answered" if turns else "none", "")
