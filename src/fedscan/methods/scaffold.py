"""SCAFFOLD: sites correct their gradients by what they know of the others' direction."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fedscan import trees
from fedscan.averaging import mean
from fedscan.method import Message, Method, Sites, State, Terms, Tree, answer, receive
from fedscan.methods.card import card, dense, learned
from fedscan.methods.kinds import Clients, Positive
from fedscan.parts.pick import everyone, some
from fedscan.parts.step import rate
from fedscan.schema import Kind, Schema, schema_of, weights_of
from fedscan.site import Site, copy_of, fit
from fedscan.spec import Leaves, Number, Spec
from fedscan.step import Step


def plain_sgd(step: Step) -> None:
    """Raises ValueError unless steps are plain SGD: else (x - y) / (K lr) is not the mean gradient."""
    if step.optimiser != "sgd" or step.momentum or step.clip is not None:
        raise ValueError(
            "scaffold reads the mean gradient off the way a site went, so it needs plain SGD: "
            'set optimiser = "sgd", momentum = 0 and no clip in the study'
        )


def with_variate(schema: Schema, options: Mapping[str, Any]) -> int:
    """4P + 4P': every leaf, and once more every parameter."""
    return dense(schema, options) + dense(learned(schema), options)


@card(
    "scaffold",
    title="SCAFFOLD",
    family="control variates",
    paper="Karimireddy, Kale, Mohri, Reddi, Stich & Suresh, ICML 2020, algorithm 1, option II",
    year=2020,
    url="https://arxiv.org/abs/1910.06378",
    equation="y <- y - lr (g - c_i + c);  c_i+ = c_i - c + (x - y) / (K lr);  x <- x + eta mean(y - x)",
    differs="Each gradient is corrected by the difference between the site's own direction and that of all.",
    travels="weights and the control variate down, the change of both up: 4P + 4P' bytes each way, P' the parameters",
    up=with_variate,
    down=with_variate,
    needs="training cases with labels, and plain SGD",
    admits=plain_sgd,
)
def scaffold(eta: Positive = 1.0, clients: Clients = None) -> Method:
    """y <- y - lr (g - c_i + c), c_i+ = c_i - c + (x - y) / (K lr). Karimireddy et al., ICML 2020, alg. 1, option II.

    eta      the server's rate: x <- x + eta mean(y - x), c <- c + |S|/N mean(c_i+ - c_i); all sites count the same
    clients  |S|, sites per round, drawn anew; all N of them where nothing is said
    """
    pick = everyone if clients is None else some(clients)

    def gives(terms: Terms) -> dict[str, Spec]:
        plain_sgd(terms.step)
        schema = schema_of(terms.model)
        return {"update": Leaves(schema), "control": Leaves(learned(schema)), "steps": Number(low=1, whole=True)}

    @answer("weights", gives)
    def learn(site: Site, message: Message) -> Tree:
        plain_sgd(site.step)
        model, x, c = receive(site, message), message["weights"], message["control"]
        c_i = site.state.get("control") or trees.zeros(c)
        pull = {name: leaf.to(site.slots.device) for name, leaf in trees.sub(c, c_i).items()}

        def correct(model: nn.Module) -> None:  # g <- g - c_i + c
            for name, p in model.named_parameters():
                if p.grad is not None:
                    p.grad += pull[name]

        report = fit(site, model, correct=correct)
        report.pop("optimizer", None)
        update = trees.sub(weights_of(model), x)
        gone = trees.scale(update.of(Kind.PARAMETER), -1 / (report["steps"] * site.lr))  # (x - y) / (K lr)
        change = trees.sub(gone, c)  # c_i+ - c_i
        site.state["control"] = trees.add(c_i, change)
        return {**report, "update": update, "control": change}

    def init(model: nn.Module, names: tuple[str, ...]) -> State:
        weights = copy_of(model)
        return {"weights": weights, "control": trees.zeros(weights.of(Kind.PARAMETER))}

    def round(sites: Sites, state: State) -> State:
        chosen = pick(sites.names, sites.random("pick"))
        replies = sites.ask(learn, {"weights": state["weights"], "control": state["control"]}, to=chosen)
        even = [1.0] * len(replies)
        merged = mean((replies[name]["update"] for name in replies), even)
        change = mean((replies[name]["control"] for name in replies), even)
        control = trees.add(state["control"], change, len(replies) / len(sites.names))
        return rate(eta)({**state, "control": control}, merged)

    return Method(init, round, answers=(learn,))
