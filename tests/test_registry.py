"""The registry: names, hyperparameters and plug-ins, and what it says of a wrong one."""

import hashlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from contract import Desk
from fedscan import plugins
from fedscan.methods import registry
from fedscan.methods.registry import get, methods

torch.set_num_threads(1)

# -- registry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "fedprox",
            {"nu": 1},
            "'nu' is no hyperparameter of 'fedprox': allowed: mu, stragglers, work, unit, late, clients",
        ),
        ("fedavgm", {"betta": 1}, "did you mean 'beta'? allowed: eta, beta, dampening, clients"),
        ("fedprox", {"mu": -1.0}, "mu of method 'fedprox' cannot be -1.0"),
        ("fedprox", {"mu": "big"}, "mu of method 'fedprox' cannot be 'big'"),
        ("fedsegnet", {"aggregation": "adaptiv"}, "'adaptive', 'cross-scored', 'divergence-only' or 'fedavg'"),
        ("fedsegnet", {"bits": 4}, "8, 16 or 32"),
        ("fedavg", {"clients": 0}, "clients of method 'fedavg' cannot be 0"),
        ("cwt", {"clients": 2}, "'clients' is no hyperparameter of 'cwt'"),
    ],
)
def test_wrong_hyperparameters(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as e:
        get(name).make(options)
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)


def test_wrong_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'fedsegnet'"):
        get("fedsegnett")


SOURCE = '''
from fedscan.averaging import averaging
from fedscan.methods.card import card


@card("ours", title="Ours", family="averaging", paper="none", year=2026, url="", equation="x <- x", differs="No.")
def ours(strength: float = 1.0, **rest):
    """FedAvg, from elsewhere."""
    return averaging(**rest)


def bare():
    """No card."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that an installed package could bring."""
    path = tmp_path / "fedscan_ours.py"
    path.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fedscan_ours", raising=False)
    return path


def offer(monkeypatch: pytest.MonkeyPatch, value: str, group: str = registry.GROUP) -> None:
    point = EntryPoint("ours", value, group)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])


def test_a_package_brings_a_method(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "fedscan_ours:ours")
    entry = get("ours")
    assert entry.digest == hashlib.sha256(package.read_bytes()).hexdigest()
    assert entry.resolve({}) == {"strength": 1.0, "clients": None}
    assert toy.same(Desk(toy.study(entry.make({}))).play(), Desk(toy.study(get("fedavg").make())).play())


def test_a_function_without_a_card_is_no_method(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "fedscan_ours:bare")
    with pytest.raises(ValueError, match="not a function decorated with @card"):
        methods()


def test_a_package_that_cannot_be_imported_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text("import no_such_module_anywhere\n")
    offer(monkeypatch, "fedscan_ours:ours")
    with pytest.raises(ValueError, match=r"the plug-in 'ours' \(fedscan_ours:ours\) cannot be loaded: ModuleNotFound"):
        methods()


def test_two_methods_of_one_name(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text(SOURCE.replace('"ours"', '"fedavg"'))
    offer(monkeypatch, "fedscan_ours:ours")
    with pytest.raises(ValueError, match="two packages bring a method 'fedavg'"):
        methods()


MODEL = '''
from torch import nn

from fedscan.models.card import model


@model("thin", summary="One convolution.", paper="none", presets={})
def thin(channels: int, classes: int, dims: int = 3, *, kernel: int = 1):
    """Images to logits."""
    return (nn.Conv3d if dims == 3 else nn.Conv2d)(channels, classes, kernel)
'''


def test_a_package_brings_a_model(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedscan.models import registry as networks

    package.write_text(MODEL)
    offer(monkeypatch, "fedscan_ours:thin", networks.GROUP)
    card = networks.models()["thin"]
    assert card.origin == ("unknown", "", hashlib.sha256(package.read_bytes()).hexdigest())
    assert networks.build("thin", 2, 3, kernel=1).weight.shape == (3, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="'kernell' is no option of model 'thin': did you mean 'kernel'"):
        networks.build("thin", 2, 3, kernell=1)
    package.write_text(MODEL.replace('"thin"', '"unet"'))
    monkeypatch.delitem(sys.modules, "fedscan_ours")
    with pytest.raises(ValueError, match="two packages bring a model 'unet'"):
        networks.models()
    offer(monkeypatch, "fedscan_ours:nn", networks.GROUP)
    with pytest.raises(ValueError, match="not a builder decorated with @model"):
        networks.models()


def test_the_hash_of_a_package_covers_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fedscan_whole"
    folder.mkdir()
    (folder / "__init__.py").write_text("from fedscan_whole.code import build\n")
    (folder / "code.py").write_text("from fedscan_whole.inner import WIDTH\n\n\ndef build():\n    return WIDTH\n")
    (folder / "inner.py").write_text("WIDTH = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("theirs", "fedscan_whole:build", "any")
    before = plugins.origin_of(point, point.load()).digest
    (folder / "inner.py").write_text("WIDTH = 2\n")
    assert plugins.origin_of(point, point.load()).digest != before


def test_every_name_that_was_promised() -> None:
    promised = """fedavg fedsgd fedprox fedbn fedavgm fedadam fedyogi fedadagrad comed scaffold cwt centralised
        local-only ensemble fedsegnet fedsegnet-no-transformer fedsegnet-no-adaptive traditional-fl federated-unet
        fedavg-compressed transformer-fl braintorrent fedasync"""
    assert set(methods()) == set(promised.split())


def test_models_that_methods_are_published_with() -> None:
    from fedscan.models import models

    assert {e.card.model for e in methods().values() if e.card.model} <= set(models())
