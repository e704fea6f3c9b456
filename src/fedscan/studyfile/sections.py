"""The tables of a study file: what may stand in them, and what holds where nothing is said."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from fedscan.data.augment import Augmentation, Intensity
from fedscan.step import Step
from fedscan.tasks.losses import dice_cross_entropy
from fedscan.tasks.registry import GIVEN, TaskCard

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
Whole = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """One table of a study file."""

    model_config = STRICT


class Top(Table):
    """What stands outside the tables."""

    name: str = Field("", max_length=100)
    seed: int = Field(0, ge=0, lt=2**63)


class Data(Table):
    """Which scans, and how they become arrays.

    cases            a table of cases or a folder in a known layout, relative to the study's file; or "demo"
    sites            the sites that take part; all, where nothing is said
    sequences        the channels, in order; by default all that the cases have. A case may lack some of them, but none
                     of ``require``
    grid, spacing    voxels (D, H, W) that each scan is resampled to, or mm per voxel, or "native"
    patch            voxels (D, H, W) cut from each case in training; ``foreground``: the share centred on a label
    normalise, ct_window, ct_mean, ct_sd, label_interpolation, dtype   as in ``fedscan.data.preprocess.Recipe``
    fractions        of subjects in train, validation and test
    left_out_limit   how many cases may be unusable: a share (0.1) or a number (3)
    seed             of the split and the partition; that of the study, where nothing is said
    augment          whether training cases are changed at random, as [data.augmentation] says
    """

    cases: str = ""
    sites: tuple[str, ...] | None = None
    sequences: tuple[str, ...] | None = None
    require: tuple[str, ...] = ()
    grid: tuple[Whole, Whole, Whole] | None = None
    spacing: tuple[Positive, Positive, Positive] | Literal["native"] | None = None
    patch: tuple[Whole, Whole, Whole] | None = None
    foreground: Share = 1 / 3
    normalise: Literal["zscore", "zscore-foreground", "ct", "none"] = "zscore"
    ct_window: tuple[float, float] | None = None
    ct_mean: float | None = None
    ct_sd: Positive | None = None
    label_interpolation: Literal["per-label", "nearest"] = "per-label"
    dtype: Literal["float32", "float16"] = "float32"
    fractions: tuple[Share, Share, Share] = (0.7, 0.1, 0.2)
    left_out_limit: Annotated[int, Field(ge=0)] | Share = 0.1
    augment: bool = True
    seed: int | None = Field(None, ge=0, lt=2**63)

    @field_validator("fractions")
    @classmethod
    def _whole(cls, parts: tuple[float, float, float]) -> tuple[float, float, float]:
        if parts[0] <= 0 or abs(sum(parts) - 1) > 1e-6:
            raise ValueError("three parts (train, validation, test) that sum to 1, with some training, were meant")
        return parts


class Partition(Table):
    """Whether cases stay at their true sites or are dealt to simulated ones.

    sites     how many simulated sites
    by        for "dirichlet": the classes that are skewed, subjects' dominant label or thirds of their label volume
    labels    for "lesion-size" and "volume": the values in the label files that count; all above 0 by default
    sequence  for "intensity": the sequence that is measured; the first by default
    """

    how: Literal["true", "dirichlet", "quantity", "intensity", "lesion-size"] = "true"
    sites: Whole | None = None
    by: Literal["dominant", "volume"] = "volume"
    labels: tuple[Whole, ...] | None = None
    sequence: str | None = None
    alpha: Positive = 0.5
    law: Literal["dirichlet", "power"] = "dirichlet"
    exponent: Annotated[float, Field(ge=0)] = 1.0
    minimum: Whole = 3

    @model_validator(mode="after")
    def _how_many(self) -> "Partition":
        if self.how != "true" and self.sites is None:
            raise ValueError("[data.partition] lacks 'sites', how many there are")
        known = ("how", *PARTITION[self.how])
        for name, field in type(self).model_fields.items():
            if name not in known and getattr(self, name) != field.default:
                raise ValueError(f'[data.partition] {name} plays no part in how = "{self.how}": leave it out')
        return self


PARTITION = {  # the settings that play a part, by way
    "true": (),
    "dirichlet": ("sites", "minimum", "by", "labels", "alpha"),
    "quantity": ("sites", "minimum", "law", "alpha", "exponent"),
    "intensity": ("sites", "minimum", "sequence"),
    "lesion-size": ("sites", "minimum", "labels"),
}


class Run(Table):
    """How the study is run. ``silent`` and ``seconds`` simulate sites that are absent or slow.

    every      validate after every so many rounds; 0 for never
    absent     what to do where too few sites answer
    mode       "exact" promises the same bits every time, "fast" does not
    baselines  methods that are run too, so that the report can compare: "local-only", "centralised"
    """

    every: Annotated[int, Field(ge=0)] = 1
    absent: Literal["skip", "wait", "stop"] = "skip"
    threads: Whole = 1
    device: str = Field("cpu", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description='"cpu", "cuda", "cuda:N" or "auto"')
    mode: Literal["exact", "fast"] = "exact"
    silent: Mapping[str, tuple[Whole, ...]] = Field(default_factory=dict)
    seconds: Mapping[str, Positive] = Field(default_factory=dict)
    baselines: tuple[str, ...] = ()


class Scores(Table):
    """How masks are scored: mm of tolerance per label for surface Dice, and the definition of HD95.

    penalty   "image_diagonal": what HD95 is where one of the two masks is empty; nothing: it is undefined there
    """

    tolerance: Mapping[str, Positive] = Field(default_factory=dict)
    hd95: Literal["hd95", "hd95_pooled", "hd95_area"] = "hd95"
    penalty: Literal["image_diagonal"] | None = None


def of_dataclass(name: str, described: Any, limits: Mapping[str, Any], without: Sequence[str] = ()) -> type[Table]:
    """A table with the fields, annotations and defaults of a dataclass, numbers within ``limits``."""
    hints = get_type_hints(described)
    made: dict[str, Any] = {}
    for f in fields(described):
        if f.name in without:
            continue
        default = f.default if f.default is not MISSING else ...
        kind = hints[f.name]
        made[f.name] = (Annotated[kind, limits[f.name]] if f.name in limits else kind, default)
    return create_model(name, __base__=Table, **made)


def of_function(name: str, described: Any, limits: Mapping[str, Any] = {}, without: Sequence[str] = ()) -> type[Table]:
    """A table with the parameters of a function that a study can write down: numbers, words, truth values, lists."""
    found = inspect.signature(described, eval_str=True).parameters.values()
    made: dict[str, Any] = {
        p.name: (
            Annotated[p.annotation, limits[p.name]] if p.name in limits else p.annotation,
            ... if p.default is p.empty else p.default,
        )
        for p in found
        if p.name not in without and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and writable(p.annotation)
    }
    return create_model(name, __base__=Table, **made)


def of_options(options: Mapping[str, tuple[Any, Any]]) -> type[Table]:
    """A table with the hyperparameters of a method: annotation and default by name."""
    made: dict[str, Any] = {
        name: (kind, ... if default is inspect.Parameter.empty else default)
        for name, (kind, default) in options.items()
        if writable(kind)
    }
    return create_model("Method", __base__=Table, **made)


def writable(kind: Any) -> bool:
    """Whether a value of this annotation can be written in a study file."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return True
    if origin is Annotated:
        return writable(inside[0])
    if origin in (UnionType, Union, tuple, list) or (
        isinstance(origin, type) and issubclass(origin, Sequence | Mapping)
    ):
        return all(writable(k) for k in inside if k is not Ellipsis)
    return kind in (int, float, bool, str, NoneType)


