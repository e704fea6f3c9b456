"""A new interpreter, in which nothing of this process lives: what a run that goes on elsewhere has is its folder.

One interpreter is started per test process, since imports take seconds. It runs nothing itself: it imports, and then
answers each call in a fork of its own, so that no call knows of another. Text hashes otherwise there than here.
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path

# What calls need, imported once for all of them. (Every optimiser imports torch._dynamo, which takes a second.)
MODULES = ("contract", "fedscan.launch", "nibabel", "scipy.ndimage", "scipy.spatial", "torch._dynamo")


class Elsewhere(AssertionError):
    """What was called in the new interpreter failed there; the text is its traceback."""


@cache
def interpreter() -> "subprocess.Popen[str]":
    """The interpreter, started when it is first called and ended with this process."""
    hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    made = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": paths},
    )
    atexit.register(made.communicate)  # closes its input, at which it ends
    return made


def afresh(function: str, folder: Path) -> str:
    """What ``function`` ("module:name") returns for the folder in a new interpreter. Raises Elsewhere if it raises."""
    process = interpreter()
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps([function, str(folder)]) + "\n")
    process.stdin.flush()
    said: dict[str, str] = json.loads(process.stdout.readline() or '{"raised": "the new interpreter has ended"}')
    if "raised" in said:
        raise Elsewhere(said["raised"])
    return said["returned"]


def call(function: str, folder: str) -> dict[str, str]:
    """The answer to one call."""
    module, name = function.split(":")
    try:
        return {"returned": getattr(importlib.import_module(module), name)(Path(folder))}
    except BaseException:  # whatever it is, the one who called should know
        return {"raised": traceback.format_exc()}


def serve() -> None:
    """Answers each line that arrives by a line, from a fork; what else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.write(json.dumps(call(*json.loads(line))) + "\n")
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            answers.write(json.dumps({"raised": f"the new process ended with status {status}"}) + "\n")


if __name__ == "__main__":
    serve()
