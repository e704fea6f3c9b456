"""Which devices torch finds on this machine, and the one check that a device is among them."""

import torch


def devices() -> tuple[str, ...]:
    """What a study may be carried out on here: "cpu", "cuda:0" and so on, "mps"."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = ("mps",) if torch.backends.mps.is_available() else ()
    return ("cpu", *(f"cuda:{n}" for n in range(gpus)), *apple)


def is_there(device: str) -> bool:
    """Whether "cpu", "cuda" (the first), "cuda:N" or "mps" is a device of this machine; so not "auto"."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and (not index or index.isdecimal()):
        return f"cuda:{int(index or 0)}" in devices()
    return device in devices()


def allowed() -> str:
    """What belongs where another device was named, in words."""
    return f"a device that torch finds on this machine ({', '.join(devices())}, or auto)"


def auto() -> str:
    """The device that "auto" stands for."""
    return "cuda" if torch.cuda.is_available() else "cpu"
