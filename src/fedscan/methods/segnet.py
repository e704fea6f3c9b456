"""FedSegNet, its ablations, and the baselines of its tables: a method and the network it is published with.

The paper contradicts itself; each contradiction is an option. Sites per round (5, or 3): ``clients``. Aggregation by
all of quality, divergence, volume and diversity, by divergence only (eq. 17), or FedAvg (eq. 13): ``aggregation``;
quality is what a site finds of its own model, or what the others find of it.
"Adam for both local and global training" or plain averaging: ``server``. Batch, loss and network are the study's.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Unpack

from torch import nn

from fedscan.averaging import Parts, averaging, plain_train
from fedscan.method import Message, Method, Tree
from fedscan.methods.card import Reduction, card, dense
from fedscan.methods.crossed import cross_scored
from fedscan.methods.kinds import Bits, Decay, NotNegative, Portion, Positive, Sparsity
from fedscan.parts import adaptive as weights
from fedscan.parts.channel import codec, sparse
from fedscan.parts.step import adaptive as adaptive_step
from fedscan.parts.step import take
from fedscan.parts.weigh import Weigh, by_cases, equally
from fedscan.schema import Schema
from fedscan.site import Site
from fedscan.spec import Number

Aggregation = Literal["adaptive", "cross-scored", "divergence-only", "fedavg"]
REPORTS = {
    "dice": Number(0, 1, optional=True),
    "hd95": Number(0, optional=True),
    "diversity": Number(0, 1),
}
DESCRIBED = {"diversity": Number(0, 1)}
BY_DIVERGENCE = ("a", "h", "alpha", "gamma", "c")  # what equation 17 leaves out
IDLE = {  # what cannot act, by the option that keeps it from that
    ("aggregation", "divergence-only"): BY_DIVERGENCE,
    ("aggregation", "fedavg"): (*BY_DIVERGENCE, "beta", "cosine", "w_min", "w_max", "ema"),
    ("server", "average"): ("eta",),
}
FAREED = {
    "family": "fedsegnet",
    "paper": "Fareed, Ding, Hussain, Uddin, Arif & Tajoor, FedSegNet, 2025",
    "year": 2025,
    "url": "",
}
CODED = "weights down: 4P bytes, or their coded change; their change up: fraction P (bits/8 + index) + 4 bytes a scale"


def coded(schema: Schema, options: Mapping[str, Any]) -> int:
    """fraction P (bits / 8 + an index of 1 to 2 bytes) + scales + statistics."""
    fraction, bits = options["fraction"], options["bits"]
    return dense(schema, options) if (fraction, bits) == (1, 32) else codec(fraction, bits).bound(schema)


def coded_down(schema: Schema, options: Mapping[str, Any]) -> int:
    """The same of the change that a site is sent where it holds the last model."""
    return coded(schema, {"fraction": options["down_fraction"], "bits": options["down_bits"]})


def by_quality(options: Mapping[str, Any]) -> bool:
    """Whether a site counts by how well models do on validation cases."""
    return options["aggregation"] in ("adaptive", "cross-scored") and options["alpha"] > 0


def all_act(given: Mapping[str, Any], options: Mapping[str, tuple[Any, Any]]) -> None:
    """ValueError, in one sentence, for hyperparameters that are not at their defaults and cannot act."""
    for (key, value), idle in IDLE.items():
        if given[key] == value and (lost := [name for name in idle if given[name] != options[name][1]]):
            them, do = ("them", "do") if len(lost) > 1 else ("it", "does")
            raise ValueError(f"{', '.join(lost)} {do} nothing where {key} is {value!r}: leave {them} out")


def scored_train(site: Site, model: nn.Module, message: Message) -> Tree:
    """The study's local epochs, then Dice and HD95 (mm) of the local model on the site's validation cases."""
    report = plain_train(site, model, message)
    quality = site.task.quality(model.eval(), site.validation)
    return {**report, "dice": quality["dice"], "hd95": quality["hd95"], "diversity": diversity_of(site)}


def described_train(site: Site, model: nn.Module, message: Message) -> Tree:
    """The study's local epochs; the model is scored elsewhere."""
    return {**plain_train(site, model, message), "diversity": diversity_of(site)}


