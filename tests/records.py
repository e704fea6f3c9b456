"""A maker of ``Record``s that look like those of a real run: five hospitals, curves, overlays, silent sites, gaps."""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fedscan.ledger import Overlay, Record, ScoreRow, SiteRow, TurnRow

LABELS = {"grey matter": 1, "white matter": 2, "lesion": 3}
ABOUT = {
    "Ash Park": "3 T, thin slices",
    "Birch Lane": "1.5 T, noisy",
    "Cedar Hill": "3 T, strong bias field",
    "Dunmore": "1.5 T, thick slices",
    "Elm Court": "inverted contrast",
}
LOCAL = {"Ash Park": 0.74, "Birch Lane": 0.66, "Cedar Hill": 0.70, "Dunmore": 0.64, "Elm Court": 0.72}
FEDERATED = {"Ash Park": 0.80, "Birch Lane": 0.77, "Cedar Hill": 0.79, "Dunmore": 0.73, "Elm Court": 0.61}
POOLED = {"Ash Park": 0.82, "Birch Lane": 0.79, "Cedar Hill": 0.80, "Dunmore": 0.76, "Elm Court": 0.70}
HARDER = {"grey matter": 0.02, "white matter": 0.06, "lesion": -0.08}  # what a label adds to a site's Dice
ABSENT = {(3, "Dunmore"), (4, "Dunmore"), (7, "Birch Lane")}
REFUSED = {(6, "Elm Court")}


def make_record(
    method: str = "fedsegnet", rounds: int = 10, cases: int = 8, seed: int = 0, lift: float = 0.0
) -> Record:
    """A whole run with five hospitals; ``lift`` is added to every federated Dice. The same arguments, the same record.

    Elm Court is harmed by federation, Birch Lane has one case without a lesion (its lesion scores are undefined).
    """
    rng = np.random.default_rng(seed)
    final = {site: value + lift for site, value in FEDERATED.items()}
    curve = [row for r in range(1, rounds + 1) for row in _scores(rng, r, "validation", _at(final, r, rounds), 3)]
    comparisons = {
        "local-only": tuple(_cross(rng, rounds, cases)),
        "centralised": tuple(_scores(rng, rounds, "test", POOLED, cases, "pooled")),
    }
    return Record(
        name="Brain tissue and lesions, five hospitals",
        method=method,
        study={
            "name": "brain",
            "seed": seed,
            "task": {"name": "segmentation", "labels": dict(LABELS)},
            "method": {"name": method, "rounds": rounds, "local_epochs": 2, "keep": 0.01},
            "step": {"lr": 1e-3, "optimiser": "adamw"},
        },
        study_hash=hashlib.sha256(method.encode()).hexdigest(),
        seed=seed,
        rounds=rounds,
        labels=dict(LABELS),
        sites=tuple(_site(name, cases, i) for i, name in enumerate(ABOUT)),
        turns=tuple(_turns(rng, rounds)),
        scores=(*curve, *_scores(rng, rounds, "test", final, cases)),
        comparisons=comparisons,
        overlays=tuple(_overlays(final)),
        versions={"fedscan": "0.1.0", "torch": "2.9.0", "monai": "1.5.1", "python": "3.12.3"},
        command=f"fedscan run brain.toml --seed {seed}",
        seconds=143.2,
        notes=("The anatomy is real (MNI152 average); the individuals, the lesions and the scanners are simulated.",),
        travels="All 84 parameters travel; the 12 running statistics of the batch norms stay at the hospital.",
    )


def _at(final: Mapping[str, float], r: int, rounds: int) -> dict[str, float]:
    """Dice of each site after round ``r`` of a run that ends near ``final``."""
    return {site: value * (1 - 0.75 * float(np.exp(-3.0 * r / rounds))) for site, value in final.items()}


def _site(name: str, cases: int, i: int) -> SiteRow:
    left_out = (("case_099", "the label has another shape than the image"),) if name == "Cedar Hill" else ()
    train, validation = 10 + 2 * i, 3
    used = train + validation + cases
    return SiteRow(name, used + len(left_out), used, train, validation, cases, ABOUT[name], left_out)


