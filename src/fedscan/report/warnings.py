"""What went so wrong in a run that no number of it can be read without knowing; said on every page and under tables."""

from collections.abc import Iterator, Mapping, Sequence

from fedscan.ledger import Record
from fedscan.report.tables import final
from fedscan.report.turns import skipped
from fedscan.report.words import listed, plural


def warnings(record: Record) -> Iterator[str]:
    """What must be known of one run, a sentence or two each; nothing where all went well."""
    if lost := skipped(record):
        which = listed([str(r) for r in lost[:10]]) + (f" and {len(lost) - 10} more" if lost[10:] else "")
        yield (
            f"Nothing was learned in {plural(len(lost), 'round')} of {record.rounds} ({which}): no hospital gave a "
            f"usable answer. Why stands in section 7 of the run's report."
        )
    tests = final(record.scores)
    if untested := [site.name for site in record.sites if not site.test]:
        several = len(untested) > 1
        yield f"{listed(untested)} {'have' if several else 'has'} no test case, so no gain or harm can be said there."
    for label in record.labels:
        sizes = [row.value for row in tests if row.label == label and row.metric.startswith("reference_")]
        if sizes and not any(sizes):
            yield f"No test case holds {label}: its Dice is 0 wherever a model outlined any of it, and else undefined."


def of_runs(runs: Mapping[str, Sequence[Record]]) -> list[str]:
    """The warnings of several methods' runs: each once, with the methods and seeds it is of unless it is of all."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, records in runs.items():
        for record in records:
            for warning in warnings(record):
                found.setdefault(warning, {}).setdefault(name, []).append(str(record.seed))
    said = []
    for warning, seeds in found.items():
        part = {name: len(of) < len(runs[name]) for name, of in seeds.items()}
        names = [f"{name} (seed {listed(of)})" if part[name] else name for name, of in seeds.items()]
        said.append(f"{listed(names)}: {warning}" if any(part.values()) or len(seeds) < len(runs) else warning)
    return said
