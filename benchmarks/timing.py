"""Times a call over and over, and says what the middle and the ends of the times are."""

import statistics
import time
from collections.abc import Callable


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall seconds of each of ``repeats`` runs, after one that is not counted."""
    run()
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        out.append(time.perf_counter() - start)
    return out


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {k: round(v, digits) for k, v in named.items()}
