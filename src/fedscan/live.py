"""What a run shows while it goes: a table of sites and a round bar, or a line per round without a terminal."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedscan.ledger import ScoreRow, SiteRow
from fedscan.report.words import size

LOCAL = "local-only"
WELL = ("is there", "works on", "answered")  # how a hospital's state begins where nothing is amiss


@dataclass
class Seen:
    """What is known of one site so far. Dice are means over labels and cases of the last scores."""

    down: int = 0  # bytes
    up: int = 0
    loss: float | None = None
    dice: float | None = None
    local: float | None = None
    state: str = ""


@dataclass
class Show:
    """Watches a run, as ``run``'s ``watch``, and shows it on ``console``. Use it as a context."""

    sites: Sequence[SiteRow]
    rounds: int
    console: Console = field(default_factory=lambda: Console(stderr=True))
    title: str = ""

    def __post_init__(self) -> None:
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.method, self.round, self.note = "", 0, ""
        self.live: Live | None = None

    def __enter__(self) -> "Show":
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self.table, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, what: str, value: Any) -> None:
        """Takes in one event: "method", "travels", "earlier" (turns before a resume), "round", "turn", "scores" ..."""
        if what == "method":
            self.method, self.round = value, 0
            for seen in self.seen.values():
                seen.down, seen.up, seen.loss, seen.state = 0, 0, None, ""
            self.say(f"{self.method}:")
        elif what == "travels":  # always said, above the table where there is one
            self.console.print(f"  {value}", markup=False, highlight=False, soft_wrap=True)
        elif what == "earlier":
            for row in value:
                self.count(row.site, row)
        elif what == "round":
            self.round = value
        elif what == "turn":
            self.turn(value)
        elif what == "skipped":
            self.note = value
            self.say(value)
        elif what == "scores":
            self.scores(value)
        if self.live:
            self.live.refresh()  # by hand: a thread that refreshes would not get along with forked workers

    def waiting(self, site: str, sentence: str) -> None:
        """What a hospital elsewhere does, or what is waited for, and until when."""
        self.seen[site].state = sentence
        self.say(f"  {site} {sentence}")
        if self.live:
            self.live.refresh()

    def count(self, site: str, row: Any) -> Seen:
        """What one turn sent and reported."""
        seen = self.seen[site]
        seen.down += row.bytes_down
        seen.up += row.bytes_up
        if row.numbers and "loss" in row.numbers:
            seen.loss = row.numbers["loss"]
        return seen

    def turn(self, row: Any) -> None:
        """One answer, or that there is none."""
        seen = self.count(row.turn.site, row)
        seen.state = "" if row.status == "answered" else f"{row.status}: {row.why}"
        if seen.state:
            self.say(f"  round {row.turn.round}: {row.turn.site} {seen.state}")

    def scores(self, rows: Sequence[ScoreRow]) -> None:
        """The scores at the end of a round."""
        for name, dice in dice_of(rows).items():
            if self.method == LOCAL:
                self.seen[name].local = dice
            else:
                self.seen[name].dice = dice
        self.say(self.line(rows))

    def line(self, rows: Sequence[ScoreRow]) -> str:
        """One round in one line."""
        test = bool(rows) and rows[0].split == "test"
        parts = ["test" if test else f"round {self.round}/{self.rounds}"]
        losses = [seen.loss for seen in self.seen.values() if seen.loss is not None]
        if losses and not test:
            parts.append(f"loss {statistics.fmean(losses):.4f}")
        dice = dice_of(rows)
        if dice:
            each = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
            parts.append(f"Dice {statistics.fmean(dice.values()):.3f} ({each})")
        down, up = (sum(getattr(seen, way) for seen in self.seen.values()) for way in ("down", "up"))
        parts.append(f"{size(down)} down, {size(up)} up")
        return "  " + "  ".join(parts)

    def say(self, line: str) -> None:
        """A line, where there is no table to change."""
        if not self.live:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Group:
        """The whole picture, as it stands."""
        local = any(seen.local is not None for seen in self.seen.values())
        shown = Table(title=self.title or None, title_justify="left", expand=False)
        for name in ("site", "cases", "about", "loss", *(["Dice alone"] if local else []), "Dice", "down", "up", ""):
            shown.add_column(name, justify="left" if name in ("site", "about", "") else "right")
        names = [row.name for row in self.sites]
        about = {row.name: row for row in self.sites}
        for name in [*names, *(n for n in self.seen if n not in about)]:
            seen, row = self.seen[name], about.get(name)
            cells = [name, str(row.used) if row else "", row.about if row else "", number(seen.loss, 4)]
            cells += [number(seen.local)] if local else []
            cells += [number(seen.dice), size(seen.down), size(seen.up)]
            style = "" if seen.state.startswith(WELL) else "red"
            shown.add_row(*map(Text, cells), Text(seen.state, style=style))  # as text: a name may hold brackets
        bar = Table.grid(padding=(0, 1))
        done = f"round {min(self.round, self.rounds)}/{self.rounds}"
        bar.add_row(self.method, ProgressBar(total=self.rounds, completed=min(self.round, self.rounds), width=40), done)
        return Group(shown, bar, Text(self.note))


def number(value: float | None, digits: int = 3) -> str:
    """A number for a cell; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def dice_of(rows: Iterable[ScoreRow]) -> dict[str, float]:
    """Mean Dice of each site by the model that it uses, over labels and cases where it is defined."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        own = row.trained_at in (row.tested_at, "federation", "pooled")
        if own and row.metric == "dice" and row.value is not None:
            values[row.tested_at].append(row.value)
    return {name: statistics.fmean(values[name]) for name in sorted(values)}
