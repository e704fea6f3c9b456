"""The ranges in which hyperparameters lie, as annotations that a study file is checked against."""

from collections.abc import Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Portion = Annotated[float, Ge(0), Le(1)]  # 0 to 1
Fraction = Annotated[float, Gt(0), Le(1)]  # above 0, up to 1
Decay = Annotated[float, Ge(0), Lt(1)]  # 0 up to, not with, 1
Above = Annotated[Mapping[Literal["above"], NotNegative], Len(1)]  # { above = 0.001 }
Sparsity = Fraction | Above  # which entries of an update travel: a part of them, or those above a threshold
Bits = Literal[8, 16, 32]
Clients = Annotated[int, Ge(1)] | None  # sites per round, drawn anew; None for all
