"""Numbers as a reader wants them: sensible digits, units, and always the support beside a mean."""

from dataclasses import dataclass

from fedscan.statistics import Comparison, Summary, within

NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95 (mm)",
    "hd95_pooled": "HD95 pooled (mm)",
    "hd95_area": "HD95 by area (mm)",
    "nsd": "Surface Dice",
    "precision": "Precision",
    "recall": "Recall",
    "volume_error": "Volume error",
}
MEANINGS = {
    "dice": "overlap of the two outlines' areas: twice the shared volume over the sum of both; 1 is perfect.",
    "iou": "shared volume over the volume of both together; 1 is perfect, and it is always below Dice.",
    "hd95": "how far apart the two surfaces lie, in mm: the larger of the two directed 95th percentiles; 0 is perfect.",
    "hd95_pooled": "the 95th percentile of all surface distances, both directions together, in mm; 0 is perfect.",
    "hd95_area": "as HD95, each piece of surface counting by its area, in mm; 0 is perfect.",
    "nsd": "the part of both surfaces that lies within the study's tolerance of the other; 1 is perfect.",
    "precision": "the part of what the model outlined that is truly the structure; low where it outlines too much.",
    "recall": "the part of the structure that the model found (sensitivity); low where it misses some.",
    "volume_error": "how much larger (+) or smaller (−) the outlined volume is than the true one.",
}


@dataclass(frozen=True)
class Cell:
    """A mean, its interval, and how many scores stand behind it; ``gap`` where some are undefined."""

    text: str
    interval: str = ""
    support: str = ""
    gap: bool = False


def number(value: float | None, metric: str = "dice", signed: bool = False) -> str:
    """A score with the digits it deserves: 0.84, 3.1 (mm), +12 %, and a difference +0.021; a dash for none."""
    if value is None:
        return "–"
    if metric == "volume_error":
        text, signed = f"{100 * value:.0f}", True
    else:
        text = f"{value:.{1 if metric.startswith('hd95') else 3 if signed else 2}f}"
    size, unit = text.lstrip("-"), " %" if metric == "volume_error" else ""
    if not size.strip("0."):  # what rounds to nothing has no sign
        return size + unit
    return ("−" if value < 0 else "+" if signed else "") + size + unit


def interval(of: Summary | Comparison, metric: str = "dice", signed: bool = False) -> str:
    """The 95 % interval in brackets, within the values that a score (``signed``: a difference of two) can have.

    Empty where there are too few values for one.
    """
    cut = within(of, metric, difference=signed)
    if cut.low is None or cut.high is None:
        return ""
    return f"[{number(cut.low, metric, signed)}, {number(cut.high, metric, signed)}]"


def estimate(summary: Summary | None, metric: str = "dice", signed: bool = False, unit: str = "") -> Cell | None:
    """A mean with its interval and "used/total" ``unit``; None stays None."""
    if summary is None:
        return None
    support = f"{summary.used}/{summary.total}{unit and ' ' + unit}"
    text = "" if summary.mean is None else number(summary.mean, metric, signed)
    support = support if text else f"undefined, {support}"
    return Cell(text, interval(summary, metric, signed), support, summary.undefined > 0)


def size(count: float) -> str:
    """Bytes as B, kB or MB (powers of 1000), to three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s or 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def listed(words: list[str]) -> str:
    """Words as "a", "a and b", or "a, b and c"."""
    return " and ".join(([", ".join(words[:-1])] if words[1:] else []) + words[-1:])


def plural(n: int, word: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{n} {word}{'' if n == 1 else 's'}"
