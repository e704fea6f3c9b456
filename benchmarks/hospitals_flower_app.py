"""Flower's way to the work of ``hospitals.py``: a ServerApp with FedAvg and a ClientApp, as ``flwr run`` packs them."""

from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from hospitals_work import SITES, Hospital, Net

server = ServerApp()
client = ClientApp()


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """At the server: FedAvg, without evaluation, and the model into a file."""
    told = context.run_config
    plan = FedAvg(fraction_evaluate=0.0, min_train_nodes=SITES, min_available_nodes=SITES)
    last = plan.start(grid, ArrayRecord(Net(str(told["case"])).state_dict()), num_rounds=int(told["rounds"]))
    np.savez(Path(str(told["folder"])) / "model.npz", **{name: array.numpy() for name, array in last.arrays.items()})


@client.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """At a hospital: an epoch from the weights that came."""
    hospital = Hospital(str(context.run_config["case"]), int(context.node_config["partition-id"]))
    came = message.content["arrays"].to_torch_state_dict()
    weights = hospital.epoch(came, int(message.content["config"]["server-round"]) - 1)
    metrics = MetricRecord({"num-examples": len(hospital.data[0])})
    return Message(RecordDict({"arrays": ArrayRecord(weights), "metrics": metrics}), reply_to=message)
