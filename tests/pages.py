"""What the tests of pages share: a page taken apart, and the smallest records."""

import re
from dataclasses import replace
from html.parser import HTMLParser

from fedscan.ledger import Record, ScoreRow, SiteRow, TurnRow
from records import make_record


class Page(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def rows(site: str, values: list[float | None], trained_at: str = "federation", label: str = "a") -> list[ScoreRow]:
    return [
        ScoreRow(1, "test", trained_at, site, f"c{k}", f"s{k}", label, "dice", value) for k, value in enumerate(values)
    ]


def small(alone: list[float | None], ours: list[float | None]) -> Record:
    """One hospital whose cases scored ``alone`` and ``ours``."""
    return replace(
        make_record(rounds=1, cases=1),
        sites=(SiteRow("A", 9, 9, 2, 1, len(ours)),),
        scores=tuple(rows("A", ours)),
        comparisons={"local-only": tuple(rows("A", alone, "A"))},
        turns=(),
        overlays=(),
    )


def turn(site: str, r: int, privacy: str = "weights", up: int = 100, status: str = "answered") -> TurnRow:
    return TurnRow(r, r, site, "train", privacy, status, 1.0, 1000, up, 0.0, "", "", "" if up else "gone")
