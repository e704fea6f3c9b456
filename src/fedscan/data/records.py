"""What a set of scans is: cases (who, where, which files) and the manifest that holds them all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SINGLE_SITE = "all"  # the site of every case where a layout does not know hospitals
IGNORE = "ignore"  # nnU-Net's name for the label of voxels that no reader has judged
IGNORED = 255  # what they are in prepared label maps: no class


@dataclass(frozen=True)
class Case:
    """One examination: its images by sequence (None: that sequence was not acquired) and its label map, if any.

    Several sequences may name the same 4D file; they are then its volumes in the order of `images`. A `subject` is
    the person: splits and partitions never divide one. `extra` holds further columns of the table as text.
    """

    name: str
    subject: str
    site: str
    images: Mapping[str, Path | None] = field(hash=False)
    label: Path | None = None
    extra: Mapping[str, str] = field(default_factory=dict, hash=False)

    def open(self, what: str) -> Any:
        """The 3D nibabel image of sequence `what`, or of the label where `what` is "label"; not yet read into memory.

        Raises ValueError where the case has no such file, it may not be read, or it is not one volume per sequence that
        names it.
        """
        import nibabel

        path = self.label if what == "label" else self.images.get(what)
        if path is None:
            raise ValueError(f"Case {self.name!r} has no {what!r}: it has {', '.join(self.present)}.")
        try:
            may_read(path)
        except OSError as error:
            raise ValueError(f"Case {self.name!r}: {path} cannot be opened: {why(error)}.") from error
        image = nibabel.load(path)
        index = channel(image.shape, what, self.sharing(what))
        return image if index is None else image.slicer[..., index]

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the sequences this case really has, in order."""
        return tuple(name for name, path in self.images.items() if path is not None)

    def sharing(self, what: str) -> tuple[str, ...]:
        """Names of the sequences kept in the same file as `what`, in order (`what` alone, as a rule)."""
        path = self.images.get(what)
        return (what,) if path is None else tuple(name for name, other in self.images.items() if other == path)


@dataclass(frozen=True)
class Manifest:
    """All cases below `root`, the sequences a case may have, and what the layout knows of labels and intensities.

    `labels` gives the foreground names and their values (0 is background and not listed; empty: unknown);
    `intensity` is "ct" (Hounsfield units), "mri" (no unit) or None (unknown).
    """

    root: Path
    sequences: tuple[str, ...]
    cases: tuple[Case, ...]
    labels: Mapping[str, int] = field(default_factory=dict, hash=False)
    intensity: str | None = None
    layout: str = "cases.csv"

    def __post_init__(self) -> None:
        """Refuses what no later step could mend: no case, two cases of one name, a subject at two sites."""
        if not self.cases:
            raise ValueError(f"{self.root}: no case was found.")
        seen: set[str] = set()
        site_of: dict[str, str] = {}
        for case in self.cases:
            if case.name in seen:
                raise ValueError(f"{self.root}: two cases are named {case.name!r}; every case needs a name of its own.")
            seen.add(case.name)
            if site_of.setdefault(case.subject, case.site) != case.site:
                raise ValueError(
                    f"{self.root}: subject {case.subject!r} stands at two sites, {site_of[case.subject]!r} and "
                    f"{case.site!r}; a subject belongs to one. If these are two persons, give them two names."
                )

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(sorted({case.site for case in self.cases}))


def may_read(path: Path) -> None:
    """Raises OSError where the file cannot be opened: of a file without permission nibabel says that it is no image."""
    with path.open("rb"):
        pass


def why(error: OSError) -> str:
    """What the system says, as the end of a sentence: "permission denied"."""
    return (error.strerror or str(error)).lower().rstrip(".")


def channel(shape: Sequence[int], what: str, names: Sequence[str]) -> int | None:
    """The index along the fourth axis at which `what` lies in a file of `shape` that `names` share; None for a 3D file.

    Raises ValueError where the file does not hold exactly one 3D volume for each name.
    """
    if len(shape) == 3 and len(names) == 1:
        return None
    if len(shape) == 4 and shape[3] == len(names):
        return list(names).index(what)
    size = " x ".join(map(str, shape))
    raise ValueError(
        f"{what} is {len(shape)}D ({size} voxels) where {len(names)} 3D volume(s) are needed: name one sequence per "
        "volume, or keep one 3D file per sequence"
    )
