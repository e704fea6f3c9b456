"""What the values in label files mean to a study: its structures, the classes that are learned, and what is ignored."""

from collections.abc import Mapping, Sequence

from fedscan.data.records import IGNORE, IGNORED, Manifest
from fedscan.run import Problem
from fedscan.studyfile.file import StudyFile

Labels = Mapping[str, int | Sequence[int]]


def labels_of(file: StudyFile, manifest: Manifest) -> Labels:
    """The structures of a study: those that it names, else those of the data; and what the data say is ignored.

    Raises Problem where nothing names a structure, or "ignore" is no value of its own.
    """
    named: Labels | None = file.tables["task"].labels
    labels = dict(named or manifest.labels)
    if named and IGNORE in manifest.labels and manifest.labels[IGNORE] not in flat(named).values():
        labels.setdefault(IGNORE, manifest.labels[IGNORE])
    if not structures(labels):
        raise Problem(f"{file.path}: the cases do not say what their labels mean; name them in [task] labels.")
    if IGNORE in labels:
        value = labels[IGNORE]
        if not isinstance(value, int) or value in flat(structures(labels)).values():
            at = file.places.of(("task", "labels", IGNORE))
            raise Problem(f"{at}: {IGNORE!r} means voxels that are left out, and is one value that no structure has.")
    return labels


def structures(labels: Labels) -> dict[str, int | Sequence[int]]:
    """The labels that are learned and scored: all but what is ignored."""
    return {name: value for name, value in labels.items() if name != IGNORE}


def flat(labels: Labels) -> dict[str, int]:
    """A name for every value that labels and regions hold."""
    named = {value: name for name, value in labels.items() if isinstance(value, int)}
    values = sorted({v for value in labels.values() for v in ([value] if isinstance(value, int) else value)})
    return {named.get(value, f"label {value}"): value for value in values}


def classes_of(labels: Labels) -> dict[int, int]:
    """The class of each value that stands in label files, from 1 on; of what is ignored, ``IGNORED``."""
    known = {value: place for place, value in enumerate(flat(structures(labels)).values(), 1)}
    return known | {value: IGNORED for name, value in flat(labels).items() if name == IGNORE}


def unread(labels: Labels) -> str:
    """What a reader of the results must know of voxels that are ignored; "" where none are."""
    if IGNORE not in labels:
        return ""
    return (
        f"Voxels with the label {IGNORE!r} ({labels[IGNORE]}) are left out: they are neither trained on nor scored, "
        "and are shown as background."
    )
