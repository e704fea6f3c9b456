"""What the table of the FedSegNet paper has for rows here, and the file that keeps what they gave."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "results"
FOLDERS = {"hippocampus": "hippocampus", "glioma": "lgg_multisite"}  # below FEDSCAN_SHARED/data
# In which condition adaptive weights are compared with none: labels as they are, and those of one hospital spoilt.
CONDITIONS = {
    "hippocampus": ("", "swap:float-v2", "shuffle:float-v2", "dilate:float-v2", "dilate+:float-v2"),
    "glioma": (),
}


@dataclass(frozen=True)
class Row:
    """A row of the table: its settings on top of the study file, and the paper's Dice where it has one.

    at     more settings, for one study
    alone  whether nothing is exchanged between hospitals, so that bytes per round mean nothing
    first  whether only the first seed is run, because it takes long
    """

    name: str
    title: str
    settings: tuple[str, ...]
    paper: str = "–"
    at: dict[str, tuple[str, ...]] = field(default_factory=dict)
    alone: bool = False
    first: bool = False

    def of(self, study: str) -> tuple[str, ...]:
        """All settings of the row in a study."""
        return self.settings + self.at.get(study, ())


# In the order in which they are run: what tells most comes first. The first is what others are held to in the table.
ROWS = (
    Row("fedsegnet", "FedSegNet", (), "0.874"),
    Row("federated-unet", "Federated U-Net", ("method.name=federated-unet",), "0.835"),
    Row("local-only", "Every hospital alone", ("method.name=local-only", "model.name=fedsegnet"), alone=True),
    Row("fedsegnet-no-adaptive", "– without adaptive weights", ("method.name=fedsegnet-no-adaptive",), "0.828"),
    Row("fedsegnet-no-transformer", "– without transformer", ("method.name=fedsegnet-no-transformer",), "0.840"),
    Row("fedsegnet-float32", "– dense float32 updates", ("method.bits=32",)),
    Row("fedsegnet-sparse", "– largest 10 % of each update", ("method.fraction=0.1",)),
    Row("centralised-unet", "U-Net, pooled cases", ("method.name=centralised",), "0.810", alone=True),
    Row("traditional-fl", "Traditional FL", ("method.name=traditional-fl",)),
    Row("transformer-fl", "Transformer FL (UNETR)", ("method.name=transformer-fl", "model.preset=tiny")),
    Row(
        "centralised-swin-unetr", "Swin UNETR, pooled cases",
        ("method.name=centralised", "model.name=swin-unetr", "model.preset=tiny"), "0.842",
        # The network takes sides that 32 divides: here it is trained on patches and slides over whole cases.
        {"hippocampus": ("data.patch=[32,32,32]",)}, alone=True, first=True,
    ),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; of a row that stands there twice, the last."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return list({(line["row"], line["seed"], line["corrupt"]): line for line in found}.values())
