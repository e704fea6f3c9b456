"""The server does not wait: each model is mixed in when it comes."""

from collections.abc import Callable
from typing import Annotated, Literal

from annotated_types import Ge
from torch import nn

from fedscan import trees
from fedscan.method import Absent, Message, Method, Sites, State, Terms, Tree, answer, just_weights, receive
from fedscan.methods.card import Reduction, card, moments_stay
from fedscan.methods.kinds import Clients, Fraction, NotNegative
from fedscan.parts.extra import pull_to
from fedscan.schema import schema_of, weights_of
from fedscan.site import Site, fit
from fedscan.spec import Leaves, Spec

Rule = Literal["constant", "polynomial", "hinge"]


def discount(rule: Rule, a: float | None, b: float | None) -> Callable[[int], float]:
    """s(d), the part of alpha that a model counts for when it is d updates old. Xie et al., section 5.2.

    polynomial (1 + d)^-a, and a = 0.5 where it is None; hinge 1 up to d = b, then 1 / (a (d - b) + 1), and a = 10,
    b = 4; constant 1. Raises ValueError for a number that plays no part.
    """
    for name, given, rules in (("a", a, ("polynomial", "hinge")), ("b", b, ("hinge",))):
        if given is not None and rule not in rules:
            raise ValueError(f'{name} plays no part in staleness = "{rule}": leave it out')
    if rule == "polynomial":
        power = 0.5 if a is None else a
        return lambda d: (1.0 + d) ** -power
    if rule == "hinge":
        slope, bend = 10.0 if a is None else a, 4.0 if b is None else b
        return lambda d: 1.0 if d <= bend else 1 / (slope * (d - bend) + 1)
    return lambda d: 1.0


def weights_spec(terms: Terms) -> dict[str, Spec]:
    """A whole model."""
    return {"weights": Leaves(schema_of(terms.model))}


def waited_for(sites: Sites, state: State) -> State:
    """Waits for who is still at work when the study ends, so that the record holds all that leaves a site.

    What comes then is not mixed in: the state stays as it was tested.
    """
    while sites.busy:
        try:
            sites.next()
        except Absent:
            break
    return state


@card(
    "fedasync",
    title="Asynchronous federated optimisation",
    family="asynchronous",
    paper="Xie, Koyejo & Gupta, 2019, algorithm 1",
    year=2019,
    url="https://arxiv.org/abs/1903.03934",
    equation="x <- (1 - a_t) x + a_t x_new, a_t = alpha s(t - tau);  x_new: min_w F_k(w) + rho/2 ||w - x_tau||^2",
    differs="Nobody waits for anybody: each model is mixed into the server's as it comes, the less the older the model "
    "that it began from, and its site goes on at once from the newest. It is the plain form of the asynchronous "
    "learning of Sakib et al., ICC 2021, who send deep layers less often, and of Camajori Tedeschini et al., IEEE "
    "Access 2022, whose peers mix without a server; neither of these is done here.",
    travels="the model down and the trained model up: 4P bytes each way, per answer; a fast site answers more often",
    admits=moments_stay("the server mixes models and no moments"),
    reduces=Reduction("cwt", own={"alpha": 1.0, "rho": 0.0}, alone=True),
)
def fedasync(
    alpha: Fraction = 0.6,
    staleness: Rule = "polynomial",
    a: NotNegative | None = None,
    b: NotNegative | None = None,
    rho: NotNegative = 0.005,
    oldest: Annotated[int, Ge(0)] | None = None,
    arrivals: Clients = None,
) -> Method:
    """x <- (1 - a_t) x + a_t x_new with a_t = alpha s(t - tau), as models come. Xie et al., 2019, algorithm 1.

    A round ends with so many ``arrivals``; sites that are still at work then work on, and their models come in a later
    round. By default there are as many as sites, so that a round has the local work of one of federated averaging. The
    paper's epoch, after which it evaluates, is one arrival: ``arrivals = 1``.

    t - tau counts the models that were mixed in since the site was sent its own: 0 where none was. (Read to the
    letter, algorithm 1 counts one more, and with it even a single site would be stale.) The server keeps tau itself and
    does not take a site's word for it. How many cases a site has plays no part, as in the paper. That alpha is halved
    late in training, as in the paper's experiments, is left out.

    Running statistics are mixed like parameters; of counters, the larger stays. A site that does not answer, or whose
    answer is refused, is asked anew after the next arrival; where nobody answers, the study's ``absent`` decides. What
    is under way after the last round is waited for and recorded, and no more mixed in.

    In a simulation, who is faster follows [run] seconds: one second for each training case, where nothing is said.

    alpha      how much a fresh model counts;  staleness: how that falls with age;  a, b: the numbers in it
    rho        of the pull of a site's model towards the one it was sent
    oldest     a model older than so many updates is not mixed in, and counts as an arrival all the same
    arrivals   in a round
    """
    s = discount(staleness, a, b)

    @answer("weights", weights_spec, weights_spec)
    def train_near(site: Site, message: Message) -> Tree:
        """Trains the model that arrived for the study's local epochs, held near to where it began."""
        model = receive(site, message)
        x = {name: p.detach().clone() for name, p in model.named_parameters()}
        report = fit(site, model, extra=pull_to(x, rho) if rho else None)
        return {**report, "weights": weights_of(model)}

    def mixed(state: State, name: str, reply: Tree) -> State:
        age = state["updates"] - state["sent"][name]
        if oldest is not None and age > oldest:
            return state
        part = alpha * s(age)
        x = trees.mean([reply["weights"], state["weights"]], [part, 1 - part])
        return {**state, "weights": x, "updates": state["updates"] + 1}

    def round(sites: Sites, state: State) -> State:
        for arrived in range(arrivals or len(sites.names)):
            if idle := sorted(set(sites.names) - set(sites.busy)):
                message = {"weights": state["weights"]}
                sites.start(train_near, dict.fromkeys(idle, message))
                state = {**state, "sent": {**state["sent"], **dict.fromkeys(idle, state["updates"])}}
            try:
                name, reply = sites.next()
            except Absent:
                if arrived:
                    break  # what has come is kept
                raise
            state = mixed(state, name, reply)
        return state

    def init(model: nn.Module, names: tuple[str, ...]) -> State:
        return {**just_weights(model, names), "updates": 0, "sent": {}}

    return Method(init, round, answers=(train_near,), publishes=weights_spec, closing=waited_for)