def _scores(
    rng: np.random.Generator,
    r: int,
    split: str,
    level: Mapping[str, float],
    cases: int,
    trained_at: str = "federation",
) -> Iterator[ScoreRow]:
    """Rows of one model tested everywhere. A case's difficulty depends on its name only, so that models are paired."""
    for site, value in level.items():
        for k in range(cases):
            case = f"{split}_{k:03d}"
            ease = np.random.default_rng(int(hashlib.sha256(f"{site}{case}".encode()).hexdigest()[:8], 16)).normal()
            for label in LABELS:
                dice = float(np.clip(value + HARDER[label] + 0.03 * ease + 0.01 * rng.normal(), 0.02, 0.98))
                gone = site == "Birch Lane" and k == 0 and label == "lesion"
                sizes = (0.0, 0.0) if gone else (12.0, 0.0 if dice < 0.1 else 11.5)
                rows = {metric: None if gone else score for metric, score in _metrics(dice, rng).items()}
                for metric, score in {**rows, "reference_ml": sizes[0], "volume_ml": sizes[1]}.items():
                    yield ScoreRow(r, split, trained_at, site, case, f"{site}-{k}", label, metric, score)


def _metrics(dice: float, rng: np.random.Generator) -> dict[str, float]:
    shift = float(rng.normal(0, 0.03))
    return {
        "dice": dice,
        "iou": dice / (2 - dice),
        "hd95": 2.0 + 30 * (1 - dice) ** 2,
        "nsd": min(0.99, dice + 0.08),
        "precision": min(0.99, dice + shift),
        "recall": max(0.01, dice - shift),
        "volume_error": shift,
    }


def _cross(rng: np.random.Generator, r: int, cases: int) -> Iterator[ScoreRow]:
    """Each site's own model, tested everywhere: worse away from home, hopeless to and from the inverted contrast."""
    for home in LOCAL:
        level = {
            site: LOCAL[home] if site == home else (0.24 if "Elm Court" in (home, site) else LOCAL[home] - 0.1)
            for site in LOCAL
        }
        yield from _scores(rng, r, "test", level, cases, home)


def _turns(rng: np.random.Generator, rounds: int) -> Iterator[TurnRow]:
    call = 0
    for r in range(1, rounds + 1):
        for question, privacy, down, up in (("train", "weights", 900_000, 31_000), ("measure", "statistics", 640, 420)):
            for site in ABOUT:
                status, why = "answered", ""
                if (r, site) in ABSENT:
                    status, why = "absent", "no answer within 60 s"
                elif (r, site) in REFUSED and question == "train":
                    status, why = "refused", "leaf head.weight holds values that are not finite"
                sent = 0 if status == "absent" else up + int(rng.integers(0, 900))
                yield TurnRow(
                    round=r,
                    call=call,
                    site=site,
                    question=question,
                    privacy=privacy,
                    status=status,
                    seconds=float(rng.uniform(1, 3)),
                    bytes_down=down,
                    bytes_up=sent,
                    asked_at=1.76e9 + 10 * call,
                    digest_down="a" * 64,
                    digest_up="b" * 64 if sent else "",
                    why=why,
                    numbers={"loss": 1 / r},
                )
            call += 1


def _ellipsoid(shape: tuple[int, ...], centre: tuple[float, ...], radius: tuple[float, ...]) -> NDArray[np.bool_]:
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    distance = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius, strict=True))
    return np.asarray(distance <= 1)


def _overlays(level: Mapping[str, float]) -> Iterator[Overlay]:
    """Three cases per site on a 40 x 48 x 20 grid of 3 x 3 x 6 mm: a head of nested ellipsoids and a lesion."""
    shape = (40, 48, 20)
    for i, (site, dice) in enumerate(level.items()):
        for j, (rank, shift) in enumerate((("best", 0.02), ("median", 0.06), ("worst", 0.14))):
            masks = []
            for s in (0.0, shift):
                mask = np.zeros(shape, np.uint8)
                mask[_ellipsoid(shape, (s, 0, 0), (0.8, 0.85, 0.8))] = 1
                mask[_ellipsoid(shape, (s, s, 0), (0.6, 0.65, 0.6))] = 2
                mask[_ellipsoid(shape, (0.3, 0.2 + s, s), (0.16, 0.14, 0.2))] = 3
                masks.append(mask)
            noise = np.random.default_rng(10 * i + j).normal(0, 6, shape)
            image = (np.array([10, 90, 130, 180])[masks[0]] + noise).astype(np.float32)
            value = round(dice + (0.06, 0.0, -0.08)[j], 3)
            yield Overlay(site, f"test_{j:03d}", rank, value, image, masks[0], masks[1], (3.0, 3.0, 6.0))