_above, _at_least, _whole = Field(gt=0), Field(ge=0), Field(ge=1)
LARGEST = 1_000_000  # of a rate: far beyond any that learns, and far below what float32 holds
Train = of_dataclass(
    "Train",
    Step,
    {
        "lr": Field(gt=0, le=LARGEST), "momentum": Field(ge=0, lt=1), "weight_decay": Field(ge=0, le=LARGEST),
        "epochs": _whole, "batch": _whole, "accumulate": _whole, "clip": _above,
    },
)  # fmt: skip
Train = create_model("Train", __base__=Train, rounds=(Whole, 10))
Augment = of_dataclass("Augment", Augmentation, {"shift": _at_least, "probability": Field(ge=0, le=1)}, ["intensity"])
Intensities = of_dataclass("Intensities", Intensity, {"brightness": _at_least, "noise": _at_least})
Loss = of_function(
    "Loss", dice_cross_entropy, {"lam": Field(ge=0, le=1), "smooth": _above}, without=["logits", "labels", "ignored"]
)
Labels = Mapping[str, Annotated[int, Field(ge=1, le=65535)] | tuple[Annotated[int, Field(ge=1, le=65535)], ...]]
LABELS = Field(None, description="for each name a whole number above 0 in the label files, or a list of those,")
KIND: Any = Literal["segmentation"]
Task = create_model("Task", __base__=Loss, kind=(KIND, "segmentation"), labels=(Labels | None, LABELS))


def of_task(card: TaskCard) -> type[Table]:
    """The table [task] of a task that an installed package brings."""
    options = of_function("Options", card.make, without=GIVEN)
    return create_model("Task", __base__=options, kind=(str, card.name), labels=(Labels | None, LABELS))


TABLES: dict[str, type[Table]] = {
    "data": Data, "data.partition": Partition, "data.augmentation": Augment,
    "data.augmentation.intensity": Intensities, "task": Task, "train": Train, "run": Run, "scores": Scores,
}  # fmt: skip