def diversity_of(site: Site) -> float:
    """How evenly the classes are spread over the site's training cases, measured once."""
    if "diversity" not in site.state:
        site.state["diversity"] = site.task.diversity(site.train)
    found: float = site.state["diversity"]
    return found


@card(
    "fedsegnet",
    title="FedSegNet",
    equation="x <- x + sum_k w_k (x_k - x), w_k ~ n_k^c (q_k/q)^alpha exp(-beta max(0, d_k - 1)) (1 + gamma h_k)",
    differs="A site counts by its quality, divergence and diversity too, and its update travels in few bits.",
    travels="weights down: 4P bytes, or their coded change; their change up, with Dice, HD95 and class evenness: "
    "fraction P (bits/8 + 1 to 2 bytes of index where fraction < 1) + 4 bytes a scale; where aggregation is "
    "cross-scored, every site's change down to each other site of the round, too, and Dice and HD95 of each up",
    up=coded,
    down=coded_down,
    privacy="statistics",
    needs="training and validation cases with labels",
    validates=by_quality,
    model="fedsegnet",
    reduces=Reduction(
        "fedavg",
        own={"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "c": 1.0, "w_min": 0.0, "w_max": 1.0, "ema": 0.0}
        | {"fraction": 1.0, "bits": 32},
    ),
    **FAREED,
)
def fedsegnet(
    aggregation: Aggregation = "adaptive",
    a: Portion = 0.5,
    h: Positive = 10.0,
    alpha: NotNegative = 1.0,
    beta: NotNegative = 1.0,
    gamma: NotNegative = 0.5,
    c: NotNegative = 1.0,
    cosine: bool = False,
    w_min: Portion = 0.02,
    w_max: Portion = 0.6,
    ema: Decay = 0.5,
    fraction: Sparsity = 1.0,
    bits: Bits = 8,
    feedback: bool = True,
    down_fraction: Sparsity = 1.0,
    down_bits: Bits = 32,
    server: Literal["average", "adam"] = "average",
    eta: Positive = 0.01,
    **rest: Unpack[Parts],
) -> Method:
    """x <- x + sum_k w_k (x_k - x) with adaptive w_k and coded updates. Fareed et al., 2025, eqs 4, 5 and 17.

    aggregation       which factors count: all, divergence only, or just cases; "cross-scored" has all, and the quality
                      of a site's model is what the round's other sites find of it, see ``methods.crossed``
    a .. ema          of the weights, see ``parts.adaptive``
    fraction, bits    of each parameter's entries that go up, largest first, or {"above": threshold} for all that are
                      larger than that, and the bits of each; feedback: what was held back is sent later
    down_fraction, down_bits  the same for the way down
    server, eta       plain averaging, or an Adam step of rate eta at the server

    ValueError for hyperparameters that are set, other than by default, and can do nothing.
    """
    all_act(locals(), fedsegnet.options)
    every = weights.adaptive(
        a=a, h=h, alpha=alpha, beta=beta, gamma=gamma, c=c, cosine=cosine, w_min=w_min, w_max=w_max, ema=ema
    )
    rules: dict[Aggregation, Weigh] = {
        "adaptive": every,
        "cross-scored": every,
        "divergence-only": weights.adaptive(
            alpha=0, beta=beta, gamma=0, c=0, cosine=cosine, w_min=w_min, w_max=w_max, ema=ema
        ),
        "fedavg": by_cases,
    }
    parts = Parts(
        weigh=rules[aggregation],
        channel=sparse(fraction, bits, feedback),
        down=sparse(down_fraction, down_bits),
        step=adaptive_step("adam", eta, 0.9, 0.99, 1e-3) if server == "adam" else take,
    )
    made = parts | rest
    if aggregation == "adaptive":
        return averaging(scored_train, reports=REPORTS, privacy="statistics", **made)
    if aggregation == "cross-scored":
        described = averaging(described_train, reports=DESCRIBED, privacy="statistics", **made)
        return cross_scored(described, made["channel"], made["down"]) if alpha else described
    return averaging(**made)


no_transformer = fedsegnet.variant(
    name="fedsegnet-no-transformer",
    title="FedSegNet without its transformer (ablation)",
    differs="As FedSegNet, with the plain U-Net.",
    model="unet",
)


@card(
    "fedsegnet-no-adaptive",
    title="FedSegNet without adaptive aggregation (ablation)",
    equation="x <- x + sum_k (n_k / n) (x_k - x)",
    differs="As FedSegNet, with sites counted by their cases.",
    travels=CODED,
    up=coded,
    down=coded_down,
    model="fedsegnet",
    reduces=Reduction("fedavg", own={"fraction": 1.0, "bits": 32}),
    **FAREED,
)
def no_adaptive(
    fraction: Sparsity = 1.0,
    bits: Bits = 8,
    feedback: bool = True,
    down_fraction: Sparsity = 1.0,
    down_bits: Bits = 32,
    server: Literal["average", "adam"] = "average",
    eta: Positive = 0.01,
    **rest: Unpack[Parts],
) -> Method:
    """FedSegNet whose sites count by their cases; all its other options are kept. Fareed et al., 2025, table 5."""
    make: Callable[..., Method] = fedsegnet.function
    coding = {"fraction": fraction, "bits": bits, "feedback": feedback}
    down = {"down_fraction": down_fraction, "down_bits": down_bits}
    return make("fedavg", **coding, **down, server=server, eta=eta, **rest)


@card(
    "traditional-fl",
    title="Traditional FL (CNN, uniform averaging)",
    equation="x <- x + 1/m sum_k (x_k - x)",
    differs="All sites count the same; the network is a plain convolutional encoder and decoder.",
    model="cnn",
    reduces=Reduction("fedavg", its={"weights": "equal"}),
    **FAREED,
)
def traditional_fl(**rest: Unpack[Parts]) -> Method:
    """x <- x + 1/m sum_k (x_k - x). The row "Traditional FL" of Fareed et al., 2025, table 1."""
    return averaging(**Parts(weigh=equally) | rest)


@card(
    "federated-unet",
    title="Federated U-Net",
    equation="x <- x + sum_k (n_k / n) (x_k - x)",
    differs="It is FedAvg with a U-Net.",
    model="unet",
    reduces=Reduction("fedavg"),
    **FAREED,
)
def federated_unet(**rest: Unpack[Parts]) -> Method:
    """FedAvg with a U-Net. The row "Federated U-Net" of Fareed et al., 2025, tables 1, 3 and 4."""
    return averaging(**rest)


@card(
    "fedavg-compressed",
    title="FedAvg with compression",
    equation="x <- x + sum_k (n_k / n) C(x_k - x + e_k);  e_k keeps what C lost",
    differs="Only the largest entries of an update travel, in few bits; what was held back is sent later.",
    travels=CODED,
    up=coded,
    down=coded_down,
    model="cnn",
    reduces=Reduction("fedavg", own={"fraction": 1.0, "bits": 32}),
    **FAREED,
)
def fedavg_compressed(
    fraction: Sparsity = 0.1,
    bits: Bits = 8,
    feedback: bool = True,
    down_fraction: Sparsity = 1.0,
    down_bits: Bits = 32,
    **rest: Unpack[Parts],
) -> Method:
    """FedAvg over coded updates. The row "FedAvg w/ Compression" of Fareed et al., 2025, table 1."""
    parts = Parts(channel=sparse(fraction, bits, feedback), down=sparse(down_fraction, down_bits))
    return averaging(**parts | rest)


@card(
    "transformer-fl",
    title="Transformer FL (uniform averaging)",
    equation="x <- x + 1/m sum_k (x_k - x)",
    differs="All sites count the same; the network is a transformer.",
    model="unetr",
    reduces=Reduction("fedavg", its={"weights": "equal"}),
    **FAREED,
)
def transformer_fl(**rest: Unpack[Parts]) -> Method:
    """x <- x + 1/m sum_k (x_k - x) with a transformer. The row "Transformer FL" of Fareed et al., 2025, table 1."""
    return averaging(**Parts(weigh=equally) | rest)
