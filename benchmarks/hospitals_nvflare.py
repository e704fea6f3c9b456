"""NVFlare's own way to the same work: its FedAvg recipe, and the script that each of its clients runs.

    python hospitals_nvflare.py poc CASE ROUNDS FOLDER     server and four clients with mutual TLS on loopback
    python hospitals_nvflare.py sim CASE ROUNDS FOLDER     its simulator: no TLS, nobody is provisioned

Within the job, this file is the clients' script.
"""

import sys
from pathlib import Path
from typing import Any

from hospitals_work import SITES, Hospital, note
from workload import CASES


def server(kind: str, case: str, rounds: int, folder: Path) -> None:
    """Carries out the recipe, and notes when NVFlare's processes start, and when the last model is there."""
    note(what="begins")
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import PocEnv, SimEnv, poc_env

    provision = poc_env.prepare_poc_provision

    def provisioned(**told: Any) -> Any:
        made = provision(**told)
        note(what="starts")
        return made

    poc_env.prepare_poc_provision = provisioned
    recipe = FedAvgRecipe(
        name="workload", min_clients=SITES, num_rounds=rounds, train_script=__file__, train_args=f"client {case}",
        model={"class_path": "hospitals_work.Net", "args": {"case": case}},
    )  # fmt: skip
    if kind == "sim":
        note(what="starts")
        env: Any = SimEnv(num_clients=SITES, workspace_root=str(folder / "sim"))
    else:
        env = PocEnv(num_clients=SITES, extra={"login_timeout": 120})  # by default 10 s: too few on a busy machine
    run = recipe.execute(env)
    result = run.get_result(clean_up=False)
    (model,) = Path(result).rglob("FL_global_model.pt")  # where its user finds it, fetched from the server
    note(what="ends", model=model.stat().st_mtime)


def client(case: str) -> None:
    """A client: receives weights, trains an epoch, sends what it has then."""
    import nvflare.client as flare

    flare.init()
    site = int(flare.get_site_name().rpartition("-")[2]) - 1
    hospital = Hospital(case, site)
    size = CASES[case]
    while flare.is_running() and (came := flare.receive()):
        weights = hospital.epoch(came.params, came.current_round)
        flare.send(flare.FLModel(params=weights, meta={"NUM_STEPS_CURRENT_ROUND": size.per // size.batch}))


if __name__ == "__main__":
    if sys.argv[1] == "client":
        client(sys.argv[2])
    else:
        server(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
